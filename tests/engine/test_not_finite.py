"""A step whose losses or gradients are not finite: not taken, told of, skipped without a trace."""

import copy
import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from core_utils import FromInputs, assert_same
from detectron2.config import get_cfg
from detectron2.engine import hooks
from detectron2.utils.events import JSONWriter
from group_utils import run_ranks
from modeling_utils import load_config, make_batch
from step_utils import Model, Run, train
from torch.nn.parallel import DistributedDataParallel

from ss_detectron import add_ss_config
from ss_detectron.engine import AlignmentHook, Trainer
from ss_detectron.engine.not_finite import all_finite, image_names, not_finite
from ss_detectron.engine.train_loop import StepTrainer
from ss_detectron.learners import Backpropagation
from ss_detectron.solver.build import build_optimizer


def batches(count: int, rank: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(rank)
    return [
        {
            "image": torch.randn(4, 2, 6, 6, generator=generator),
            "file_name": [f"rank{rank}_batch{i}_{j}.png" for j in range(4)],
            "factor": 1.0,
        }
        for i in range(count)
    ]


def spoiled(batch: dict, how: str = "pixel") -> dict:
    """One pixel is not a number, or one of the losses is infinite (and the gradient as well)."""
    batch = copy.deepcopy(batch)
    if how == "pixel":
        batch["image"][2, 1, 3, 3] = math.nan
    else:
        batch["factor"] = math.inf
    return batch


def make(rule: str, loader: list[dict], **options) -> StepTrainer:
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.01])
    model = Model(rule, norm=True)
    return StepTrainer(Backpropagation(model), loader, build_optimizer(cfg, model), **options)


def state(trainer: StepTrainer) -> tuple[dict, dict]:
    return copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))


# What is found -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_number_among_many_is_found(value):
    tensors = {"a": torch.zeros(3), "b": torch.randn(40, 50), "c": torch.ones(2, 2).bfloat16()}
    assert all_finite(tensors.values()) and not not_finite(tensors.items())
    tensors["b"][31, 17] = value
    assert not all_finite(tensors.values())
    assert not_finite(tensors.items()) == ["b"]


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ({"image": 0, "file_name": ["a.png", Path("b.png")]}, ["a.png", "b.png"]),
        ([{"file_name": "a.jpg"}, {"file_name": "b.jpg", "image": 0}], ["a.jpg", "b.jpg"]),
        ([{"image": 0}, {"file_name": "b.jpg"}], ["unnamed", "b.jpg"]),
        ({"image": 0}, None),
        ((torch.zeros(3), torch.zeros(3)), None),
    ],
)
def test_the_images_of_a_batch(batch, names):
    assert image_names(batch) == names


# A step that is not taken ------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "passes"), [("pixel", 1), ("loss", 2)])
def test_a_step_is_not_taken_and_everything_about_it_is_told(how, passes, caplog):
    good, bad = batches(2)
    loader = [good] * passes + [good, spoiled(bad, how)][-passes:]
    trainer = make("ss", loader, passes=passes)
    trainer.optimizer.param_groups[0]["lr"] = 0.125
    train(trainer, 1)
    before = state(trainer)[1], copy.deepcopy(dict(trainer.model.named_parameters()))
    with pytest.raises(FloatingPointError) as error:
        train(trainer, 1)
    assert_same((state(trainer)[1], dict(trainer.model.named_parameters())), before)

    text = str(error.value)
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.getMessage() == text
    where = "rank 0" if passes == 1 else "rank 0, pass 2 of 2"
    losses = r"loss_a nan, loss_b nan" if how == "pixel" else r"loss_a [\d.]+, loss_b inf"
    assert re.search(rf"^  {where}: {losses}; images: {', '.join(bad['file_name'])}$", text, re.M)
    assert text.count("images: ") == passes
    for said in (
        r"not finite at iteration 1,",
        r"learning rate: .*0\.125",
        r"gradients that are not finite: 8: layers\.0\.weight, layers\.0\.bias, layers\.1\.weight",
    ):
        assert re.search(said, text)
    ratios = re.search(r"norm\(B\)/norm\(W\): (.+)", text)[1].split(", ")
    assert {r.split()[0] for r in ratios} == {"layers.0", "layers.3", "layers.5"}
    values = [float(r.split()[1]) for r in ratios]
    assert values == sorted(values, reverse=True) and values[0] < 1


def test_of_the_gradients_those_that_the_optimiser_uses_count():
    model = Model(norm=True)
    spoil, unused = model.layers[3].weight, model.layers[5].weight
    unused.register_hook(lambda g: g * math.nan)
    model.layers[1].requires_grad_(False)
    used = [p for p in model.parameters() if p is not unused]
    trainer = StepTrainer(Backpropagation(model), batches(3), torch.optim.SGD(used, 0.0))
    for parameter in model.layers[0].parameters():
        parameter.register_hook(lambda g: g + 1e30)  # large is no reason
    train(trainer, 1)
    assert model.layers[0].weight.grad.min() > 1e29
    spoil.register_hook(lambda g: g.index_fill(0, torch.tensor(1), math.inf))
    with pytest.raises(
        FloatingPointError, match="gradients that are not finite: 1: layers.3.weight"
    ):
        train(trainer, 1)


