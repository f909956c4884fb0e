"""Rules that learn their feedback weight by an update of their own: where they come to rest."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from core_utils import assert_same
from torch import nn

from ss_detectron import advance_feedback, convert_feedback, feedback_report, weight_alignment
from ss_detectron.layers import asymmetric
from ss_detectron.layers.feedback import InformationAlignment, WeightMirror
from ss_detectron.learners import Backpropagation

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "tokens": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), padding=1, dilation=2), (3, 3, 7, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 3, 7, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), (2, 4, 4, 5)),
}


class Fast(WeightMirror):
    name = "fast_mirror"
    short_name = ""
    rate, samples = 0.01, 2000


def _layer(kind, rule, **options):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = convert_feedback(make().double(), rule, **options)
    return layer, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_mirror_becomes_gain_times_the_weight(kind):
    layer, x = _layer(kind, Fast, gain=0.5)
    if x.dim() == 4:
        layer.to(memory_format=torch.channels_last)
    for _ in range(600):
        advance_feedback(layer)
    assert weight_alignment(layer)[""].angle < 5
    torch.testing.assert_close(layer.feedback_weight, 0.5 * layer.weight, rtol=0, atol=0.05)
    assert not layer.feedback_weight.requires_grad


def test_weight_mirrors_of_a_linear_network_come_within_five_degrees():
    torch.manual_seed(0)
    model = convert_feedback(nn.Sequential(nn.Linear(20, 15), nn.Linear(15, 10)), WeightMirror)
    assert all(80 < found.angle < 100 for found in weight_alignment(model).values())
    for _ in range(3000):
        advance_feedback(model)
    assert all(found.angle < 5 for found in weight_alignment(model).values())


def _information(layer, x, b):
    """The slope of its function of B, by hand and by autograd."""
    rule, x = layer.rule, x / x.square().mean().sqrt()
    b = b.detach().requires_grad_()
    x = x.requires_grad_()
    y, back = layer.linear_map(x, layer.weight.detach()).detach(), layer.linear_map(x, b)
    (down,) = torch.autograd.grad(back, x, y, create_graph=True)
    outputs = layer.as_matrix(layer.weight).shape[-2]
    energy = -rule.alpha * rule.gain * (back * y).sum() + rule.gamma / 2 * down.square().sum()
    energy = energy * outputs / y.numel() + rule.beta / 2 * b.square().sum()
    return torch.autograd.grad(energy, b)[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_information_alignment_descends_its_function(kind):
    layer, x = _layer(kind, InformationAlignment, gain=0.5)
    before = layer.feedback_weight.clone()
    slope = _information(layer, x, before)
    curvature = (_information(layer, x, before + slope) - slope).flatten() @ slope.flatten()
    curvature /= slope.square().sum()
    layer(x)
    layer(x[:0])  # counts for nothing
    advance_feedback(layer)
    rate = InformationAlignment.rate
    expected = before - rate / (1 + rate * curvature) * slope
    torch.testing.assert_close(layer.feedback_weight, expected, rtol=0, atol=1e-12)
    advance_feedback(layer)  # without a forward pass before it
    layer(x[:0])
    advance_feedback(layer)
    layer(input=math.inf * x)
    advance_feedback(layer)
    torch.testing.assert_close(layer.feedback_weight, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(512, 512), (8, 512)),
        (lambda: nn.Conv2d(32, 32, 3, padding=2, padding_mode="replicate"), (2, 32, 6, 6)),
    ],
)
def test_information_alignment_never_gets_out_of_hand(make, shape):
    torch.manual_seed(0)
    layer = make()
    nn.init.normal_(layer.weight)  # a step of rate times the slope would be too large
    convert_feedback(layer, "ia")
    for _ in range(20):
        layer(torch.randn(shape).relu())
        advance_feedback(layer)
    assert weight_alignment(layer)[""].norm_ratio < 1


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.1), (0.1, 1.0)])
def test_information_alignment_of_a_linear_network_comes_to_its_fixed_point(beta, gamma):
    rule = type("Own", (InformationAlignment,), {"name": "own_ia", "beta": beta, "gamma": gamma})
    rule.short_name, rule.rate = "", 0.1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)).double()
    convert_feedback(model, rule)
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    for _ in range(1500):
        model(x)
        advance_feedback(model)
    for layer in model:
        s = x.t() @ x / len(x) / x.square().mean()
        w = layer.weight.detach()
        inverse = torch.linalg.inv(beta * torch.eye(len(w), dtype=w.dtype) + gamma * w @ s @ w.t())
        fixed = (s @ w.t() @ inverse).t()
        assert (layer.feedback_weight - fixed).norm() < 0.01 * fixed.norm()
        x = x @ w.t()


@pytest.mark.parametrize("rule", [WeightMirror, InformationAlignment])
def test_updates_follow_from_seed_and_number_and_are_resumed(rule):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
        learner = Backpropagation(convert_feedback(model, rule))
        return learner, torch.optim.SGD(learner.parameter_groups(), lr=0.1)

    def run(learner, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            x = torch.randn(5, 2, 4, 4)
            learner.backward(F.cross_entropy(learner(x), torch.arange(5) % 4))
            optimizer.step()
            learner.step()

    learner, optimizer = make()
    start = copy.deepcopy(learner.model.state_dict())
    run(learner, optimizer, range(4))
    assert not torch.equal(start["0.feedback_weight"], learner.model[0].feedback_weight)
    first, its_optimizer = make()
    run(first, its_optimizer, range(2))
    second, optimizer = make()
    second.model.load_state_dict(first.model.state_dict())
    run(second, optimizer, range(2, 4))
    assert_same(second.model.state_dict(), learner.model.state_dict())
    assert int(second.model.state_dict()["0.feedback_updates"]) == 4
    assert all("feedback" not in n for n, _ in learner.model.named_parameters())


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_another_rule_takes_what_a_mirror_has_learned(rule):
    mirror = convert_feedback(nn.Linear(3, 3), "wm")
    advance_feedback(mirror)
    other = convert_feedback(nn.Linear(3, 3), rule)
    other.load_state_dict(mirror.state_dict())
    assert_same(other.feedback_weight.detach(), mirror.feedback_weight)


def test_inputs_are_kept_for_a_while_and_are_in_no_copy(caplog):
    asymmetric._warn_of_no_updates.cache_clear()
    layer = convert_feedback(nn.Linear(3, 3), "ia")
    for _ in range(18):
        layer(torch.ones(2, 3))
    assert len(vars(layer)["_feedback_inputs"]) == 16
    (warning,) = caplog.messages
    assert "no update was noted in 16 forward passes" in warning
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert vars(made)["_feedback_inputs"] == []
        made(torch.ones(2, 3))
        assert len(vars(made)["_feedback_inputs"]) == 1
        convert_feedback(made, "bp")
        assert not made._forward_pre_hooks
    assert len(vars(layer)["_feedback_inputs"]) == 16


def test_going_back_leaves_no_hook_and_attention_is_told_to_have_no_linear_map():
    model = convert_feedback(nn.Linear(3, 3), "ia")
    model(torch.ones(2, 3))
    convert_feedback(model, "bp")
    assert not model._forward_pre_hooks and type(model) is nn.Linear
    assert not [name for name in vars(model) if "feedback" in name and name != "feedback_reason"]
    attention = nn.MultiheadAttention(4, 2)
    report = feedback_report(convert_feedback(attention, "ia"))
    assert "information_alignment needs a linear map of MultiheadAttention" in report[0].reason
    assert math.isclose(weight_alignment(attention)["out_proj"].norm_ratio, 1, abs_tol=0.9)
