"""Conversion of whole models: what is converted, what is not and why, and the way back."""

import math
import pickle

import pytest
import torch
from core_utils import RULES, assert_same, each_feedback_rule
from torch import nn

from ss_detectron.layers import (
    AsymmetricConv2d,
    AsymmetricConvTranspose2d,
    AsymmetricLayer,
    AsymmetricLinear,
    Fans,
    FeedbackRule,
    asymmetric,
    asymmetric_linear,
    backpropagation,
    check_exclude,
    convert_feedback,
    convert_part,
    feedback_report,
    register_layer,
)


class Subclass(nn.Conv2d):
    def forward(self, input):
        return super().forward(input)


class Square(nn.Conv2d):
    """With a constructor and names of its own, as torchvision's Conv3DSimple."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3)

    @staticmethod
    def downsample_stride():
        return 2


class OwnWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(2))


class Head(nn.Module):
    """Nested, with its layers in a plain list besides, as Detectron2's FPN has them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 1)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.up = nn.ConvTranspose2d(4, 2, 1)
        self.listed = [self.conv1, self.inner[0], self.up]

    def forward(self, x):
        return self.up(self.inner(self.conv1(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        self.head = Head()
        self.score = nn.Linear(2, 3)

    def forward(self, x):
        return self.score(self.head(self.stem(x)).mean((2, 3)))


LAYERS = ["stem", "head.conv1", "head.inner.0", "head.up", "score"]


def _model():
    torch.manual_seed(0)
    return Model()


def _types(model):
    return {name: type(module) for name, module in model.named_modules()}


def _converted(model):
    return [name for name, module in model.named_modules() if isinstance(module, AsymmetricLayer)]


def _snapshot(model):
    """Types, attributes and state, with everything but the state by identity."""
    return (
        _types(model),
        {n: sorted(m.__dict__) for n, m in model.named_modules()},
        {n: id(m) for n, m in model.named_modules()},
        {n: id(p) for n, p in model.named_parameters()},
        {n: b.tolist() for n, b in model.state_dict().items()},
    )


def _reasons(model):
    return {row.name: row.reason for row in feedback_report(model)}


# What is converted.


def test_types_change_and_objects_do_not():
    model = _model()
    before = dict(model.named_modules()), dict(model.named_parameters())
    stock = _types(model)
    assert convert_feedback(model) is model
    assert _types(model) == {
        **stock,
        "stem": AsymmetricConv2d,
        "head.conv1": AsymmetricConv2d,
        "head.inner.0": AsymmetricConv2d,
        "head.up": AsymmetricConvTranspose2d,
        "score": AsymmetricLinear,
    }
    for old, new in zip(before, (model.named_modules(), model.named_parameters()), strict=True):
        new = dict(new)
        assert list(old) == list(new)
        assert all(old[n] is new[n] for n in old)
    assert model.head.listed == [model.head.conv1, model.head.inner[0], model.head.up]
    assert all(isinstance(layer, AsymmetricLayer) for layer in model.head.listed)
    assert all(model.get_submodule(n).rule.layer_name == n for n in LAYERS)


def test_a_shared_module_is_converted_once():
    layer = nn.Linear(2, 2)
    model = convert_feedback(nn.Sequential(layer, nn.ReLU(), layer), "fa")
    assert model[0] is model[2] and type(layer) is AsymmetricLinear
    assert [row.name for row in feedback_report(model)] == ["0"]


def test_tied_weights_have_feedback_of_their_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    convert_feedback(model, "fa")
    assert model[1].weight is model[0].weight
    assert not torch.equal(model[0].feedback_weight, model[1].feedback_weight)


# What is excluded.


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("score", ["score"]),
        (("stem", "score"), ["stem", "score"]),
        ("head", ["head.conv1", "head.inner.0", "head.up"]),
        ("head.*", ["head.conv1", "head.inner.0", "head.up"]),
        ("*.conv1", ["head.conv1"]),
        ("head.inner", ["head.inner.0"]),
        ("[hs]*e*", LAYERS),
        ("*", LAYERS),
        pytest.param(iter(["stem"]), ["stem"], id="iterator"),
    ],
    ids=str,
)
def test_excluded_layers_stay(exclude, left):
    model = convert_feedback(_model(), exclude=exclude)
    assert _converted(model) == [n for n in LAYERS if n not in left]
    for name, reason in _reasons(model).items():
        assert reason.startswith("excluded by '") == (name in left)


@pytest.mark.parametrize("pattern", ["heads.*", "Score", "conv1", "head.inner.1", "", "scor"])
def test_a_pattern_that_matches_no_layer_is_refused_and_nothing_changes(pattern):
    model = _model()
    before = _snapshot(model)
    with pytest.raises(ValueError, match="matches no layer of Model.*'stem'") as error:
        convert_feedback(model, exclude=["score", pattern])
    assert repr(pattern) in str(error.value)
    assert _snapshot(model) == before
    check_exclude(model, ["head"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": "hebb"}, "'hebb'.*backpropagation .bp., sign_symmetry .ss.,.*kolen_pollack .kp."),
        ({"rule": ""}, "''"),
        ({"rule": nn.ReLU}, "ReLU is no feedback rule"),
        ({"rule": type("NoName", (FeedbackRule,), {})}, "NoName needs a name"),
        ({"rule": "bp", "scale": "half"}, "'half'.*mean_abs, rms, kaiming, xavier"),
        *(({"gain": gain}, "gain.*positive number") for gain in (0, -1, math.inf, "1", None)),
        ({"overrides": {"scores": "fa"}}, "'scores'"),
        ({"overrides": {"score": "hebb"}}, "'hebb'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_and_change_nothing(wrong, message):
    model = convert_feedback(_model(), "fa")
    before = _snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert_feedback(model, **wrong)
    assert _snapshot(model) == before


def test_a_part_is_excluded_by_its_name_in_the_whole():
    head = convert_part(_model().head, "ss", exclude=["roi.head.up", "other"], prefix="roi.head")
    assert _converted(head) == ["conv1", "inner.0"]


# What cannot be converted.


def _replaced_forward():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: 2 * x
    return layer


@pytest.mark.parametrize(
    ("build", "reasons"),
    [
        (lambda: nn.LSTM(2, 2), {"": "no asymmetric form of LSTM"}),
        (OwnWeight, {"": "no asymmetric form of OwnWeight"}),
        (lambda: Subclass(2, 2, 1), {"": "Subclass, a subclass of Conv2d that may compute"}),
        (
            lambda: type("Linear", (nn.Linear,), {"forward": lambda self, x: 2 * x})(2, 2),
            {"": "test_convert's Linear, a subclass of Linear that may compute"},
        ),
        (
            lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),
            {"": "its weight is computed, not a parameter"},
        ),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            {"": "ParametrizedLinear, a subclass of Linear that may compute"},
        ),
        (lambda: nn.Linear(2, 2, dtype=torch.cfloat), {"": "its weight is complex"}),
        (lambda: nn.LazyLinear(2), {"": "LazyLinear, a subclass of Linear"}),
        (_replaced_forward, {"": "its forward is replaced on the instance"}),
        # Without a weight matrix it is not in the report.
        (lambda: nn.Sequential(nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.PReLU()), {}),
    ],
)
def test_what_cannot_be_converted_stays_and_is_reported(build, reasons):
    module = build()
    before = _types(module)
    convert_feedback(module)
    assert _types(module) == before
    report = feedback_report(module)
    assert [row.name for row in report] == list(reasons)
    for row in report:
        assert row.rule == "backpropagation" and row.reason.startswith(reasons[row.name])


def test_a_subclass_that_overrides_nothing_follows():
    torch.manual_seed(0)
    layer, x = Square(2), torch.randn(1, 2, 4, 4)
    expected = layer(x)
    assert type(convert_feedback(layer)) is AsymmetricConv2d
    assert torch.equal(layer(x), expected)
    assert type(convert_feedback(layer, "bp")) is Square


def _within_another_wrapper(model):
    return nn.ModuleDict({"_forward_module": nn.DataParallel(model)})


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, _within_another_wrapper])
def test_wrapped_models_are_refused(wrap):
    model = _model()
    wrapped = wrap(model)
    with pytest.raises(ValueError, match="convert it before wrapping it"):
        convert_feedback(wrapped)
    assert not _converted(model)