# Skipping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"passes": 2}, {"mixed_precision": True}], ids=str)
@pytest.mark.parametrize("how", ["pixel", "loss"])
@pytest.mark.parametrize("rule", ["ss", "brsf", "kp", FromInputs])
def test_a_skipped_step_leaves_no_trace(rule, how, options):
    passes = options.get("passes", 1)
    good = batches(4 * passes)
    bad = batches(passes, rank=1)
    bad[-1] = spoiled(bad[-1], how)
    some, others = good[: 2 * passes], good[2 * passes :]
    skipped = make(rule, bad + some + bad + others, skips=2, **options)
    logged = train(skipped, 6)
    plain = make(rule, good, **options)
    expected = train(plain, 4)
    assert logged == [{}, *expected[:2], {}, *expected[2:]]
    assert_same(state(skipped), state(plain))
    assert int(plain.model.layers[1].num_batches_tracked) == 4 * passes
    if rule == "brsf":
        assert int(plain.model.state_dict()["layers.0.feedback_updates"]) == 4


def test_so_many_steps_are_skipped_and_the_next_ends_the_run_resumed_or_not(caplog, tmp_path):
    good, bad = batches(1)[0], spoiled(batches(1)[0])
    trainer = make("ss", [good, bad, good], skips=2)
    train(trainer, 3)
    (record,) = [r for r in caplog.records if "not finite" in r.message]
    assert record.levelno == logging.WARNING and "rank0_batch0_3.png" in record.message

    torch.save(trainer.state_dict(), tmp_path / "state.pth")
    saved = torch.load(tmp_path / "state.pth", weights_only=True)
    resumed = make("ss", [bad, good, bad], skips=2)
    resumed.load_state_dict(saved)
    train(resumed, 2)
    with pytest.raises(FloatingPointError, match=r"Skipped: 2 of SOLVER\.MAX_SKIPPED_STEPS 2"):
        train(resumed, 1)
    assert resumed.skipped == 2


def test_weights_that_are_not_finite_are_not_skipped_over():
    trainer = make("ss", batches(3), skips=100)
    train(trainer, 1)
    trainer.model.layers[3].weight.data[0, 0, 0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"weights .* not finite: 1: layers\.3\.weight\n"):
        train(trainer, 1)


def test_a_detectors_statistics_and_normaliser_are_put_back():
    cfg = load_config("quick/shapes_retinanet_ss.yaml", "MODEL.FPN.OUT_CHANNELS", 32)
    model = Trainer.build_model(cfg)
    bad = make_batch()
    bad[0]["image"] = torch.full_like(bad[0]["image"], math.nan, dtype=torch.float32)
    loader = [make_batch(), bad, bad]
    trainer = StepTrainer(
        Backpropagation(model), loader, Trainer.build_optimizer(cfg, model), skips=1
    )
    train(trainer, 1)
    before, normalizer = state(trainer), model.loss_normalizer
    train(trainer, 1)
    assert_same(state(trainer), before)
    assert normalizer == model.loss_normalizer != 100
    with pytest.raises(FloatingPointError):  # without a skip left, nothing is put back
        train(trainer, 1)
    assert model.loss_normalizer != normalizer


# Scaled gradients --------------------------------------------------------------------------------


def scaled(loader: list[dict], scale: float, **options) -> StepTrainer:
    """As on a GPU, with the scaler that torch has for the CPU."""
    trainer = make("ss", loader, **options)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.optimizer._step_supports_amp_scaling = False
    return trainer


def overflow(trainer: StepTrainer) -> None:
    trainer.model.layers[0].weight.register_hook(lambda g: g * math.inf)


def test_overflows_are_the_scalers_business_until_its_scale_is_tiny():
    trainer = scaled(batches(60), 65536.0)
    overflow(trainer)
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    with pytest.raises(FloatingPointError, match=r"gradients that are not finite: 1: layers\.0"):
        train(trainer, 60)
    assert trainer.iter == 30
    assert_same(dict(trainer.model.named_parameters()), before)


def test_an_ordinary_step_does_not_wait_for_the_scale():
    trainer = scaled(batches(2), 1024.0)
    trainer.scaler.get_scale = None
    train(trainer, 2)


