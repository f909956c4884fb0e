"""The asymmetric operations: forward as stock torch, backward through a feedback weight.

For y = W * x + b and an error dE/dy that arrives from above,

    dE/dx = B^T * dE/dy        (stock: W^T * dE/dy)
    dE/dW, dE/db               as stock, from the same dE/dy,

where the feedback weight B has W's shape (Lillicrap et al. 2016; Liao, Leibo and Poggio 2016,
arXiv:1510.05067; Xiao et al. 2019, arXiv:1811.03567). The weight's gradient does not depend on
which weight the backward pass is given, so there are two ways to the same gradients:

* the operation is the stock one, and of what autograd saved for its backward pass the weight alone
  is exchanged for B. All of it runs in torch, autocast included; Python is asked only for B.
* an autograd Function with B in the weight's place: where the exchange cannot be (in a graph being
  compiled, under hooks that others have for saved tensors).

Where no backward pass can come, and in a program being recorded for stock tools (torch.export,
torch.jit.trace, ONNX, fvcore's counting of operations), the operation is the stock one alone.

``feedback`` says what B is. It is either a tensor of the weight's shape, or a callable
``feedback(weight, state) -> B`` that the *backward* pass calls, so that the rule in force then
decides, whatever it was in the forward pass (a compiled graph keeps the rule it was compiled
with); ``state`` is passed on to it. A feedback weight that
is learned (Kolen-Pollack, Akrout et al. 2019, arXiv:1904.05391) is a tensor that requires a
gradient: it receives the weight's own.
"""

import functools
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.utils import _ntuple
from torch.overrides import handle_torch_function, has_torch_function

__all__ = [
    "asymmetric_conv1d",
    "asymmetric_conv2d",
    "asymmetric_conv3d",
    "asymmetric_conv_transpose1d",
    "asymmetric_conv_transpose2d",
    "asymmetric_conv_transpose3d",
    "asymmetric_linear",
]

FeedbackFn = Callable[[Tensor, Tensor | None], Tensor]
Feedback = Tensor | FeedbackFn
IntOrTuple = Any  # int | Sequence[int]; torch's own annotations do not agree on it
Options = tuple[Any, ...]


