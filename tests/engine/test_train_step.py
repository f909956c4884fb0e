"""A step is Detectron2's; a step over several batches is a step over one large batch."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from core_utils import assert_same, each_rule
from detectron2.config import get_cfg
from detectron2.engine import SimpleTrainer
from detectron2.solver.build import maybe_add_gradient_clipping
from group_utils import run_ranks
from step_utils import Model, train
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ss_detectron import add_ss_config, advance_feedback
from ss_detectron.engine.train_loop import StepTrainer
from ss_detectron.learners import Backpropagation
from ss_detectron.solver.build import build_optimizer

STEPS, BATCH = 3, 8


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, 2, 6, 6, generator=generator, dtype=torch.float64)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-3)


def stock_trainer(model: nn.Module, loader: list) -> SimpleTrainer:
    """Detectron2's trainer, which knows of no learner."""
    sgd = optimizer(model)
    sgd.register_step_post_hook(lambda *_: advance_feedback(model))
    return SimpleTrainer(model, loader, sgd)


def step_trainer(model: nn.Module, loader: list, **options) -> StepTrainer:
    return StepTrainer(Backpropagation(model), loader, optimizer(model), **options)


def stock(rule: str) -> tuple[nn.Module, list[dict[str, float]]]:
    model = Model(rule).double()
    return model, train(stock_trainer(model, list(images())), STEPS)


def parts(batches: torch.Tensor, passes: int) -> Iterator[torch.Tensor]:
    for batch in batches:
        yield from batch.chunk(passes)


@each_rule
def test_a_step_of_one_batch_is_detectron2s_bit_for_bit(rule):
    trained = []
    loader = list(images().float())
    for make in (stock_trainer, step_trainer):
        model = Model(rule)
        trainer = make(model, loader)
        losses = train(trainer, STEPS)
        trained.append((model.state_dict(), trainer.optimizer.state_dict(), losses))
    assert_same(*trained)


@each_rule
@pytest.mark.parametrize("passes", [2, 4])
def test_several_passes_train_as_one_large_batch(rule, passes):
    expected, expected_losses = stock(rule)
    model = Model(rule).double()
    loader = list(parts(images(), passes))
    losses = train(step_trainer(model, loader, passes=passes), STEPS)
    assert model.calls == STEPS * passes
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-12)
    for row, other in zip(losses, expected_losses, strict=True):
        assert row == pytest.approx(other)
        assert set(row) == {"loss_a", "loss_b", "total_loss"}


def test_a_single_loss_may_be_a_tensor():
    class Single(Model):
        def forward(self, images):
            return super().forward(images)["loss_a"]

    model = Single().double()
    (row,) = train(step_trainer(model, [images()[0]]), 1)
    assert row["total_loss"] == pytest.approx(Single().double()(images()[0]).item())


def test_state_goes_from_and_to_detectron2s_trainer():
    model = Model().double()
    ours = step_trainer(model, list(images()))
    theirs = SimpleTrainer(copy.deepcopy(model), list(images()), optimizer(model))
    train(ours, STEPS)
    state = ours.state_dict()
    assert set(state) - set(theirs.state_dict()) == {"skipped_steps"}
    theirs.load_state_dict(state)
    ours.load_state_dict(theirs.state_dict())
    assert ours.iter == STEPS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mixed_precision_on_a_gpu_scales_gradients_and_keeps_the_scale():
    model, types = Model().cuda(), set()
    model.layers[0].register_forward_hook(lambda m, i, out: types.add(out.dtype))
    loader = list(parts(images().float().cuda(), 2))
    options = {"passes": 2, "mixed_precision": True, "device": "cuda"}
    trainer = step_trainer(model, loader, **options)
    train(trainer, STEPS)
    assert types == {torch.float16}
    assert all(p.grad.isfinite().all() for p in model.parameters())
    state = trainer.state_dict()
    assert state["grad_scaler"]["scale"] > 1
    trainer.load_state_dict(state)


@pytest.mark.parametrize("fused", [False, True])
def test_hooks_and_gradient_clipping_see_gradients_without_the_scale(fused):
    """As on a GPU, with the scaler that torch has for the CPU."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-2
    seen = []
    for scale in (None, 1024.0):
        model = Model()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        trainer = StepTrainer(
            Backpropagation(model), list(images().float()), maybe_add_gradient_clipping(cfg, sgd)
        )
        if scale is not None:
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        gradients = []
        trainer.after_backward = lambda m=model, g=gradients: g.extend(
            p.grad.clone() for p in m.parameters()
        )
        train(trainer, STEPS)
        seen.append([*gradients, *model.parameters()])
    assert max(g.abs().max() for g in seen[0]) > 1e-2
    for unscaled, scaled in zip(*seen, strict=True):
        torch.testing.assert_close(scaled, unscaled)


def test_a_step_with_an_overflow_is_left_out_and_the_next_begins_the_momentum():
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.1])
    batch = images()[1].float()
    trained = []
    for factors in ([math.inf, 1.0], [1.0]):
        model = Model("brsf")
        gradient = iter(factors)
        model.layers[0].weight.register_hook(lambda g, factor=gradient: g * next(factor))
        trainer = StepTrainer(Backpropagation(model), [batch] * 2, build_optimizer(cfg, model))
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.optimizer._step_supports_amp_scaling = False
        train(trainer, len(factors))
        buffers = [s["momentum_buffer"] for s in trainer.optimizer.state.values()]
        assert len(buffers) == len(list(model.parameters()))
        trained.append([*model.parameters(), *buffers])
    for left_out, fresh in zip(*trained, strict=True):
        torch.testing.assert_close(left_out, fresh)


# Two processes


def _worker(rank: int, folder: str, rule: str, passes: int) -> None:
    wrapped = DistributedDataParallel(Backpropagation(Model(rule).double()))
    reductions = 0

    def count(state, bucket):
        nonlocal reductions
        reductions += 1
        return default_hooks.allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, count)
    mine = images().chunk(2, dim=1)[rank]
    trainer = StepTrainer(wrapped, list(parts(mine, passes)), optimizer(wrapped), passes=passes)
    losses = train(trainer, STEPS)
    if rank == 0:
        result = {"model": trainer.model.state_dict(), "losses": losses, "reductions": reductions}
        torch.save(result, f"{folder}/result.pth")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_as_one_and_exchange_gradients_once_a_step(tmp_path):
    expected, expected_losses = stock("kp")
    run_ranks(_worker, tmp_path, "kp", 2)
    result = torch.load(tmp_path / "result.pth", weights_only=True)
    torch.testing.assert_close(result["model"], expected.state_dict(), rtol=1e-9, atol=1e-12)
    for row, other in zip(result["losses"], expected_losses, strict=True):
        assert row == pytest.approx(other)
    # Small as the model is, DistributedDataParallel sends it in one bucket, at first in two.
    assert STEPS <= result["reductions"] <= STEPS + 1
