"""The rules in closed form: what B is, what is drawn and when, and what changes it."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from ss_detectron.layers import (
    FEEDBACK_REGISTRY,
    FEEDBACK_SCALES,
    AsymmetricConv2d,
    AsymmetricConvTranspose2d,
    AsymmetricLinear,
    Fans,
    FeedbackRule,
    advance_feedback,
    backpropagation,
    convert_feedback,
    get_rule,
)

RULES = {
    "backpropagation": "bp",
    "sign_symmetry": "ss",
    "sign_symmetry_fixed_magnitude": "frsf",
    "sign_symmetry_batchwise_magnitude": "brsf",
    "feedback_alignment": "fa",
    "feedback_alignment_signed_init": "fasi",
    "kolen_pollack": "kp",
}
DRAWN = ["frsf", "brsf", "fa", "kp"]
# How a layer is made, a stock one, its fan-in and fan-out, and an input.
LAYERS = {
    "conv": (
        lambda **o: AsymmetricConv2d(4, 6, (3, 2), **o),
        4 * 3 * 2,
        6 * 3 * 2,
        (2, 4, 5, 5),
    ),
    "grouped-conv": (
        lambda **o: AsymmetricConv2d(4, 6, 3, groups=2, bias=False, **o),
        2 * 9,
        6 * 9,
        (2, 4, 5, 5),
    ),
    "transposed": (
        lambda **o: AsymmetricConvTranspose2d(4, 6, 2, stride=2, **o),
        4 * 4,
        6 * 4,
        (2, 4, 3, 3),
    ),
    "linear": (lambda **o: AsymmetricLinear(5, 3, **o), 5, 3, (2, 5)),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_scale = pytest.mark.parametrize("scale", ["mean_abs", "rms", "kaiming", "xavier"])


def _layer(kind, rule, **options):
    torch.manual_seed(0)
    layer = LAYERS[kind][0](rule=rule, **options)
    layer.example = torch.randn(LAYERS[kind][3])
    return layer


def _magnitude(kind, scale, weight):
    _, fan_in, fan_out, _ = LAYERS[kind]
    if scale == "mean_abs":
        return weight.abs().sum().item() / weight.numel()
    if scale == "rms":
        return weight.square().mean().sqrt().item()
    if scale == "kaiming":
        return fan_in**-0.5 if kind == "linear" else (2 / fan_out) ** 0.5
    return (2 / (fan_in + fan_out)) ** 0.5


def _step(layer, optimizer, calls=1):
    optimizer.zero_grad()
    x = layer.example.clone().requires_grad_()
    sum(layer(x * (i + 1)).square().sum() for i in range(calls)).backward()
    optimizer.step()
    advance_feedback(layer)


def _sgd(layer, **options):
    return torch.optim.SGD(layer.parameters(), **{"lr": 1e-3, **options})


def test_every_rule_is_listed_here():
    assert {name: rule.short_name for name, rule in FEEDBACK_REGISTRY} == RULES
    assert list(FEEDBACK_SCALES) == ["mean_abs", "rms", "kaiming", "xavier"]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_found_by_name_short_name_and_class(name):
    rule = get_rule(name)
    assert rule.name == name
    assert get_rule(RULES[name]) is get_rule(rule) is rule


@each_layer
def test_fans(kind):
    fans = _layer(kind, "bp").fans()
    assert fans == Fans(*LAYERS[kind][1:3], kind == "linear")


@each_layer
def test_backpropagation_feedback_is_the_weight(kind):
    layer = _layer(kind, "bp")
    assert torch.equal(layer.current_feedback(), layer.weight)


@pytest.mark.parametrize("gain", [1, 0.5])
@each_scale
@each_layer
def test_sign_symmetry_in_closed_form_and_following_the_weight(kind, scale, gain):
    layer = _layer(kind, "ss", scale=scale, gain=gain)
    for _ in range(2):
        expected = gain * _magnitude(kind, scale, layer.weight) * layer.weight.sign()
        torch.testing.assert_close(layer.current_feedback(), expected.detach())
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight) * 3)


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
@pytest.mark.parametrize("kind", ["conv", "transposed", "linear"])
def test_drawn_feedback_has_the_magnitude_of_the_scale(kind, rule, scale, gain):
    shape = {
        "conv": (AsymmetricConv2d, (50, 60, 3)),
        "transposed": (AsymmetricConvTranspose2d, (50, 60, 3)),
        "linear": (AsymmetricLinear, (200, 150)),
    }[kind]
    torch.manual_seed(0)
    layer = shape[0](*shape[1], rule=rule, scale=scale, gain=gain)
    fan_in, fan_out, is_linear = layer.fans()
    s = (
        gain
        * {
            "mean_abs": layer.weight.abs().mean().item(),
            "rms": layer.weight.square().mean().sqrt().item(),
            "kaiming": fan_in**-0.5 if is_linear else (2 / fan_out) ** 0.5,
            "xavier": (2 / (fan_in + fan_out)) ** 0.5,
        }[scale]
    )
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


@each_layer
def test_fixed_magnitude_keeps_m_and_follows_the_sign(kind):
    layer = _layer(kind, "frsf")
    magnitude = layer.feedback_magnitude.clone()
    optimizer = _sgd(layer, lr=0.1)
    before = layer.weight.sign()
    for _ in range(3):
        _step(layer, optimizer)
        assert torch.equal(layer.current_feedback(), magnitude * layer.weight.detach().sign())
    assert not torch.equal(before, layer.weight.sign())
    assert torch.equal(layer.feedback_magnitude, magnitude)


@pytest.mark.parametrize("rule", ["fa", "fasi"])
@each_layer
def test_fixed_feedback_stays_fixed_in_training(kind, rule):
    layer = _layer(kind, rule)
    before = layer.current_feedback().clone()
    optimizer = _sgd(layer, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        _step(layer, optimizer)
    assert torch.equal(layer.current_feedback(), before)
    assert not layer.feedback_weight.requires_grad


@each_scale
@each_layer
def test_signed_initialisation_keeps_the_first_signs(kind, scale):
    layer = _layer(kind, "fasi", scale=scale)
    first = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.neg_()
    expected = _magnitude(kind, scale, first) * first.sign()
    torch.testing.assert_close(layer.current_feedback(), expected)


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


def test_a_count_and_another_state_do_not_go_together():
    class Both(FeedbackRule):
        name = "both"
        counts_updates = True
        learned = True

    with pytest.raises(ValueError, match="Both counts updates"):
        get_rule(Both)


def test_a_rule_that_counts_updates_says_that_nobody_counts(caplog):
    layer = convert_feedback(nn.Sequential(nn.Linear(3, 2)), "brsf")
    with caplog.at_level("WARNING"):
        for _ in range(100):
            assert not caplog.records
            layer(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert "advance_feedback" in caplog.text


# Batchwise random magnitude.


def _batchwise(kind, **options):
    """A layer whose scale does not change with its weight: abs(B) is then the magnitude drawn."""
    return _layer(kind, "brsf", scale="kaiming", **options)


@pytest.mark.parametrize("calls", [1, 3])
@each_layer
def test_batchwise_magnitude_is_new_after_each_update_and_only_then(kind, calls):
    layer = _batchwise(kind)
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


@each_layer
def test_batchwise_feedback_keeps_nothing_but_a_count(kind):
    layer = _batchwise(kind)
    stock = _layer(kind, "bp")
    assert list(layer.state_dict()) == [*stock.state_dict(), "feedback_updates"]
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert not list(layer.buffers())


@each_layer
def test_batchwise_magnitude_serves_several_calls_in_one_pass(kind):
    layer = _layer(kind, "brsf")
    _step(layer, _sgd(layer), calls=3)
    _step(layer, _sgd(layer), calls=3)


@each_layer
def test_batchwise_draws_depend_on_seed_name_and_index_alone(kind):
    def draws(seed, name, global_seed):
        layer = _batchwise(kind, seed=seed, layer_name=name)
        torch.manual_seed(global_seed)
        optimizer = _sgd(layer)
        seen = []
        for _ in range(3):
            _step(layer, optimizer)
            seen.append(layer.current_feedback().abs())
        return torch.stack(seen)

    first = draws(0, "a", 1)
    assert torch.equal(draws(0, "a", 2), first)
    assert not torch.equal(draws(1, "a", 1), first)
    assert not torch.equal(draws(0, "b", 1), first)


def _pickled(layer, path):
    return pickle.loads(pickle.dumps(layer))


def _saved(layer, path):
    torch.save(layer.state_dict(), path / "layer.pth")
    fresh = _layer("conv", "brsf")
    fresh.load_state_dict(torch.load(path / "layer.pth", weights_only=True))
    return fresh


@pytest.mark.parametrize("copier", [lambda x, _: copy.deepcopy(x), _pickled, _saved])
def test_a_copy_of_batchwise_magnitude_goes_on_as_the_original(copier, tmp_path):
    layer = _layer("conv", "brsf")
    for _ in range(3):
        _step(layer, _sgd(layer))
    other = copier(layer, tmp_path)
    for _ in range(3):
        for each in (layer, other):
            _step(each, _sgd(each))
        assert torch.equal(other.current_feedback(), layer.current_feedback())
        assert torch.equal(other.weight, layer.weight)


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


def test_batchwise_magnitudes_depend_on_neither_memory_format_nor_type():
    ones = torch.ones(5, 4, 3, 3)
    rule = get_rule("brsf")("kaiming", layer_name="x")
    reference = rule.multiply_at_random(ones.clone(), Fans(36, 45, False), 1)
    for like in (ones.to(memory_format=torch.channels_last), ones.double(), ones.bfloat16()):
        drawn = rule.multiply_at_random(like, Fans(36, 45, False), 1)
        assert drawn is like
        rtol = 2**-8 if like.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(drawn.float(), reference, rtol=rtol, atol=0)


# Kolen-Pollack.


@each_layer
def test_kolen_pollack_feedback_gets_the_weights_gradient_as_a_tensor_of_its_own(kind):
    layer = _layer(kind, "kp")
    x = layer.example.requires_grad_()
    (layer(x) + layer(2 * x)).square().sum().backward()
    assert torch.equal(layer.feedback_weight.grad, layer.weight.grad)
    assert layer.feedback_weight.grad.data_ptr() != layer.weight.grad.data_ptr()
    assert layer.weight.grad.abs().sum() > 0


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


@pytest.mark.parametrize("rule", RULES.values())
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
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


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
@pytest.mark.parametrize("rule", list(RULES.values())[1:])
def test_feedback_has_the_weights_type_and_memory_format(rule, dtype):
    torch.manual_seed(0)
    stock = nn.Conv2d(4, 6, 3).to(dtype).to(memory_format=torch.channels_last)
    reference = convert_feedback(copy.deepcopy(stock).float(), rule).current_feedback()
    feedback = convert_feedback(stock, rule).current_feedback()
    assert feedback.dtype == dtype
    assert feedback.stride() == stock.weight.stride()
    # float32 is the type that random numbers are drawn in.
    torch.testing.assert_close(feedback.float(), reference, rtol=1e-2, atol=0)


# Refusals, and rules of one's own.


def test_unknown_rule_scale_and_gain_name_the_choices():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'hebb'") as error:
        convert_feedback(layer, "hebb")
    for name, short_name in RULES.items():
        assert f"{name} ({short_name})" in str(error.value)
    with pytest.raises(ValueError, match="'half'.*mean_abs, rms, kaiming, xavier"):
        convert_feedback(layer, scale="half")
    with pytest.raises(ValueError, match="''"):
        convert_feedback(layer, "")
    for gain in (0, -1, math.nan, math.inf, "1", None):
        with pytest.raises(ValueError, match="gain.*positive number"):
            convert_feedback(layer, gain=gain)
    assert type(layer) is nn.Linear


@pytest.fixture
def register():
    names = []

    def add(rule):
        names.append(rule.name)
        return FEEDBACK_REGISTRY.register(rule)

    yield add
    for name in names:
        FEEDBACK_REGISTRY._classes.pop(name, None)


def test_a_rule_of_ones_own_without_state(register):
    @register
    class Clipped(FeedbackRule):
        name = "clipped"
        short_name = "cl"

        def feedback(self, weight, state, fans):
            return weight.clamp(-0.1, 0.1)

    assert "clipped (cl)" in str(pytest.raises(ValueError, get_rule, "nothing").value)
    for rule in ("clipped", "cl", Clipped):
        model = convert_feedback(nn.Sequential(nn.Linear(3, 2), nn.Conv2d(3, 2, 1)), rule)
        assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        x = torch.randn(4, 3, requires_grad=True)
        model[0](x).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(4, 2) @ model[0].weight.clamp(-0.1, 0.1))


def test_a_rule_of_ones_own_with_state(register):
    @register
    class Mixed(FeedbackRule):
        name = "mixed"
        state_name = "feedback_noise"

        def feedback(self, weight, state, fans):
            return weight + state

        def initial_state(self, weight, fans):
            return self.draw(weight, fans)

    layer = convert_feedback(nn.Linear(3, 2), "mixed", scale="rms", gain=0.5)
    assert list(layer.state_dict()) == ["weight", "bias", "feedback_noise"]
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 2) @ (layer.weight + layer.feedback_noise))
    convert_feedback(layer, "bp")
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_a_rule_of_ones_own_that_counts_updates_needs_no_registration():
    class Flipping(FeedbackRule):
        name = "flipping"
        counts_updates = True

        def feedback(self, weight, state, fans):
            return (-1) ** state * weight

    layer = convert_feedback(nn.Conv2d(1, 1, 1), Flipping)
    for index in range(4):
        x = torch.ones(1, 1, 2, 2, requires_grad=True)
        layer(x).sum().backward()
        expected = (-1) ** index * layer.weight.detach().expand_as(x)
        torch.testing.assert_close(x.grad, expected)
        advance_feedback(layer)


def test_incomplete_rules_are_refused(register):
    with pytest.raises(ValueError, match="state_name is 'noise'.*must begin with 'feedback'"):
        register(type("Wrong", (FeedbackRule,), {"name": "wrong", "state_name": "noise"}))
    with pytest.raises(ValueError, match="needs a name"):
        register(type("Nameless", (FeedbackRule,), {}))
    silent = type("Silent", (FeedbackRule,), {"name": "silent"})
    layer = convert_feedback(nn.Linear(2, 2), silent)
    with pytest.raises(NotImplementedError, match="'silent'"):
        layer(torch.ones(1, 2, requires_grad=True)).sum().backward()


def test_a_taken_name_is_refused_and_membership_knows_short_names(register):
    assert "ss" in FEEDBACK_REGISTRY and "sign_symmetry" in FEEDBACK_REGISTRY
    assert "hebb" not in FEEDBACK_REGISTRY and "" not in FEEDBACK_REGISTRY
    for names in ({"name": "ss"}, {"name": "new", "short_name": "fa"}):
        with pytest.raises(ValueError, match="is (SignSymmetry|FeedbackAlignment)'s"):
            FEEDBACK_REGISTRY.register(type("Taken", (FeedbackRule,), names))
    assert "new" not in FEEDBACK_REGISTRY
