"""The rules in closed form: what B is, what is drawn and when, and what changes it."""

import copy
import itertools
import math

import pytest
import torch
from core_utils import Flipping, assert_same, each_feedback_rule, each_rule
from torch import nn

from ss_detectron.layers import (
    FEEDBACK_REGISTRY,
    FEEDBACK_SCALES,
    AsymmetricConv1d,
    AsymmetricConv2d,
    AsymmetricConv3d,
    AsymmetricConvTranspose2d,
    AsymmetricLinear,
    Fans,
    FeedbackRule,
    advance_feedback,
    backpropagation,
    convert_feedback,
    feedback_report,
    get_rule,
)

DRAWN = ["frsf", "brsf", "fa", "kp"]
# How a layer is made, its fans, and the shape of an input.
LAYERS = {
    "conv": (
        lambda **o: AsymmetricConv2d(4, 6, (3, 2), **o),
        Fans(4 * 6, 6 * 6, False),
        (2, 4, 5, 5),
    ),
    "grouped-conv": (
        lambda **o: AsymmetricConv2d(4, 6, 3, groups=2, bias=False, **o),
        Fans(2 * 9, 6 * 9, False),
        (2, 4, 5, 5),
    ),
    "conv1d": (lambda **o: AsymmetricConv1d(4, 6, 5, **o), Fans(4 * 5, 6 * 5, False), (2, 4, 7)),
    "conv3d": (
        lambda **o: AsymmetricConv3d(4, 6, (1, 2, 3), **o),
        Fans(4 * 6, 6 * 6, False),
        (2, 4, 2, 3, 3),
    ),
    "transposed": (
        lambda **o: AsymmetricConvTranspose2d(4, 6, 2, stride=2, **o),
        Fans(4 * 4, 6 * 4, False),
        (2, 4, 3, 3),
    ),
    "linear": (lambda **o: AsymmetricLinear(5, 3, **o), Fans(5, 3, True), (2, 5)),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_scale = pytest.mark.parametrize("scale", FEEDBACK_SCALES)


def _layer(kind, rule, **options):
    torch.manual_seed(0)
    layer = LAYERS[kind][0](rule=rule, **options)
    layer.example = torch.randn(LAYERS[kind][2])
    return layer


def _magnitude(scale, weight, fans):
    return {
        "mean_abs": weight.abs().sum().item() / weight.numel(),
        "rms": weight.square().mean().sqrt().item(),
        "kaiming": fans.fan_in**-0.5 if fans.is_linear else (2 / fans.fan_out) ** 0.5,
        "xavier": (2 / (fans.fan_in + fans.fan_out)) ** 0.5,
    }[scale]


def _step(layer, optimizer, calls=1):
    optimizer.zero_grad()
    x = layer.example.clone().requires_grad_()
    sum(layer(x * (i + 1)).square().sum() for i in range(calls)).backward()
    optimizer.step()
    advance_feedback(layer)


def _sgd(layer, **options):
    return torch.optim.SGD(layer.parameters(), **{"lr": 1e-3, **options})


@pytest.mark.parametrize("name, rule", FEEDBACK_REGISTRY)
def test_a_rule_is_found_by_name_short_name_and_class(name, rule):
    assert get_rule(name) is get_rule(rule.short_name) is get_rule(rule) is rule
    assert name in FEEDBACK_REGISTRY and rule.short_name in FEEDBACK_REGISTRY


@pytest.mark.parametrize("gain", [1, 0.5])
@pytest.mark.parametrize("rule", ["ss", "fasi"])
@each_scale
@each_layer
def test_signs_in_closed_form_of_the_weight_now_or_at_the_start(kind, scale, rule, gain):
    layer = _layer(kind, rule, scale=scale, gain=gain)
    first = layer.weight.detach().clone()
    for weight in (first, 3 * torch.randn_like(first)):
        with torch.no_grad():
            layer.weight.copy_(weight)
        origin = weight if rule == "ss" else first
        expected = gain * _magnitude(scale, origin, LAYERS[kind][1]) * origin.sign()
        torch.testing.assert_close(layer.current_feedback(), expected)


@each_layer
def test_weights_of_zero_get_no_feedback(kind):
    for rule in ("ss", "frsf", "brsf"):
        layer = _layer(kind, rule)
        with torch.no_grad():
            layer.weight[0] = 0
        assert torch.equal(layer.current_feedback() == 0, layer.weight == 0)
    nothing = _layer(kind, "ss")
    nn.init.zeros_(nothing.weight)
    assert torch.equal(nothing.current_feedback(), torch.zeros_like(nothing.weight))


@pytest.mark.parametrize("gain", [1, 2.5])
@each_scale
@pytest.mark.parametrize("rule", DRAWN)
@pytest.mark.parametrize(
    "kind, sizes",
    [
        (AsymmetricConv2d, (50, 60, 3)),
        (AsymmetricConvTranspose2d, (50, 60, 3)),
        (AsymmetricLinear, (200, 150)),
    ],
)
def test_drawn_feedback_has_the_magnitude_of_the_scale(kind, sizes, rule, scale, gain):
    torch.manual_seed(0)
    layer = kind(*sizes, rule=rule, scale=scale, gain=gain)
    s = gain * _magnitude(scale, layer.weight, layer.fans())
    is_linear = kind is AsymmetricLinear
    state = layer.current_feedback()
    if rule in ("frsf", "brsf"):
        assert torch.equal(state.sign(), layer.weight.detach().sign())
        state = state.abs()
    uniform_bound = {"kaiming": s if is_linear else None, "xavier": s * math.sqrt(3)}.get(scale)
    if rule in ("fa", "kp"):
        assert state.mean().abs() < 0.03 * s  # five standard errors
    if uniform_bound is None:
        # Half-normal: E abs(M) = s sqrt(2 / pi), E M^2 = s^2.
        assert state.abs().mean().item() == pytest.approx(s * math.sqrt(2 / math.pi), rel=0.03)
        assert state.square().mean().sqrt().item() == pytest.approx(s, rel=0.03)
        assert state.abs().max() > 3 * s
    else:
        assert state.abs().mean().item() == pytest.approx(uniform_bound / 2, rel=0.03)
        assert 0.99 * uniform_bound < state.abs().max() <= uniform_bound * (1 + 1e-6)


@pytest.mark.parametrize("rule", ["frsf", "fa", "fasi"])
@each_layer
def test_what_is_fixed_stays_fixed_in_training(kind, rule):
    layer = _layer(kind, rule)
    fixed, signs = layer.feedback_state.clone(), layer.weight.sign()
    optimizer = _sgd(layer, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        _step(layer, optimizer)
        expected = fixed * layer.weight.detach().sign() if rule == "frsf" else fixed
        assert torch.equal(layer.current_feedback(), expected)
    assert not torch.equal(signs, layer.weight.sign())
    assert not layer.feedback_state.requires_grad


@pytest.mark.parametrize("rule", ["fa", "brsf"])
def test_a_default_device_changes_nothing(rule):
    rule = get_rule(rule)("kaiming", seed=12345)
    weight, fans = torch.ones(3, 5), Fans(5, 3, False)

    def drawn():
        if rule.counts_updates:
            return rule.feedback(weight, 1, fans)
        return rule.draw(weight, fans)

    with torch.device("meta"):
        first = drawn()
    assert torch.equal(first, drawn())


def test_a_rule_that_counts_updates_says_that_nobody_counts(caplog):
    layer = convert_feedback(nn.Sequential(nn.Linear(3, 2)), "brsf")
    with caplog.at_level("WARNING"):
        for _ in range(1000):
            assert not caplog.records
            layer(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert "advance_feedback" in caplog.text


# Batchwise random magnitude.


@pytest.mark.parametrize("calls", [1, 3])
@each_layer
def test_batchwise_magnitude_is_new_after_each_update_and_only_then(kind, calls):
    # A scale that does not change with the weight: abs(B) is then the magnitude drawn.
    layer = _layer(kind, "brsf", scale="kaiming")
    optimizer = _sgd(layer)
    seen = [layer.current_feedback().abs()]
    for _ in range(3):
        for _ in range(2):  # gradients accumulate: no update in between
            for _ in range(calls):
                layer(layer.example).sum().backward()
            assert torch.equal(layer.current_feedback().abs(), seen[-1])
        optimizer.step()
        advance_feedback(layer)
        magnitude = layer.current_feedback().abs()
        assert not any(torch.equal(magnitude, m) for m in seen)
        seen.append(magnitude)
        assert torch.equal(layer.current_feedback(), magnitude * layer.weight.detach().sign())


@pytest.mark.parametrize("scale", ["kaiming", "xavier"])
@pytest.mark.parametrize("shape", [(1300, 1000), (1, 1_300_000)])
def test_batchwise_magnitudes_are_those_of_the_scales_distribution(scale, shape):
    rule = get_rule("brsf")(scale, layer_name="x")
    drawn = [rule.multiply_at_random(torch.ones(shape), Fans(1, 1, False), i) for i in range(3)]
    # Half-normal, or uniform from 0: mean, second moment and median.
    uniform = scale == "xavier"
    expected = (3**0.5 / 2, 1.0, 3**0.5 / 2) if uniform else ((2 / math.pi) ** 0.5, 1.0, 0.67449)
    for values in drawn:
        assert (values >= 0).all() and (not uniform or values.max() < 3**0.5)
        actual = torch.stack([values.mean(), values.square().mean(), values.median()])
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=5e-3, atol=0)
    # Independent from draw to draw, and between the parts of a draw.
    pairs = [(a.flatten(), b.flatten()) for a, b in itertools.combinations(drawn, 2)]
    for a, b in [*pairs, *(values.flatten().chunk(2) for values in drawn)]:
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 5e-3


# Kolen-Pollack.


@pytest.mark.parametrize("calls", [1, 3])
@each_layer
def test_kolen_pollack_converges_by_the_decay_factor_at_each_step(kind, calls):
    layer = _layer(kind, "kp").double()
    layer.example = layer.example.double()
    lr, decay = 1e-3, 5.0
    optimizer = _sgd(layer, lr=lr, weight_decay=decay)
    start = (layer.weight - layer.feedback_weight).detach()
    for t in range(1, 6):
        _step(layer, optimizer, calls)
        expected = start * (1 - lr * decay) ** t
        actual = (layer.weight - layer.feedback_weight).detach()
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@each_layer
def test_kolen_pollack_feedback_of_a_frozen_weight_stays(kind):
    torch.manual_seed(0)
    layer = _layer(kind, "bp")
    layer.weight.requires_grad_(False)
    convert_feedback(layer, "kp")
    assert not layer.feedback_weight.requires_grad

    layer = _layer(kind, "kp")
    layer.weight.requires_grad_(False)
    layer(layer.example.requires_grad_()).sum().backward()
    assert layer.feedback_weight.grad is None


@each_layer
def test_kolen_pollack_feedback_learns_nothing_while_suspended(kind):
    layer = _layer(kind, "kp")
    y = layer(layer.example.requires_grad_())
    with backpropagation(layer):
        y.sum().backward()
    assert layer.feedback_weight.grad is None and layer.weight.grad is not None


class Tied(nn.Module):
    """One weight encodes and decodes, as an autoencoder's or a language model's does."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(8, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


def test_kolen_pollack_shares_the_feedback_of_a_shared_weight():
    torch.manual_seed(0)
    model = convert_feedback(Tied(nn.Linear(8, 8), nn.Linear(8, 8)), "kp").double()
    assert model.second.feedback_weight is model.first.feedback_weight
    x, layer = torch.randn(4, 8).double(), model.first
    lr, momentum, decay = 0.1, 0.9, 0.2
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=decay)
    start, c, m = (layer.feedback_weight - layer.weight).detach(), 1.0, 0.0
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(layer.feedback_weight.grad, layer.weight.grad)
        optimizer.step()
        m = momentum * m + decay * c
        c -= lr * m
        actual = (layer.feedback_weight - layer.weight).detach()
        torch.testing.assert_close(actual, c * start, rtol=1e-10, atol=1e-12)


def test_layers_that_share_learned_feedback_keep_sharing_it():
    model = convert_feedback(Tied(nn.Linear(8, 8), nn.Linear(8, 8)), "kp")
    drawn = model.first.feedback_weight.detach().clone()
    stock = {key: value for key, value in model.state_dict().items() if "feedback" not in key}
    model.load_state_dict(stock)
    assert torch.equal(model.second.feedback_weight, drawn)
    convert_feedback(model, "kp", exclude="second", seed=3)
    assert torch.equal(model.first.feedback_weight, drawn)
    assert model.second.feedback_weight is model.first.feedback_weight
    with pytest.raises(ValueError, match="second cannot keep its rule: its weight is also first's"):
        convert_feedback(model, "fa", exclude="second")
    convert_feedback(model, "fa")
    assert not torch.equal(model.second.feedback_weight, model.first.feedback_weight)


def test_kolen_pollack_leaves_a_weight_that_others_use_on_backpropagation():
    model, x = Tied(nn.Embedding(8, 8), nn.Linear(8, 8)), torch.tensor([1, 5, 5])
    stock = copy.deepcopy(model)
    convert_feedback(model, "kp")
    rules = {row.name: (row.rule, row.reason) for row in feedback_report(model)}
    assert rules["head"] == ("kolen_pollack", "")
    rule, reason = rules["second"]
    assert rule == "backpropagation"
    assert reason.startswith("its weight is also first's (Embedding); kolen_pollack needs all that")
    with backpropagation(model):
        model(x).sum().backward()
    stock(x).sum().backward()
    assert torch.equal(model.first.weight.grad, stock.first.weight.grad)
    # Feedback that is fixed misses nothing.
    report = feedback_report(convert_feedback(model, "fa"))
    assert [row.rule for row in report] == ["feedback_alignment"] * 2
    model = Tied(nn.Linear(8, 8), nn.Linear(8, 8))
    report = feedback_report(convert_feedback(model, "kp", overrides={"second": "fa"}))
    assert report[0].reason.startswith("its weight is also second's (Linear)")


# What is drawn.


def test_the_draws_never_change():
    # Checkpoints hold what was drawn, but a published run is repeated from its seed.
    def values(tensor):
        return [round(v, 4) for v in tensor.flatten().tolist()]

    layer = AsymmetricLinear(2, 2, rule="fa", scale="xavier", layer_name="x", seed=0)
    assert values(layer.feedback_weight * 2**0.5) == [-1.6499, -0.0664, -0.106, 0.4226]
    layer = AsymmetricConv2d(1, 2, (1, 2), rule="brsf", scale="kaiming", layer_name="x", seed=0)
    assert values(layer.current_feedback().abs()) == [0.1037, 0.1215, 0.3112, 1.7537]
    advance_feedback(layer)
    assert values(layer.current_feedback().abs()) == [1.6569, 0.2069, 0.1599, 0.8914]


@each_rule
@each_layer
def test_no_rule_touches_or_reads_the_global_random_state(kind, rule):
    stock = _layer(kind, "bp")
    results = []
    for seed in (1, 2):
        layer = copy.deepcopy(stock)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        convert_feedback(layer, rule, seed=3)
        optimizer = _sgd(layer)
        for _ in range(2):
            _step(layer, optimizer)
        assert torch.equal(torch.get_rng_state(), before)
        results.append([t.detach() for t in layer.state_dict().values()])
    assert_same(*results)


@pytest.mark.parametrize("rule", DRAWN)
def test_layers_and_seeds_draw_differently(rule):
    def model(seed):
        torch.manual_seed(0)
        return convert_feedback(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), rule, seed=seed)

    a, b = (x.current_feedback().abs() / x.weight.abs().mean() for x in model(0))
    assert not torch.allclose(a, b)
    assert not torch.equal(model(0)[0].current_feedback(), model(1)[0].current_feedback())
    assert torch.equal(model(0)[1].current_feedback(), model(0)[1].current_feedback())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_feedback_rule
def test_feedback_has_the_weights_type_and_memory_format(rule, dtype):
    torch.manual_seed(0)
    stock = nn.Conv2d(4, 6, 3).to(dtype).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(stock).float().to(memory_format=torch.contiguous_format)
    reference = convert_feedback(plain, rule).current_feedback()
    feedback = convert_feedback(stock, rule).current_feedback()
    assert feedback.dtype == dtype
    assert feedback.stride() == stock.weight.stride()
    # float32 is the type that random numbers are drawn in.
    torch.testing.assert_close(feedback.float(), reference, rtol=1e-2, atol=0)


# Refusals, and rules of one's own.


class Clipped(FeedbackRule):
    name = "clipped"
    short_name = "cl"

    def feedback(self, weight, state, fans):
        return weight.clamp(-0.1, 0.1)


class Mixed(FeedbackRule):
    name = "mixed"
    state_name = "feedback_noise"

    def feedback(self, weight, state, fans):
        return weight + state

    def initial_state(self, weight, fans):
        return self.draw(weight, fans)


class LearnedMixed(Mixed):
    name = "learned_mixed"
    learned = True


@pytest.mark.parametrize(
    "rule, state, expected",
    [
        (Clipped, [], lambda layer: layer.weight.clamp(-0.1, 0.1)),
        (Mixed, ["feedback_noise"], lambda layer: layer.weight + layer.feedback_noise),
        (LearnedMixed, ["feedback_noise"], lambda layer: layer.weight + layer.feedback_noise),
        (Flipping, ["feedback_updates"], lambda layer: -layer.weight),
    ],
)
def test_a_rule_of_ones_own_needs_no_registration(rule, state, expected):
    layer = convert_feedback(nn.Linear(3, 2), rule, scale="rms", gain=0.5)
    advance_feedback(layer)
    assert sorted(layer.state_dict()) == sorted(["weight", "bias", *state])
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 2) @ expected(layer))
    learned = [n for n, p in layer.named_parameters() if p.grad is not None]
    assert learned == ["weight", "bias", *(state if rule.learned else [])]
    convert_feedback(layer, "bp")
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(FEEDBACK_REGISTRY, "_classes", dict(FEEDBACK_REGISTRY._classes))
    return FEEDBACK_REGISTRY.register


def test_a_registered_rule_is_found_and_listed(register):
    register(Clipped)
    for name in ("clipped", "cl"):
        assert type(convert_feedback(nn.Linear(3, 2), name).rule) is Clipped
    with pytest.raises(ValueError, match=r"clipped \(cl\)"):
        get_rule("nothing")


@pytest.mark.parametrize(
    "written, name",
    [
        *[(w, "sign_symmetry") for w in ("SS", "uSF", "sign-symmetry", "Sign Symmetry")],
        *[(w, "feedback_alignment") for w in ("FA", "feedback-alignment", "FeedbackAlignment")],
        *[("BP", "backpropagation"), ("backprop", "backpropagation"), ("KP", "kolen_pollack")],
        *[("frSF", "sign_symmetry_fixed_magnitude"), ("Kolen-Pollack", "kolen_pollack")],
        ("Uniform Sign-concordant Feedbacks", "sign_symmetry"),
        ("fixed random-magnitude sign-concordant feedbacks", "sign_symmetry_fixed_magnitude"),
        (
            "Batch-wise Random Magnitude Sign-concordant Feedback",
            "sign_symmetry_batchwise_magnitude",
        ),
    ],
)
def test_rules_go_by_the_names_of_the_literature(written, name):
    assert get_rule(written).name == name


def test_incomplete_rules_are_refused(register):
    with pytest.raises(ValueError, match="state_name is 'noise'.*must begin with 'feedback'"):
        register(type("Wrong", (FeedbackRule,), {"name": "wrong", "state_name": "noise"}))
    with pytest.raises(ValueError, match="Both counts updates"):
        register(type("Both", (Flipping,), {"name": "both", "learned": True}))
    silent = type("Silent", (FeedbackRule,), {"name": "silent"})
    layer = convert_feedback(nn.Linear(2, 2), silent)
    with pytest.raises(NotImplementedError, match="'silent'"):
        layer(torch.ones(1, 2, requires_grad=True)).sum().backward()


def test_a_taken_name_is_refused(register):
    assert "hebb" not in FEEDBACK_REGISTRY and "" not in FEEDBACK_REGISTRY
    for names in ({"name": "ss"}, {"name": "new", "short_name": "fa"}):
        with pytest.raises(ValueError, match="is (SignSymmetry|FeedbackAlignment)'s"):
            register(type("Taken", (FeedbackRule,), names))
    assert "new" not in FEEDBACK_REGISTRY
