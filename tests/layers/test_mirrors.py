"""Rules that learn their feedback weight by an update of their own: where they come to rest."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from core_utils import FromInputs, assert_same
from torch import nn

from ss_detectron import (
    advance_feedback,
    convert_feedback,
    feedback_report,
    mirror_feedback,
    weight_alignment,
)
from ss_detectron.layers import LocallyConnected2d, asymmetric, feedback
from ss_detectron.layers.feedback import (
    FeedbackAlignment,
    InformationAlignment,
    WeightMirror,
)
from ss_detectron.learners import Backpropagation
from ss_detectron.solver import fold_kolen_pollack, match_feedback_groups

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "tokens": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), padding=1, dilation=2), (3, 3, 7, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 3, 7, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 4, 5)),
    "local": (lambda: LocallyConnected2d(2, 3, 3, 4), (3, 2, 4, 4)),
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


@pytest.mark.parametrize("rule", ["fa", "kp", "wm", "ia"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_phase_of_mirroring_shows_the_weight_to_random_feedback(kind, rule):
    layer, x = _layer(kind, rule, gain=0.5)
    if x.dim() == 4:
        layer.to(memory_format=torch.channels_last)
    assert mirror_feedback(layer, samples=3000) == 1
    torch.testing.assert_close(layer.feedback_weight, 0.5 * layer.weight, rtol=0, atol=0.05)
    assert layer.feedback_weight.requires_grad == (rule == "kp")


@pytest.mark.parametrize("samples", [1, 10, 100])
def test_how_far_mirrored_feedback_is_from_the_weight(samples):
    # Of the mean of x x^T over T inputs, the squared error is (inputs + 1) / T.
    torch.manual_seed(0)
    layer = convert_feedback(nn.Linear(200, 300), "fa", seed=1)
    mirror_feedback(layer, samples)
    expected = math.degrees(math.atan(math.sqrt(201 / 200 / samples)))
    assert weight_alignment(layer)[""].angle == pytest.approx(expected, rel=0.03)
    state = torch.get_rng_state()
    for seed in (1, 2):
        other = convert_feedback(copy.deepcopy(layer), "fa", seed=seed)
        with torch.device("meta"):
            mirror_feedback(other, samples)
        assert torch.equal(other.feedback_weight, layer.feedback_weight) == (seed == 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_mirrored_feedback_is_distributed_as_a_mean_over_noise():
    # At as many vectors as inputs, where the smallest eigenvalues of x x^T tell most.
    drawn, summed = [], []
    generator = torch.Generator().manual_seed(0)
    for seed in range(2000):
        rule = FeedbackAlignment(seed=seed)
        drawn.append(rule.mirrored(torch.eye(3, dtype=torch.float64), 1))
        x = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        summed.append(x @ x.t() / 3)
    for moment in (
        lambda s: s,
        lambda s: s @ s,
        lambda s: s @ s @ s,
        lambda s: torch.linalg.eigvalsh(s).log(),
    ):
        a, b = (moment(torch.stack(values)) for values in (drawn, summed))
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()


@pytest.mark.parametrize("folded", [False, True])
def test_kolen_pollack_keeps_what_mirroring_gave(folded):
    layer, x = _layer("conv2d", "kp")
    groups = match_feedback_groups([{"params": layer.parameters()}], layer)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    if folded:
        fold_kolen_pollack(layer, optimizer)
    mirror_feedback(layer)
    missed = layer.current_feedback() - layer.weight.detach()
    assert 0.05 < missed.norm() / layer.weight.norm() < 1
    before = layer.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer.current_feedback() - layer.weight, missed)


def test_mirroring_is_for_random_feedback_and_some_noise():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 0, 1), nn.Linear(0, 3))
    for rule, layers in (("ss", 0), ("fasi", 0), ("wm", 3)):
        assert mirror_feedback(convert_feedback(model, rule)) == layers
    for samples in (0, -1, 2.5, math.inf):
        with pytest.raises(ValueError, match=f"samples is {samples}; it must be a whole number"):
            mirror_feedback(model, samples)


def test_weight_mirrors_of_a_linear_network_come_within_five_degrees():
    torch.manual_seed(0)
    model = convert_feedback(nn.Sequential(nn.Linear(20, 15), nn.Linear(15, 10)), WeightMirror)
    assert all(80 < found.angle < 100 for found in weight_alignment(model).values())
    for _ in range(3000):
        advance_feedback(model)
    assert all(found.angle < 5 for found in weight_alignment(model).values())


def _from_inputs(layer, x, b):
    """The slope of information alignment's function of B."""
    rule, x = layer.rule, x / x.square().mean().sqrt()
    b = b.detach().requires_grad_()
    x = x.requires_grad_()
    y, back = layer.linear_map(x, layer.weight.detach()).detach(), layer.linear_map(x, b)
    (down,) = torch.autograd.grad(back, x, y, create_graph=True)
    outputs = layer.weight.numel() / layer.as_matrix(layer.weight).shape[-1]
    energy = -rule.alpha * rule.gain * (back * y).sum() + rule.gamma / 2 * down.square().sum()
    energy = energy * outputs / y.numel() + rule.beta / 2 * b.square().sum()
    return torch.autograd.grad(energy, b)[0]


