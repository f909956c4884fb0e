"""Compiled training against eager training, every rule."""

import copy
import shutil

import pytest
import torch
from core_utils import Flipping, assert_same, each_rule
from torch import nn

from ss_detectron import FEEDBACK_REGISTRY
from ss_detectron.layers import advance_feedback, backpropagation, convert_feedback

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class Net(nn.Module):
    """A layer of each kind, one of them called twice, as RetinaNet's head is."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.shared = nn.Conv2d(3, 3, 2, padding="same")
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.score = nn.Linear(2, 3)

    def forward(self, x):
        x = self.shared(self.shared(self.stem(x).relu()).relu())
        return self.score(self.up(x).relu().flatten(2).transpose(1, 2))


def _train(model, step, steps=3):
    """Every gradient and all feedback, after each of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = []
    for i in range(steps):
        optimizer.zero_grad()
        x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(i)).requires_grad_()
        step(x).square().mean().backward()
        seen += [x.grad, *(p.grad.clone() for p in model.parameters())]
        seen += [b.clone() for b in model.buffers()]
        optimizer.step()
        advance_feedback(model)
    return seen


def _model(rule):
    torch.manual_seed(0)
    return convert_feedback(Net(), rule)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@each_rule
def test_compiled_training_is_eager_training(rule):
    eager = _model(rule)
    compiled = copy.deepcopy(eager)
    expected = _train(eager, eager)
    actual = _train(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    assert_same(actual, expected)
    # Compilation changes no state-dict key and what was drawn goes on.
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert_same(_train(compiled, compiled), _train(eager, eager))


def test_convolutions_of_one_and_three_dimensions_are_compiled():
    torch.manual_seed(0)
    eager = nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(2, 3, 2, padding="same"),
        nn.ConvTranspose1d(3, 2, 3),
        nn.Unflatten(2, (3, 2, 3)),
        nn.Conv3d(2, 3, 2, padding=1),
        nn.ConvTranspose3d(3, 1, (1, 2, 1), stride=2),
    )
    compiled = copy.deepcopy(convert_feedback(eager, "ss"))
    expected = _train(eager, eager)
    actual = _train(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    assert_same(actual, expected)


def test_a_rule_of_ones_own_that_counts_updates_is_compiled_once_registered(monkeypatch):
    torch.manual_seed(0)
    eager = convert_feedback(Net(), Flipping)
    compiled = copy.deepcopy(eager)
    with pytest.raises(Exception, match="unknown feedback rule 'flipping'"):
        _train(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    monkeypatch.setitem(FEEDBACK_REGISTRY._classes, "flipping", Flipping)
    torch._dynamo.reset()
    compiled = copy.deepcopy(eager)
    expected = _train(eager, eager)
    actual = _train(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    assert_same(actual, expected)


def test_a_change_of_rule_is_noticed_by_a_compiled_model():
    model = _model("ss")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def gradient(step):
        x = torch.ones(1, 2, 4, 4, requires_grad=True)
        step(x).square().mean().backward()
        return x.grad

    through_signs = gradient(compiled)
    assert torch.equal(through_signs, gradient(model))
    with backpropagation(model):
        assert torch.equal(gradient(compiled), gradient(model))
        assert not torch.equal(gradient(compiled), through_signs)
    assert torch.equal(gradient(compiled), through_signs)
    convert_feedback(model, "fa")
    assert torch.equal(gradient(compiled), gradient(model))
    convert_feedback(model, "bp")
    assert torch.equal(gradient(compiled), gradient(model))


def test_a_layer_compiled_in_place_may_be_converted_afterwards():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model.compile(fullgraph=True, backend="aot_eager")
    x = torch.ones(1, 3, requires_grad=True)
    model(x).sum().backward()
    x.grad = None
    convert_feedback(model)
    model(x).sum().backward()
    b0, b1 = (layer.current_feedback() for layer in model)
    torch.testing.assert_close(x.grad, torch.ones(1, 2) @ b1 @ b0)


def test_a_compiled_model_refuses_the_second_derivative():
    model = torch.compile(_model("ss"), fullgraph=True, backend="aot_eager")
    x = torch.ones(1, 2, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="aot_autograd|double backward|second derivative"):
        gradient = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)[0]
        gradient.sum().backward()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_agrees():
    torch.manual_seed(0)
    eager = convert_feedback(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Linear(2, 2)), "ss")
    convert_feedback(eager[2], "brsf")
    compiled = copy.deepcopy(eager)
    expected = _train(eager, eager)
    actual = _train(compiled, torch.compile(compiled, fullgraph=True))
    torch.testing.assert_close(actual, expected)