def _overridable(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Have torch's function modes see the operation itself, as they see torch's own."""

    @functools.wraps(operation)
    def overridable(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tensors = input, weight
        if not torch.compiler.is_compiling() and has_torch_function(tensors):
            return handle_torch_function(overridable, tensors, *tensors, *args, **kwargs)
        return operation(input, weight, *args, **kwargs)

    return overridable


def _numbers(dims: int) -> Callable[[Any], tuple[int, ...]]:
    """A number -> as many of it."""
    numbers: Callable[[Any], tuple[int, ...]] = _ntuple(dims)  # type: ignore[no-untyped-call]
    return numbers


def _conv(dims: int) -> Callable[..., Tensor]:
    numbers = _numbers(dims)

    def asymmetric_conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: IntOrTuple = 1,
        padding: str | IntOrTuple = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        *,
        feedback: Feedback,
        state: Tensor | None = None,
    ) -> Tensor:
        """
        The stock convolution of as many dimensions, whose input gradient flows through B, not W.

        Args:
            input: (N, C_in, *size) or (C_in, *size); N may be 0.
            weight: W, (C_out, C_in / groups, *kernel_size).
            bias: (C_out,) or None.
            stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; ``padding``
                also 'same' or 'valid'.
            feedback: B, of W's shape, or ``feedback(weight, state) -> B``, called in backward.
            state: what a callable ``feedback`` keeps; receives W's gradient if it requires one.

        Returns:
            (N, C_out, *output_size), exactly as the stock operation gives it.

        Raises:
            ValueError: B or ``padding`` does not fit.
            RuntimeError: a second or forward-mode derivative, or one of torch.func, is asked for.
        """
        function, state = _feedback_source(feedback, state, weight)
        stride, dilation = numbers(stride), numbers(dilation)
        if isinstance(padding, str):
            input, padding = _pad_by_name(input, weight, padding, stride, dilation)
        options = stride, numbers(padding), dilation, False, numbers(0), groups
        return _convolve(dims, input, weight, bias, function, state, options)

    asymmetric_conv.__name__ = asymmetric_conv.__qualname__ = f"asymmetric_conv{dims}d"
    return _overridable(asymmetric_conv)


def _conv_transpose(dims: int) -> Callable[..., Tensor]:
    numbers = _numbers(dims)

    def asymmetric_conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: IntOrTuple = 1,
        padding: IntOrTuple = 0,
        output_padding: IntOrTuple = 0,
        groups: int = 1,
        dilation: IntOrTuple = 1,
        *,
        feedback: Feedback,
        state: Tensor | None = None,
    ) -> Tensor:
        """
        The stock transposed convolution of as many dimensions, with input gradient through B.

        Args:
            input: (N, C_in, *size) or (C_in, *size); N may be 0.
            weight: W, (C_in, C_out / groups, *kernel_size).
            bias, stride, padding, output_padding, groups, dilation: as in
                ``torch.nn.functional.conv_transpose2d``.
            feedback, state: as in :func:`asymmetric_conv2d`.

        Returns:
            (N, C_out, *output_size), exactly as the stock operation gives it.

        Raises:
            ValueError: B does not fit.
            RuntimeError: a second or forward-mode derivative, or one of torch.func, is asked for.
        """
        function, state = _feedback_source(feedback, state, weight)
        stride, padding, dilation = numbers(stride), numbers(padding), numbers(dilation)
        options = stride, padding, dilation, True, numbers(output_padding), groups
        return _convolve(dims, input, weight, bias, function, state, options)

    name = f"asymmetric_conv_transpose{dims}d"
    asymmetric_conv_transpose.__name__ = asymmetric_conv_transpose.__qualname__ = name
    return _overridable(asymmetric_conv_transpose)


asymmetric_conv1d, asymmetric_conv2d, asymmetric_conv3d = map(_conv, (1, 2, 3))
asymmetric_conv_transpose1d, asymmetric_conv_transpose2d, asymmetric_conv_transpose3d = map(
    _conv_transpose, (1, 2, 3)
)


@_overridable
def asymmetric_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    feedback: Feedback,
    state: Tensor | None = None,
    part: tuple[slice, ...] | None = None,
) -> Tensor:
    """
    :func:`torch.nn.functional.linear` whose input gradient is dE/dy B instead of dE/dy W.

    Args:
        input: (*, C_in), any number of leading dimensions, none and empty ones included.
        weight: W, (C_out, C_in).
        bias: (C_out,) or None.
        feedback, state: as in :func:`asymmetric_conv2d`.
        part: the rows and columns of W that the map uses, and of a B that is made for all of W;
            for one of several projections that are packed in W.

    Returns:
        (*, C_out), exactly as ``linear`` gives it.

    Raises:
        ValueError: B does not fit.
        RuntimeError: a second or forward-mode derivative, or one of torch.func, is asked for.
    """
    function, state = _feedback_source(feedback, state, weight)
    if stock_serves(input, weight, bias):
        return F.linear(input, _used(weight, part), bias)
    if _exchangeable(input):
        output = F.linear(input, _used(_tie(weight, state, function), part), bias)
        return _exchange_weight(output, input, weight, state, function, part)
    dtype = _autocast_dtype(input)
    return cast(Tensor, _AsymmetricLinear.apply(input, weight, bias, state, function, dtype, part))


# Not in every torch; where it is not, a program is recorded as a graph is compiled.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def is_recording() -> bool:
    """Whether a program is being recorded for stock tools, which know no rule."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or _is_exporting()


def stock_serves(*tensors: Tensor | None) -> bool:
    """Whether the stock operation is enough: for a recorded program, or without a backward pass."""
    if is_recording():
        return True
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not torch.compiler.is_compiling() and _other_derivative_wanted(tensors):
        raise RuntimeError(
            "asymmetric feedback works in .backward() and torch.autograd.grad, not in torch.func "
            "or in forward-mode derivatives. Where no gradient is wanted, use torch.no_grad(); "
            "else convert the model back first: convert_feedback(model, 'backpropagation')."
        )
    return not wanted


def _other_derivative_wanted(given: Sequence[Tensor | None]) -> bool:
    """Whether one is wanted in forward mode, or within transforms of torch.func."""
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and forward_ad._current_level < 0:
        return False
    tensors = [t for t in given if t is not None]
    if forward_ad._current_level >= 0:
        unpack: Callable[[Tensor], forward_ad.UnpackedDualTensor] = forward_ad.unpack_dual
        return transformed or any(unpack(t).tangent is not None for t in tensors)
    if not (transformed and torch.is_grad_enabled()):
        return False
    functorch = torch._C._functorch
    while True:  # a batch of tensors does not require a gradient itself, though they may
        if any(t.requires_grad for t in tensors):
            return True
        wrapped = [t for t in tensors if functorch.is_functorch_wrapped_tensor(t)]
        if not wrapped:
            return False
        tensors = [functorch.get_unwrapped(t) for t in wrapped]


def _given(weight: Tensor, state: Tensor | None) -> Tensor:
    """The feedback function of a B that was passed as a tensor."""
    return cast(Tensor, state)


def _feedback_source(
    feedback: Feedback, state: Tensor | None, weight: Tensor
) -> tuple[FeedbackFn, Tensor | None]:
    if weight.is_complex():
        raise ValueError("asymmetric feedback is defined for real weights; this one is complex")
    function: FeedbackFn
    if isinstance(feedback, Tensor):
        if state is not None:
            raise ValueError("state goes with a callable feedback; a tensor is its own state")
        if feedback.shape != weight.shape:
            raise ValueError(
                f"the feedback weight has shape {tuple(feedback.shape)}; "
                f"it must have the weight's, {tuple(weight.shape)}"
            )
        function, state = _given, feedback
    elif callable(feedback):
        function = feedback
    else:
        raise ValueError(f"feedback is {feedback!r}; it must be a tensor or a function")
    if state is not None and state.requires_grad and not weight.requires_grad:
        state = state.detach()  # it learns what the weight learns
    return function, state


def _pad_by_name(
    input: Tensor,
    weight: Tensor,
    padding: str,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, tuple[int, ...]]:
    """Numbers for padding 'valid' and 'same'; pads the input where the two sides differ by one."""
    if padding == "valid":
        return input, (0,) * len(stride)
    if padding != "same":
        raise ValueError(f"padding is {padding!r}; it must be 'same', 'valid' or numbers")
    if any(s != 1 for s in stride):
        raise ValueError(f"padding='same' needs stride 1; the stride is {tuple(stride)}")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    # torch puts the odd one on the right and at the bottom, and so do we.
    if any(t % 2 for t in total):
        input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
    return input, tuple(t // 2 for t in total)


def _convolve(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: FeedbackFn,
    state: Tensor | None,
    options: Options,
) -> Tensor:
    """Either way; ``options`` as ``aten.convolution_backward`` takes them."""
    if stock_serves(input, weight, bias):
        return _stock_convolution(dims, input, weight, bias, options)
    if input.dim() == dims + 1:  # unbatched, as torch itself does it
        batch = input.unsqueeze(0)
        return _convolve(dims, batch, weight, bias, feedback, state, options).squeeze(0)
    if input.dim() == dims + 2 and _exchangeable(input):
        tied = _tie(weight, state, feedback)
        output = _stock_convolution(dims, input, tied, bias, options)
        return _exchange_weight(output, input, weight, state, feedback)
    dtype = _autocast_dtype(input)
    function = _AsymmetricConvolution.apply
    return cast(Tensor, function(input, weight, bias, state, feedback, dtype, dims, options))


def _stock_convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    stride, padding, dilation, transposed, output_padding, groups = options
    operation: Callable[..., Tensor]
    if transposed:
        operation = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return operation(input, weight, bias, stride, padding, output_padding, groups, dilation)
    operation = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return operation(input, weight, bias, stride, padding, dilation, groups)


def _refuse_second_derivative() -> None:
    # autograd runs a backward with gradients enabled only under create_graph=True. (A compiler
    # traces it so too; a compiled graph then refuses the second derivative by itself.)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "asymmetric feedback has no second derivative: B stands in for the weight in backward "
            "without being a function of the loss. Call backward without create_graph=True, or "
            "convert the model back first: convert_feedback(model, 'backpropagation')."
        )


def _feedback_weight(weight: Tensor, state: Tensor | None, feedback: FeedbackFn) -> Tensor:
    """B as the rule in force now gives it."""
    given = feedback(weight, state)
    if given.shape != weight.shape or given.device != weight.device:
        raise ValueError(
            f"the rule gave a feedback weight of shape {tuple(given.shape)} on {given.device} "
            f"for a weight of shape {tuple(weight.shape)} on {weight.device}"
        )
    return given


def _state_gradient(
    weight: Tensor, feedback: Tensor, state: Tensor, grad_weight: Tensor
) -> Tensor | None:
    """
    A learned feedback weight receives what the weight receives (a copy: optimisers and gradient
    scalers change gradients in place), unless this pass runs on backpropagation.
    """
    return None if feedback is weight else grad_weight.to(state.dtype, copy=True)


# The exchange ------------------------------------------------------------------------------------


# Not public, and not in every torch; without it, all goes through the Functions.
_hooks_of_others = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _exchangeable(input: Tensor) -> bool:
    """Whether what autograd saves of an operation on ``input`` may be exchanged."""
    return (
        (input.is_cpu or input.is_cuda)
        and not input.is_nested
        and not torch.compiler.is_compiling()
        and not is_saving_hooked()  # a saved tensor takes one pair of hooks
    )


def is_saving_hooked() -> bool:
    """Whether what autograd saves goes through hooks: activations are checkpointed, offloaded."""
    return _hooks_of_others is None or _hooks_of_others(False) is not None


def _exchange_weight(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    state: Tensor | None,
    feedback: FeedbackFn,
    part: tuple[slice, ...] | None = None,
) -> Tensor:
    """``output`` of a stock operation, with B in the place of the weight saved for backward."""
    if not (output.requires_grad and input.requires_grad):
        return output
    version = weight._version

    def unpack(saved: tuple[torch.dtype, torch.Size]) -> Tensor:
        dtype, shape = saved
        _refuse_second_derivative()
        if weight._version != version:  # autograd's own check ends with the exchange
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a weight of shape {tuple(weight.shape)}, between the "
                "forward and the backward pass"
            )
        given = _feedback_weight(weight, state, feedback)
        if part is not None:
            given = given[part]
        # Every operation on it costs a small network some per mille of a step.
        if given.dtype != dtype:
            given = given.to(dtype)
        if weight.dim() == 2:
            given = given.t()
        return given if len(shape) == given.dim() else given.expand(shape)

    # Of the weight, or its cast copy under autocast, type and shape alone are kept.
    node: Any = output.grad_fn
    if weight.dim() > 2:
        node._raw_saved_weight.register_hooks(_type_and_shape, unpack)
        return output
    while not hasattr(node, "_raw_saved_mat2"):  # behind a view, or what adds the bias
        node = node.next_functions[0][0]
    node._raw_saved_mat2.register_hooks(_type_and_shape, unpack)
    return output


