"""Random options, shapes, types and memory layouts: every layer against the stock one.

What the stock layer takes, the asymmetric one computes; what it refuses, in its constructor, its
forward or its backward pass, the asymmetric one refuses there, by the same error.
"""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from core_utils import RULES, each_rule, on_the
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ss_detectron.layers import (
    FEEDBACK_SCALES,
    AsymmetricConv1d,
    AsymmetricConv2d,
    AsymmetricConv3d,
    AsymmetricConvTranspose1d,
    AsymmetricConvTranspose2d,
    AsymmetricConvTranspose3d,
    AsymmetricLinear,
    AsymmetricLocallyConnected2d,
    LocallyConnected2d,
    backpropagation,
    convert_feedback,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]

ASYMMETRIC = {
    nn.Conv1d: AsymmetricConv1d,
    nn.Conv2d: AsymmetricConv2d,
    nn.Conv3d: AsymmetricConv3d,
    nn.ConvTranspose1d: AsymmetricConvTranspose1d,
    nn.ConvTranspose2d: AsymmetricConvTranspose2d,
    nn.ConvTranspose3d: AsymmetricConvTranspose3d,
    nn.Linear: AsymmetricLinear,
    LocallyConnected2d: AsymmetricLocallyConnected2d,
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = {"BN": nn.BatchNorm2d, "GN": lambda channels: nn.GroupNorm(1, channels)}
try:
    from detectron2.layers import Conv2d as Detectron2Conv2d
    from detectron2.layers import FrozenBatchNorm2d

    from ss_detectron.layers.detectron2 import AsymmetricDetectron2Conv2d
except ImportError:
    Detectron2Conv2d = None
else:
    ASYMMETRIC[Detectron2Conv2d] = AsymmetricDetectron2Conv2d
    NORMS["FrozenBN"] = FrozenBatchNorm2d


def _reversed(tensor: Tensor) -> Tensor:
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


# How a tensor lies in memory: not only dense, or from its storage's begin.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t,
    "reversed": _reversed,
    "sliced": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "shifted": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "one number": lambda t: t.new_ones(()).expand(t.shape),
}