def test_a_loss_that_is_not_finite_is_no_overflow_and_skipping_it_leaves_the_scale():
    good = batches(2)
    skipped = scaled([good[0], spoiled(good[1]), good[1]], 1024.0, skips=1)
    train(skipped, 3)
    plain = scaled(good, 1024.0)
    train(plain, 2)
    assert_same(state(skipped), state(plain))
    assert_same(skipped.scaler.state_dict(), plain.scaler.state_dict())
    with pytest.raises(FloatingPointError, match="loss_b nan"):
        train(scaled([spoiled(good[0])], 1024.0), 1)


# What is kept and written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (lambda t: t.model.layers[5].bias, "layers.5.bias"),
        (lambda t: t.model.layers[1].running_var, "layers.1.running_var"),
        (
            lambda t: t.optimizer.state[t.model.layers[0].weight]["momentum_buffer"],
            "momentum_buffer of layers.0.weight",
        ),
    ],
)
def test_a_state_that_is_not_finite_is_refused_to_checkpoints(place, name):
    trainer = make("fa", batches(1))
    train(trainer, 1)
    place(trainer).data.view(-1)[0] = 1e30
    trainer.state_dict()
    place(trainer).data.view(-1)[0] = math.inf
    with pytest.raises(FloatingPointError, match=f"Not finite: 1: {name}"):
        trainer.state_dict()


def test_metrics_hold_no_nan_and_count_what_was_skipped(tmp_path):
    good = batches(4)
    loader = [spoiled(good[0]), good[0], spoiled(good[1], "loss"), *good[1:]]
    rates = torch.optim.lr_scheduler.LambdaLR
    trainer = make("ss", loader, skips=2)
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    schedule = hooks.LRScheduler(trainer.optimizer, rates(trainer.optimizer, lambda i: 1 / (i + 1)))
    run = Run(trainer, [AlignmentHook(1), schedule, hooks.PeriodicWriter([writer], 1)])
    trainer.after_backward = run.after_backward
    run.train(0, 6)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.json")

    lines = (tmp_path / "metrics.json").read_text().splitlines()
    logged = [json.loads(line, parse_constant=refuse) for line in lines]
    by_iteration = {row["iteration"]: row for row in logged}
    assert ["total_loss" in by_iteration[i] for i in range(6)] == [False, True, False, *[True] * 3]
    assert [by_iteration[i].get("skipped_steps") for i in (0, 2)] == [1, 2]
    assert by_iteration[5]["lr"] == pytest.approx(0.01 / 6)
    assert "alignment/gradient_angle" in by_iteration[1]
    assert not any(h for h in trainer.model._forward_hooks.values())


# Two processes -----------------------------------------------------------------------------------


class Constant(Model):
    """One of its losses is a constant of the batch, which gives no gradient."""

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        losses = super().forward(batch)
        constant = torch.tensor(batch.get("constant", 0.0))
        return {**losses, "loss_c": 0 * losses["loss_a"] + constant}


def _worker(rank: int, folder: str) -> None:
    def make_two(loader: list[dict], **options) -> StepTrainer:
        learner = DistributedDataParallel(
            Backpropagation(Constant("kp", norm=True)), broadcast_buffers=False
        )
        optimizer = torch.optim.SGD(learner.parameters(), 0.05, momentum=0.9)
        return StepTrainer(learner, loader, optimizer, **options)

    good, result = batches(3, rank), {}
    bad = {
        # Of one rank alone: a pixel, whose gradient all ranks get, and a loss without gradient.
        "pixel": spoiled(good[1]) if rank == 1 else good[1],
        "loss": {**good[1], "constant": math.inf} if rank == 1 else good[1],
    }
    plain = make_two([good[0], good[2]])
    train(plain, 2)
    for how, batch in bad.items():
        skipped = make_two([good[0], batch, good[2], batch], skips=1)
        train(skipped, 3)
        assert_same(state(skipped), state(plain))
        try:
            train(skipped, 1)
        except FloatingPointError as error:
            result[how] = str(error)
    torch.save(result, f"{folder}/rank{rank}.pth")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_all_ranks_leave_out_a_step_that_is_not_finite_on_one(tmp_path):
    run_ranks(_worker, tmp_path)
    results = [torch.load(tmp_path / f"rank{i}.pth") for i in (0, 1)]
    assert results[0] == results[1]
    for how, text in results[0].items():
        for rank in (0, 1):
            names = ", ".join(f"rank{rank}_batch1_{j}.png" for j in range(4))
            assert re.search(rf"  rank {rank}: .*; images: {names}$", text, re.M), how
    assert re.search(r"rank 0: loss_a [\d.]+, .*\n  rank 1: loss_a nan, ", results[0]["pixel"])
    assert "gradients that are not finite: 11: layers.0.weight" in results[0]["pixel"]
    assert re.search(r"rank 0: .*loss_c 0;.*\n  rank 1: .*loss_c inf;", results[0]["loss"])
    assert "gradients that are not finite: 0" in results[0]["loss"]