_type_and_shape = attrgetter("dtype", "shape")


def _tie(weight: Tensor, state: Tensor | None, feedback: FeedbackFn) -> Tensor:
    """The weight, whose gradient a learned feedback weight receives as well."""
    if state is None or not (state.requires_grad and weight.requires_grad):
        return weight
    return cast(Tensor, _Tie.apply(weight, state, feedback))


class _Tie(torch.autograd.Function):
    """(W, B) -> W; its gradient -> both."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, state: Tensor, feedback: FeedbackFn) -> Tensor:
        ctx.feedback = feedback
        ctx.save_for_backward(weight, state)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        weight, state = ctx.saved_tensors
        given = _feedback_weight(weight, state, ctx.feedback)
        return grad_weight, _state_gradient(weight, given, state, grad_weight), None


# The Functions -----------------------------------------------------------------------------------


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The type autocast computes in on the input's device, or None; it leaves float64 alone."""
    device = input.device.type
    if (
        # An older torch cannot trace the first question, and compiles for devices that have it.
        (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device))
        and torch.is_autocast_enabled(device)
        and input.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return None


def _cast(dtype: torch.dtype | None, *tensors: Any) -> Any:
    return [t if t is None or dtype is None else t.to(dtype) for t in tensors]


def _feedback_in_backward(ctx: Any, weight: Tensor, state: Tensor | None) -> Tensor:
    """B; W itself where nobody asks for B."""
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[3]):
        return weight
    return _feedback_weight(weight, state, ctx.feedback)