class Case(NamedTuple):
    """A stock layer and what it is called on."""

    kind: type[nn.Module]
    sizes: tuple
    """Positional arguments: channels or features, and the kernel's size."""
    options: dict[str, Any]
    norm: str | None
    activation: Callable | None
    """In Detectron2's Conv2d where it is that, else after the layer."""
    training: bool
    dtype: torch.dtype
    seed: int
    needs: tuple[bool, bool, bool]
    """Whether input, weight and bias require gradients."""
    shape: tuple[int, ...]
    """Of the input."""
    input_dtype: torch.dtype
    layout: str
    output_layout: str
    """Of the gradient that arrives."""
    output_size: list[int] | None

    def build(self, rule: str | None = None, scale: str = "mean_abs") -> nn.Module:
        """The stock layer, or the asymmetric one, with the same weights."""
        torch.manual_seed(self.seed)
        kind, options = self.kind, dict(self.options)
        if rule is not None:
            kind = ASYMMETRIC[kind]
            options.update(rule=rule, scale=scale)
        if self.kind is Detectron2Conv2d:
            norm = None if self.norm is None else NORMS[self.norm](self.sizes[1])
            options.update(norm=norm, activation=self.activation)
        layer = kind(*self.sizes, **options).to(self.dtype).train(self.training)
        layer.weight.requires_grad_(self.needs[1])
        if layer.bias is not None:
            layer.bias.requires_grad_(self.needs[2])
        return layer

    def input(self) -> Tensor:
        drawn = draw_tensor(self.shape, self.input_dtype, self.layout, self.seed).detach()
        return drawn.requires_grad_(self.needs[0] and drawn.is_floating_point())

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        y = self.apart(layer, x)
        follows = self.kind is not Detectron2Conv2d and self.activation is not None
        return self.activation(y) if follows else y

    def apart(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The layer alone."""
        return layer(x, self.output_size) if self.kind in TRANSPOSED else layer(x)

    def input_gradient(self, stock: nn.Module, feedback: Tensor, grad: Tensor) -> Tensor:
        """What the stock layer sends back with ``feedback`` for its weight."""
        x, after = self.input(), [self.activation]
        bare = copy.deepcopy(stock)
        if self.kind is Detectron2Conv2d:
            after.insert(0, bare.norm)
            bare.norm = bare.activation = None
        y = self.apart(bare, x)
        z = leaf = y.detach().requires_grad_()
        z = z.clone()
        for function in filter(None, after):
            z = function(z)
        (grad,) = torch.autograd.grad(z, leaf, grad)
        with torch.no_grad():
            bare.weight.copy_(feedback)
        return torch.autograd.grad(self.apart(bare, x), x, grad)[0]


def draw_tensor(shape: tuple, dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return LAYOUTS[layout](drawn)


# What need not fit, one thing at a time.
STRANGE = {
    "groups": [0, -1, 5],
    "stride": [0, -1, (1, 0), (1, 2, 3)],
    "padding": [-1, "full", (9, 9), (1, 2, 3)],
    "dilation": [0, -1, 9],
    "padding_mode": ["mirror", "reflect"],
    "output_padding": [7, -1],
    "kernel": [0, 9, (3, 0), -1, (1, 1, 1)],
    "in_channels": [0, -1],
    "out_channels": [0, -1],
    "shape": ["channels", "dims", "more dims", "no height", "no dims", "tiny"],
    "input_dtype": [torch.float64, torch.float32, torch.float16, torch.int64],
    "output_size": [[1, 1], [9, 9], [3]],
}


def _numbers(dims: int, least: int, most: int) -> st.SearchStrategy:
    number = st.integers(least, most)
    return number | st.tuples(*[number] * dims)


@st.composite
def cases(draw: Callable, strange: bool) -> Case:
    """Random cases, of sizes that take no time."""
    kind = draw(st.sampled_from(list(ASYMMETRIC)))
    is_linear = kind is nn.Linear
    dims = 0 if is_linear else int(kind.__name__[-2])
    dtype = input_dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    options, norm, output_size = {"bias": draw(st.booleans())}, None, None
    if is_linear:
        sizes = [draw(st.integers(1, 5)), draw(st.integers(1, 5))]
        shape = (*draw(st.lists(st.integers(0, 3), max_size=3)), sizes[0])
    else:
        groups = draw(st.sampled_from([1, 1, 2, 3]))
        sizes = [groups * draw(st.integers(1, 3)) for _ in range(2)] + [draw(_numbers(dims, 1, 4))]
        size = [draw(st.integers(1, 9)) for _ in range(dims)]
        shape = (draw(st.integers(0, 3)), sizes[0], *size)[draw(st.sampled_from([0, 1])) :]
        options.update(
            stride=draw(_numbers(dims, 1, 3)),
            padding=draw(_numbers(dims, 0, 3)),
            dilation=draw(_numbers(dims, 1, 3)),
            groups=groups,
        )
        if kind in TRANSPOSED:
            options["output_padding"] = draw(_numbers(dims, 0, 2))
        else:
            named = draw(st.sampled_from([{}, {"padding": "valid"}, {"padding": "same"}]))
            options.update(named, **{"stride": 1} if "same" in named.values() else {})
        if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            modes = ["zeros", "zeros", "reflect", "replicate", "circular"]
            options["padding_mode"] = draw(st.sampled_from(modes))
        if kind is LocallyConnected2d:
            shape = (draw(st.integers(0, 3)), sizes[0], *size)
            options["input_size"] = tuple(size)
            del options["dilation"], options["groups"]
        if kind is Detectron2Conv2d:
            norm = draw(st.sampled_from([None, *NORMS]))
    if strange:
        what = draw(st.sampled_from(list(STRANGE)))
        value = draw(st.sampled_from(STRANGE[what]))
        at = len(shape) - (dims + 1)  # of the channels
        if what == "kernel":
            sizes[2:] = [value] * len(sizes[2:])
        elif what in ("in_channels", "out_channels"):
            sizes[what == "out_channels"] = value
            shape = (*shape[:at], max(sizes[0], 0), *shape[at + 1 :])
        elif what == "input_dtype":
            input_dtype = value
            options = {k: 1 if v in ("same", "valid") else v for k, v in options.items()}
        elif what == "output_size":
            output_size = value
        elif what == "shape":
            shape = {
                "channels": (*shape[:at], shape[at] + 1, *shape[at + 1 :]),
                "dims": shape[-2:],
                "more dims": (1, 2, *shape),
                "no height": (*shape[:-2], 0, *shape[-1:]),
                "no dims": (),
                "tiny": (*shape[:-2], 1, 1),
            }[value]
        elif what != "padding_mode" or kind is not Detectron2Conv2d:  # it pads with zeros
            options[what] = value
    return Case(
        kind,
        tuple(sizes),
        options,
        norm,
        draw(st.sampled_from([None, F.relu, F.relu_, F.gelu])),
        draw(st.booleans()),
        dtype,
        draw(st.integers(0, 99)),
        draw(st.tuples(*[st.booleans()] * 3)),
        shape,
        input_dtype,
        draw(st.sampled_from(list(LAYOUTS))),
        draw(st.sampled_from(list(LAYOUTS))),
        output_size,
    )


class Refused(Exception):
    """By both, alike."""


def attempt(function: Callable) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def both(case: Case, asymmetric: Callable, stock: Callable) -> tuple[Any, Any]:
    """What the two give; ends in :class:`Refused` where they raise the same error."""
    (expected, error), (actual, own) = attempt(stock), attempt(asymmetric)
    if own is error is None:
        return actual, expected
    assert own is not None and error is not None, f"stock: {error!r}; ours: {own!r}"
    if case.options.get("padding") in ("same", "valid"):
        # To the stock layer that is one operation of torch, with checks of its own.
        assert type(own) in (type(error), RuntimeError, ValueError), own
    else:
        assert type(own) is type(error)
        assert str(own).replace("Asymmetric", "") == str(error)
    raise Refused


def compare(case: Case, rule: str, scale: str, built: bool) -> None:
    """
    Args:
        case: of the stock layer.
        rule, scale: of the asymmetric one.
        built: whether that one comes from its own constructor, or is converted.
    """
    if built:
        layer, stock = both(case, lambda: case.build(rule, scale), case.build)
    else:
        stock, error = attempt(case.build)
        if error is not None:
            raise Refused
        layer = convert_feedback(copy.deepcopy(stock), rule, scale=scale)
    x, x_stock = case.input(), case.input()
    y, y_stock = both(case, lambda: case.call(layer, x), lambda: case.call(stock, x_stock))
    assert_equal("output", y, y_stock)
    assert y.stride() == y_stock.stride()
    assert y.requires_grad == y_stock.requires_grad
    for name, buffer in stock.named_buffers():
        assert_equal(name, layer.get_buffer(name), buffer)
    if not y.requires_grad:
        return

    names = [name for name, p in stock.named_parameters() if p.requires_grad]
    if x.requires_grad:
        names.insert(0, "input")
    grad = draw_tensor(y.shape, y.dtype, case.output_layout, case.seed + 1)

    def gradients(module: nn.Module, x: Tensor, y: Tensor, *more: str) -> list[Tensor]:
        tensors = {"input": x, **dict(module.named_parameters())}
        wanted = [tensors[name] for name in (*names, *more)]
        return torch.autograd.grad(y, wanted, grad, retain_graph=True)

    learned = ["feedback_weight"] if rule == "kp" and case.needs[1] else []
    actual, expected = both(
        case,
        lambda: gradients(layer, x, y, *learned),
        lambda: gradients(stock, x_stock, y_stock),
    )
    assert all(parameter.grad is None for parameter in layer.parameters())
    # Sums of a linear layer are taken in another order where its input is no plain matrix.
    equal = assert_close if case.kind is nn.Linear else assert_equal
    if learned:
        *actual, of_feedback = actual
        assert_equal("feedback", of_feedback, actual[names.index("weight")])
    if x.requires_grad and rule != "bp":
        with backpropagation(layer):
            through_weight = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
        equal("input, through the weight", through_weight, expected[0])
        through_feedback = case.input_gradient(stock, layer.current_feedback(), grad)
        expected = (through_feedback, *expected[1:])
    for name, a, e in zip(names, actual, expected, strict=True):
        equal(name, a, e)


def assert_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def assert_close(name: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, equal_nan=True, msg=lambda m: f"{name}: {m}")


def fuzz(examples: int, strange: bool) -> Counter:
    """The same examples in every run; counts what came of them."""
    counts = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],  # to explain failures would trace every line
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        cases(strange),
        *map(
            st.sampled_from, (RULES, list(FEEDBACK_SCALES), [False, True], ["exchange", "function"])
        ),
    )
    def run(case, rule, scale, built, way):
        try:
            with on_the(way):
                compare(case, rule, scale, built)
            counts["computed"] += 1
        except Refused:
            counts["refused"] += 1

    run()
    return counts


few_and_many = pytest.mark.parametrize(
    "examples", [200, pytest.param(3000, marks=pytest.mark.slow)], ids=["few", "many"]
)


@few_and_many
def test_what_stock_computes(examples):
    counts = fuzz(examples, strange=False)
    assert counts["computed"] > examples / 2, counts


@few_and_many
def test_what_stock_refuses(examples):
    counts = fuzz(examples, strange=True)
    assert counts["refused"] > examples / 2, counts


# What the search has found.


@pytest.mark.parametrize("shape", [(5,), (2, 4, 5), (2, 0, 5)], ids=str)
def test_a_linear_layer_of_other_than_a_matrix_may_be_changed_in_place(shape):
    layer, x = AsymmetricLinear(5, 3, rule="bp"), torch.randn(shape)
    F.relu_(layer(x)).sum().backward()
    expected = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).relu().sum(), layer.bias)
    assert_close("bias", layer.bias.grad, expected[0])


@pytest.mark.parametrize("scale", FEEDBACK_SCALES)
@each_rule
def test_a_layer_without_weights(rule, scale):
    for sizes in [(0, 3), (3, 0), (0, 0)]:
        layer = AsymmetricLinear(*sizes, rule=rule, scale=scale)
        x = torch.ones(2, sizes[0], requires_grad=True)
        layer(x).sum().backward()
        assert_equal("input", x.grad, torch.zeros_like(x))


def test_feedback_that_could_learn_makes_a_frozen_layer_need_no_gradient():
    layer = AsymmetricLinear(3, 2, rule="kp").requires_grad_(False)
    layer.feedback_weight.requires_grad_()
    assert not layer(torch.ones(1, 3)).requires_grad
