"""The asymmetric operations against stock torch: forward, each gradient, types, misuse."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from core_utils import assert_same, on_the
from torch.autograd import forward_ad

from ss_detectron.layers import (
    asymmetric_conv1d,
    asymmetric_conv2d,
    asymmetric_conv3d,
    asymmetric_conv_transpose1d,
    asymmetric_conv_transpose2d,
    asymmetric_conv_transpose3d,
    asymmetric_linear,
    functional,
)


@pytest.fixture(autouse=True, params=["exchange", "function"])
def way(request):
    with on_the(request.param):
        yield request.param


class Case(NamedTuple):
    asymmetric: callable
    stock: callable
    input: tuple
    weight: tuple
    options: dict

    def tensors(self, dtype=torch.float64, device="cpu", seed=0):
        """x, w, b, B and an output gradient."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        bias = self.weight["transpose" in self.stock.__name__]
        x, w, b, fb = draw(*self.input), draw(*self.weight), draw(bias), draw(*self.weight)
        return x, w, b, fb, draw(*self.stock(x, w, b, **self.options).shape)

    def run_stock(self, x, w, b, grad):
        return _run(lambda *t: self.stock(*t, **self.options), x, w, b, grad)

    def run(self, x, w, b, grad, **feedback):
        return _run(lambda *t: self.asymmetric(*t, **self.options, **feedback), x, w, b, grad)


