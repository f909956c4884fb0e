"""The alignment hook: it changes nothing of a training, and logs what the instruments give."""

import copy
import json
import math

import pytest
import step_utils
import torch
import torch.distributed as dist
from core_utils import assert_same, each_rule, images, loss_of, net
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from group_utils import run_ranks
from modeling_utils import NARROW, load_config, losses, make_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ss_detectron import convert_feedback
from ss_detectron.alignment import backpropagation_gradients, gradient_angles, weight_alignment
from ss_detectron.engine import AlignmentHook
from ss_detectron.engine.train_loop import StepTrainer
from ss_detectron.learners import Backpropagation


@pytest.mark.parametrize("rule", ["bp", "ss", "fa"])
def test_retinanet_whose_head_runs_five_times(rule):
    options = [*NARROW, "MODEL.FEEDBACK.RULE", rule]
    torch.manual_seed(0)
    model = build_model(load_config("quick/shapes_retinanet_bp.yaml", *options))
    stock = copy.deepcopy(model)
    convert_feedback(stock, "bp")
    total = sum(losses(model, make_batch()).values())
    normalizer = model.loss_normalizer
    reference = backpropagation_gradients(model, total)
    assert model.loss_normalizer == normalizer
    sum(losses(stock, make_batch()).values()).backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(reference[name], parameter.grad, rtol=1e-3, atol=1e-5)
    total.backward()
    angles = gradient_angles(model, reference)
    assert angles.per_layer["head.cls_score"] < 0.1
    assert (angles.total < 0.1) == (rule == "bp")
    assert (angles.per_layer["head.cls_subnet.0"] < 0.1) == (rule == "bp")


class Losses(nn.Module):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.net = net(rule)

    def forward(self, batch):
        return {"loss": loss_of(self.net, batch), "other": self.net(batch).mean()}


class Run(step_utils.Run):
    linked = True

    def __init__(self, rule="ss", period=0, model=None, batches=None, **options):
        model = model or Losses(rule)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
        batches = batches or [images() * (i + 1) / 4 for i in range(8)]
        if options:
            trainer = StepTrainer(Backpropagation(model), batches, self.optimizer, **options)
        else:
            trainer = SimpleTrainer(model, batches, self.optimizer)
        super().__init__(trainer, [AlignmentHook(period)] if period else [])
        self.rows = {}

    def after_step(self):
        super().after_step()
        for name, (value, iteration) in self.storage.latest().items():
            if name.startswith("alignment/") and iteration == self.iter:
                self.rows.setdefault(iteration, {})[name] = value

    def go(self, steps: int = 4) -> "Run":
        if self.linked:  # as this package's trainer is; Detectron2's is not
            self._trainer.after_backward = self.after_backward
        torch.manual_seed(7)
        self.train(0, steps)
        self.random_state = torch.get_rng_state()
        return self


@each_rule
@pytest.mark.parametrize("options", [{}, {"passes": 2}, {"mixed_precision": True}], ids=str)
def test_training_is_the_same_bit_for_bit_with_and_without(rule, options):
    plain = Run(rule, **options).go()
    measured = Run(rule, period=2, **options).go()
    assert_same(measured.model.state_dict(), plain.model.state_dict())
    assert_same(measured.optimizer.state_dict(), plain.optimizer.state_dict())
    assert_same(measured.random_state, plain.random_state)


def test_what_is_logged_and_when():
    run = Run("fa", period=3).go(7)
    assert list(run.rows) == [0, 2, 5]
    layers = ["net.0", "net.3", "net.7"]
    kinds = ["gradient_angle", "weight_angle", "norm_ratio", "sign_agreement"]
    names = [f"alignment/{kind}/{layer}" for kind in kinds for layer in layers]
    for row in run.rows.values():
        assert set(row) == {"alignment/gradient_angle", *names}
        assert all(math.isfinite(value) for value in row.values())
    assert 85 < run.rows[0]["alignment/weight_angle/net.3"] < 95


@pytest.mark.parametrize("passes", [1, 2])
def test_angles_are_of_all_passes_and_of_the_weights_that_the_step_began_with(passes):
    run = Run("ss", period=1, passes=passes).go(1)
    model, reference = Losses("ss"), {}
    torch.manual_seed(7)
    for i in range(passes):
        loss = sum(model(images() * (i + 1) / 4).values())
        for name, gradient in backpropagation_gradients(model, loss).items():
            reference[name] = reference.get(name, 0) + gradient
        loss.backward()
    angles = gradient_angles(model, reference)
    expected = {f"gradient_angle/{name}": angle for name, angle in angles.per_layer.items()}
    expected["gradient_angle"] = angles.total
    for name, found in weight_alignment(model).items():
        expected[f"weight_angle/{name}"] = found.angle
    for name, angle in expected.items():
        assert run.rows[0][f"alignment/{name}"] == pytest.approx(angle, abs=1e-4)


def test_detectron2s_default_trainer_is_measured_as_well(monkeypatch):
    linked = Run("brsf", period=1).go(3)
    monkeypatch.setattr(Run, "linked", False)
    assert Run("brsf", period=1).go(3).rows == linked.rows


def test_period_has_to_be_positive():
    with pytest.raises(ValueError, match="alignment period is 0"):
        AlignmentHook(0)


# Two processes


def _worker(rank: int, folder: str) -> None:
    model = DistributedDataParallel(Double())
    run = Run(period=1, model=model, batches=[Double.batch()[rank::2]]).go(1)
    assert bool(run.rows) == (rank == 0)
    if rank == 0:
        with open(f"{folder}/row.json", "w") as file:
            json.dump(run.rows[0], file)


class Double(nn.Module):
    """In double precision and without batch statistics, so that two halves are one whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
        self.net = convert_feedback(nn.Sequential(*layers).double(), "fa")

    def forward(self, batch):
        return {"loss": self.net(batch).square().mean()}

    @staticmethod
    def batch() -> torch.Tensor:
        return torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_measure_what_one_does(tmp_path):
    run_ranks(_worker, tmp_path)
    row = json.loads((tmp_path / "row.json").read_text())
    model = Double()
    loss = model(Double.batch())["loss"]
    reference = backpropagation_gradients(model, loss)
    loss.backward()
    for name, angle in gradient_angles(model, reference).per_layer.items():
        assert row[f"alignment/gradient_angle/{name}"] == pytest.approx(angle, abs=1e-5)
        assert (angle < 1e-4) == (name == "net.4")