class _AsymmetricConvolution(torch.autograd.Function):
    """Convolution, transposed or not: one ``aten.convolution_backward`` with B in W's place."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        feedback: FeedbackFn,
        dtype: torch.dtype | None,
        dims: int,
        options: Options,
    ) -> Tensor:
        ctx.feedback, ctx.options = feedback, options
        ctx.bias_shape = None if bias is None else list(bias.shape)
        input, cast_weight, bias = _cast(dtype, input, weight, bias)
        # The weight itself is saved, not its cast copy: B is built from it, and it costs nothing.
        ctx.save_for_backward(input, weight, state)
        return _stock_convolution(dims, input, cast_weight, bias, options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        input, weight, state = ctx.saved_tensors
        need_input, need_weight, need_bias, need_state = ctx.needs_input_grad[:4]
        # The weight's gradient does not depend on which weight is passed; B alone serves both.
        feedback = _feedback_in_backward(ctx, weight, state)
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_output,
            input,
            feedback.to(input.dtype),
            ctx.bias_shape,
            *ctx.options,
            [need_input, need_weight, need_bias],
        )
        grad_state = None
        if need_weight and need_state:
            grad_state = _state_gradient(weight, feedback, state, grad_weight)
        return grad_input, grad_weight, grad_bias, grad_state, None, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """(*, C) -> (N, C), for no leading dimensions and empty ones too."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _used(weight: Tensor, part: tuple[slice, ...] | None) -> Tensor:
    return weight if part is None else weight[part].contiguous()