def _from_noise(layer, x, b):
    """The same, of noise."""
    rule, w = layer.rule, layer.as_matrix(layer.weight.detach())
    x = rule.noise(w, 1)
    b = b.detach().requires_grad_()
    down = layer.as_matrix(b).mT @ (w @ x)
    energy = (rule.gamma / 2 * down - rule.alpha * rule.gain * x) * down
    energy = energy.sum() / rule.samples + rule.beta / 2 * b.square().sum()
    return torch.autograd.grad(energy, b)[0]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("rule", "slope_of"), [(InformationAlignment, _from_noise), (FromInputs, _from_inputs)]
)
def test_information_alignment_descends_its_function(kind, rule, slope_of):
    layer, x = _layer(kind, rule, gain=0.5)
    before = layer.feedback_weight.clone()
    slope = slope_of(layer, x, before)
    curvature = (slope_of(layer, x, before + slope) - slope).flatten() @ slope.flatten()
    curvature /= slope.square().sum()
    layer(x)
    layer(x[:0])  # counts for nothing
    advance_feedback(layer)
    expected = before - rule.rate / (1 + rule.rate * curvature) * slope
    torch.testing.assert_close(layer.feedback_weight, expected, rtol=0, atol=1e-12)


def test_a_step_that_is_not_finite_is_not_made_and_warned_of_once(caplog):
    feedback._warn_of_no_step.cache_clear()
    layer = convert_feedback(nn.Sequential(nn.Linear(3, 2)), FromInputs)[0]
    before = layer.feedback_weight.clone()
    advance_feedback(layer)  # without a forward pass before it
    layer(torch.ones(0, 3))
    advance_feedback(layer)
    assert not caplog.messages
    for _ in range(2):
        layer(input=torch.full((1, 3), math.inf))
        advance_feedback(layer)
    assert_same(layer.feedback_weight, before)
    (warning,) = caplog.messages
    assert warning.startswith("0: the weight or what the layer takes in is not finite")


@pytest.mark.parametrize("rule", ["ia", FromInputs])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(512, 512), (8, 512)),
        (lambda: nn.Conv2d(32, 32, 3, padding=2, padding_mode="replicate"), (2, 32, 6, 6)),
    ],
)
def test_information_alignment_never_gets_out_of_hand(make, shape, rule):
    torch.manual_seed(0)
    layer = make()
    nn.init.normal_(layer.weight)  # a step of rate times the slope would be too large
    convert_feedback(layer, rule)
    for _ in range(20):
        layer(torch.randn(shape).relu())
        advance_feedback(layer)
    assert weight_alignment(layer)[""].norm_ratio < 1


@pytest.mark.parametrize(
    ("beta", "gamma", "needs_inputs", "steps"),
    [(1.0, 0.1, True, 300), (0.1, 1.0, True, 1500), (1.0, 0.1, False, 100)],
)
def test_information_alignment_of_a_linear_network_comes_to_its_fixed_point(
    beta, gamma, needs_inputs, steps
):
    rule = type("Own", (FromInputs,), {"name": "own_ia", "beta": beta, "gamma": gamma})
    rule.needs_inputs, rule.samples = needs_inputs, 10_000
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)).double()
    convert_feedback(model, rule)
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    for _ in range(steps):
        model(x)
        advance_feedback(model)
    for layer in model:
        s = x.t() @ x / len(x) / x.square().mean()
        s = s if needs_inputs else torch.eye(len(s), dtype=s.dtype)
        w = layer.weight.detach()
        inverse = torch.linalg.inv(beta * torch.eye(len(w), dtype=w.dtype) + gamma * w @ s @ w.t())
        fixed = (s @ w.t() @ inverse).t()
        assert (layer.feedback_weight - fixed).norm() < 0.01 * fixed.norm()
        x = x @ w.t()


@pytest.mark.parametrize("rule", [WeightMirror, InformationAlignment, FromInputs])
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
    layer = convert_feedback(nn.Linear(3, 3), FromInputs)
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
    model = convert_feedback(nn.Linear(3, 3), FromInputs)
    model(torch.ones(2, 3))
    convert_feedback(model, "bp")
    assert not model._forward_pre_hooks and type(model) is nn.Linear
    assert not [name for name in vars(model) if "feedback" in name and name != "feedback_reason"]
    attention = nn.MultiheadAttention(4, 2)
    report = feedback_report(convert_feedback(attention, FromInputs))
    assert "from_inputs needs a linear map of MultiheadAttention" in report[0].reason
    assert math.isclose(weight_alignment(attention)["out_proj"].norm_ratio, 1, abs_tol=0.9)