# Converting again, and back.


@pytest.mark.parametrize("second", RULES)
@each_feedback_rule
def test_a_change_of_rule_leaves_nothing_of_the_first(rule, second):
    changed = convert_feedback(convert_feedback(_model(), rule, seed=1, scale="rms"), second)
    direct = convert_feedback(_model(), second)
    assert_same(changed.state_dict(), direct.state_dict())
    for (n, a), (m, b) in zip(changed.named_modules(), direct.named_modules(), strict=True):
        assert n == m and type(a) is type(b)
        assert sorted(a.__dict__) == sorted(b.__dict__)
        assert a._non_persistent_buffers_set == b._non_persistent_buffers_set
    assert [n for n, _ in changed.named_parameters()] == [n for n, _ in direct.named_parameters()]


def test_a_part_may_have_another_rule():
    model = convert_feedback(_model(), "ss")
    convert_feedback(model.head, "fa")
    rules = [row.rule for row in feedback_report(model)]
    assert rules == ["sign_symmetry", *["feedback_alignment"] * 3, "sign_symmetry"]
    convert_feedback(model, "kp", exclude="head")
    rules = [row.rule for row in feedback_report(model)]
    assert rules == ["kolen_pollack", *["feedback_alignment"] * 3, "kolen_pollack"]


@each_feedback_rule
def test_converting_back_restores_everything(rule):
    model = _model()
    before = _snapshot(model)
    convert_feedback(model, rule, exclude="score")
    with backpropagation(model):
        pass
    convert_feedback(model, "backpropagation")
    assert _snapshot(model) == before
    assert not any(n.startswith("feedback") for m in model.modules() for n in m.__dict__)