def _run(op, x, w, b, grad):
    """(y, dx, dw, db); db is None without a bias."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    y = op(*leaves)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    return (y.detach(), *grads, *([None] if b is None else []))


X = (2, 4, 7, 6)
CASES = {
    "conv": Case(asymmetric_conv2d, F.conv2d, X, (6, 4, 3, 3), {"stride": 2, "padding": 1}),
    "transposed": Case(
        asymmetric_conv_transpose2d, F.conv_transpose2d, X, (4, 3, 2, 2), {"stride": [2, 1]}
    ),
    "conv1d": Case(
        asymmetric_conv1d, F.conv1d, (2, 4, 7), (6, 2, 3), {"padding": "same", "groups": 2}
    ),
    "conv3d": Case(
        asymmetric_conv3d, F.conv3d, (2, 2, 4, 5, 3), (3, 2, 3, 2, 1), {"padding": (1, 0, 2)}
    ),
    "transposed1d": Case(
        asymmetric_conv_transpose1d, F.conv_transpose1d, (2, 4, 5), (4, 3, 2), {"stride": 2}
    ),
    "transposed3d": Case(
        asymmetric_conv_transpose3d, F.conv_transpose3d, (1, 2, 3, 2, 4), (2, 3, 2, 1, 3), {}
    ),
    "linear": Case(asymmetric_linear, F.linear, (4, 5), (3, 5), {}),
}
each_operation = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@each_operation
def test_only_the_input_gradient_goes_through_the_feedback_weight(case, with_bias):
    x, w, b, fb, grad = case.tensors()
    b = b if with_bias else None
    y, through_w, dw, db = case.run_stock(x, w, b, grad)
    dx = case.run_stock(x, fb, b, grad)[1]
    assert not torch.allclose(dx, through_w)
    for feedback, expected in ((w, through_w), (lambda weight, state: weight, through_w), (fb, dx)):
        actual = case.run(x, w, b, grad, feedback=feedback)
        assert_same(actual, (y, expected, dw, db))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("within", [("forward",), ("backward",), ("forward", "backward")])
@each_operation
def test_autocast_as_stock(case, within, dtype, parameters, device):
    x, w, b, fb, grad = case.tensors(parameters, device)

    def run(op):
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        with torch.autocast(device, dtype, enabled="forward" in within):
            y = op(*leaves, **case.options)
        with torch.autocast(device, dtype, enabled="backward" in within):
            return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype), allow_unused=True)

    expected = run(case.stock)
    actual = run(lambda *t, **o: case.asymmetric(*t, **o, feedback=t[1].detach()))
    lower = "forward" in within and parameters == torch.float32
    assert expected[0].dtype == (dtype if lower else parameters)
    assert torch.equal(actual[0], expected[0])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=torch.finfo(dtype).eps, atol=1e-5)
    dx = run(lambda *t, **o: case.asymmetric(*t, **o, feedback=fb))[1]
    expected = run(lambda x, w, b, **o: case.stock(x, fb, b, **o))[1]
    torch.testing.assert_close(dx, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@each_operation
def test_feedback_is_made_in_backward_only_and_only_for_an_input_gradient(case):
    x, w, b, fb, grad = case.tensors()
    calls = []

    def feedback(weight, state):
        calls.append(state)
        return fb

    def run(*needs):
        leaves = [t.detach().requires_grad_(n) for t, n in zip((x, w, b), needs, strict=True)]
        y = case.asymmetric(*leaves, **case.options, feedback=feedback, state=fb)
        assert not calls
        y.backward(grad)
        for leaf, need in zip(leaves, needs, strict=True):
            assert (leaf.grad is not None) == need
        made = len(calls)
        calls.clear()
        return made

    assert run(True, True, True) == 1
    assert run(True, False, False) == 1
    assert run(False, True, True) == 0
    assert run(False, False, True) == 0
    with torch.no_grad():
        case.asymmetric(x, w, b, **case.options, feedback=feedback)
    with torch.inference_mode():
        y = case.asymmetric(x, w, b, **case.options, feedback=feedback)
    assert torch.equal(y, case.stock(x, w, b, **case.options)) and not calls


@each_operation
def test_learned_feedback_receives_a_copy_of_the_weight_gradient(case):
    x, w, b, fb, grad = case.tensors()
    w.requires_grad_()
    fb.requires_grad_()
    y = case.asymmetric(x, w, b, **case.options, feedback=fb)
    # Not .backward(): it would hide a shared tensor by copying it as it accumulates.
    of_weight, of_feedback = torch.autograd.grad(y, (w, fb), grad)
    assert torch.equal(of_feedback, of_weight)
    assert of_feedback.data_ptr() != of_weight.data_ptr()


@each_operation
def test_an_operation_runs_on_stock_autograd_where_it_can(case, way):
    x, w, b, fb, _ = case.tensors()
    y = case.asymmetric(x.requires_grad_(), w, b, **case.options, feedback=fb)
    name = type(y.grad_fn).__name__
    available = functional._hooks_of_others is not None  # not in every torch
    stock = type(case.stock(x, w, b, **case.options).grad_fn).__name__
    assert name == stock if way == "exchange" and available else name.startswith("_Asymmetric")


@each_operation
def test_derivatives_other_than_a_backward_passs_are_refused(case):
    x, w, b, fb, _ = case.tensors()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.grad(lambda x: case.asymmetric(x, w, b, **case.options, feedback=fb).sum())(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError)):
            case.asymmetric(dual, w, b, **case.options, feedback=fb)


@each_operation
def test_second_derivative_is_refused(case):
    x, w, b, fb, grad = case.tensors()
    x.requires_grad_()
    y = case.asymmetric(x, w, b, **case.options, feedback=fb)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y, x, grad, create_graph=True)


@each_operation
def test_wrong_feedback_is_refused(case):
    x, w, b, fb, grad = case.tensors()
    with pytest.raises(ValueError, match="must have the weight's"):
        case.asymmetric(x, w, b, **case.options, feedback=fb[1:])
    with pytest.raises(ValueError, match="state goes with a callable"):
        case.asymmetric(x, w, b, **case.options, feedback=fb, state=fb)
    with pytest.raises(ValueError, match="feedback is None"):
        case.asymmetric(x, w, b, **case.options, feedback=None)
    with pytest.raises(ValueError, match="complex"):
        case.asymmetric(x.cfloat(), w.cfloat(), b.cfloat(), feedback=w.cfloat())
    y = case.asymmetric(x.requires_grad_(), w, b, **case.options, feedback=lambda *_: fb[1:])
    with pytest.raises(ValueError, match="the rule gave a feedback weight of shape"):
        y.backward(grad)
    y = case.asymmetric(x, w, b, **case.options, feedback=fb.to("meta"))
    with pytest.raises(ValueError, match="on meta for a weight of shape"):
        y.backward(grad)
    with pytest.raises(TypeError, match="feedback"):
        case.asymmetric(x, w, b, **case.options)


def test_wrong_padding_is_refused():
    x, w, b, fb, _ = CASES["conv"].tensors()
    with pytest.raises(ValueError, match="padding is 'full'"):
        asymmetric_conv2d(x, w, b, padding="full", feedback=fb)
    with pytest.raises(ValueError, match="stride 1"):
        asymmetric_conv2d(x, w, b, padding="same", stride=2, feedback=fb)


@each_operation
def test_weight_changed_between_forward_and_backward_is_refused_as_by_stock(case, way):
    if way == "function":
        pytest.skip("hooks for saved tensors end autograd's check, of stock operations too")
    x, w, b, fb, grad = case.tensors()
    x.requires_grad_()
    w.requires_grad_()
    for run in (case.stock, lambda *t, **o: case.asymmetric(*t, **o, feedback=fb)):
        y = run(x, w, b, **case.options)
        with torch.no_grad():
            w.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad)