class _AsymmetricLinear(torch.autograd.Function):
    """Linear map: two matrix products, the first with B in W's place."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        feedback: FeedbackFn,
        dtype: torch.dtype | None,
        part: tuple[slice, ...] | None,
    ) -> Tensor:
        ctx.feedback, ctx.part = feedback, part
        used = _used(weight, part)
        input, used, bias = _cast(dtype, input, used, bias)
        ctx.save_for_backward(input, weight, state)
        # The input's gradient is then computed in columns, as torch does it: it rounds otherwise.
        ctx.in_columns = _rows(input).t().is_contiguous()
        if used is not weight and not torch.compiler.is_compiling():
            # What torch multiplies, a matrix or a batch of them, depends on it.
            used = used.detach().requires_grad_(weight.requires_grad)
        output = F.linear(input, used, bias)
        # In more or fewer dimensions than two it can be a view of a matrix. To whoever changes it
        # in place it must not be one: autograd refuses that of a Function's views.
        return output if output.dim() == 2 else torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        input, weight, state = ctx.saved_tensors
        need_input, need_weight, need_bias, need_state = ctx.needs_input_grad[:4]
        grad_input = grad_weight = grad_bias = grad_state = None
        feedback = _feedback_in_backward(ctx, weight, state)
        rows, input_rows = _rows(grad_output), _rows(input)
        if need_input:
            used = (feedback if ctx.part is None else feedback[ctx.part]).to(input.dtype)
            grad_rows = (used.t() @ rows.t()).t() if ctx.in_columns else rows @ used
            grad_input = grad_rows.view(input.shape)
        if need_weight:
            grad_weight = rows.t() @ input_rows
            if ctx.part is not None:
                whole = grad_weight.new_zeros(weight.shape)
                whole[ctx.part] = grad_weight
                grad_weight = whole
        if grad_weight is not None and need_state:
            grad_state = _state_gradient(weight, feedback, state, grad_weight)
        if need_bias:
            grad_bias = rows.sum(0)
        return grad_input, grad_weight, grad_bias, grad_state, None, None, None