@each_feedback_rule
def test_a_restored_model_pickles_without_this_package(rule):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Linear(2, 2))
    untouched = pickle.dumps(model)
    convert_feedback(model, rule)
    assert b"ss_detectron" in pickle.dumps(model)
    convert_feedback(model, "bp")
    restored = pickle.dumps(model)
    assert b"ss_detectron" not in restored and len(restored) == len(untouched)


# Backpropagation for a moment.


def _input_gradient(model):
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(x).square().sum().backward()
    return x.grad


@each_feedback_rule
def test_backpropagation_within_a_context_and_the_rule_after_it(rule):
    stock, model = _input_gradient(_model()), convert_feedback(_model(), rule)
    before, attributes = _input_gradient(model), _snapshot(model)[1]
    assert not torch.allclose(before, stock)
    with backpropagation(model) as inside:
        assert inside is model
        torch.testing.assert_close(_input_gradient(model), stock)
        rows = feedback_report(model)
        assert {r.rule for r in rows} == {"backpropagation"} and all(r.reason for r in rows)
        with backpropagation(model.head):
            torch.testing.assert_close(_input_gradient(model), stock)
        torch.testing.assert_close(_input_gradient(model), stock)
    assert torch.equal(_input_gradient(model), before)
    with pytest.raises(KeyError), backpropagation(model):
        raise KeyError
    assert torch.equal(_input_gradient(model), before)
    assert _snapshot(model)[1] == attributes
    with backpropagation(model.head):
        rules = [row.rule for row in feedback_report(model)]
    assert rules.count("backpropagation") == 3


def test_conversion_within_the_context():
    model = convert_feedback(_model(), "ss")
    with backpropagation(model):
        convert_feedback(model, "bp")
    assert not _converted(model)
    convert_feedback(model, "fa")
    assert {row.rule for row in feedback_report(model)} == {"feedback_alignment"}


def test_a_layer_parametrized_after_conversion_is_not_broken_by_converting_back():
    layer = convert_feedback(nn.Linear(2, 2), "ss")
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="no stock layer to go back to from Parametrized"):
        convert_feedback(layer, "bp")
    assert layer(torch.ones(1, 2)).shape == (1, 2)


def test_nothing_changes_where_a_later_layer_is_refused():
    model = convert_feedback(_model(), "fa")
    nn.utils.parametrizations.weight_norm(model.score)
    before = _snapshot(model)
    for rule in ("bp", _Fussy):
        with pytest.raises(ValueError):
            convert_feedback(model, rule)
        assert _snapshot(model) == before


class _Fussy(FeedbackRule):
    name = "fussy"
    state_name = "feedback_noise"

    def initial_state(self, weight, fans):
        if fans.is_linear:
            raise ValueError("no linear layers")
        return torch.zeros_like(weight)


# Rules by pattern, and layers of one's own.


def test_overrides_give_layers_another_rule():
    model = convert_feedback(
        _model(), "ss", overrides={"score": "backpropagation", "head.*": "fa"}, exclude="head.up"
    )
    assert [(row.rule, row.reason) for row in feedback_report(model)] == [
        ("sign_symmetry", ""),
        ("feedback_alignment", ""),
        ("feedback_alignment", ""),
        ("backpropagation", "excluded by 'head.up'"),
        ("backpropagation", "its own rule is backpropagation"),
    ]


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class AsymmetricScaled(AsymmetricLayer, Scaled):
    def fans(self):
        return Fans(self.in_features, self.out_features, True)

    def forward(self, input):
        arguments = self.feedback_arguments()
        return 2 * asymmetric_linear(input, self.weight, self.bias, **arguments)


@pytest.mark.parametrize("rule", ["ss", "fa", "kp", "brsf"])
def test_a_registered_layer_is_converted_and_back(rule, monkeypatch):
    monkeypatch.setattr(asymmetric, "_FORMS", dict(asymmetric._FORMS))
    with pytest.raises(ValueError, match="extend AsymmetricLayer"):
        register_layer(Scaled, Scaled)
    with pytest.raises(ValueError, match="already"):
        register_layer(AsymmetricLinear, AsymmetricLinear)
    with pytest.raises(ValueError, match="AsymmetricLinear is a form of Linear, which Subclass"):
        register_layer(Subclass, AsymmetricLinear)
    assert "register_layer" in _reasons(convert_feedback(Scaled(3, 2)))[""]
    register_layer(Scaled, AsymmetricScaled)
    layer, x = Scaled(3, 2), torch.randn(4, 3, requires_grad=True)
    expected = layer(x)
    convert_feedback(layer, rule)
    y = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4, 2), 2.0) @ layer.current_feedback())
    assert type(convert_feedback(layer, "bp")) is Scaled
    # A subclass that computes what its parent does needs no class of its own.
    register_layer(Subclass, AsymmetricConv2d)
    convolution = convert_feedback(Subclass(2, 2, 1), rule)
    assert _converted(convolution) == [""]
    assert type(convert_feedback(convolution, "bp")) is Subclass
