"""
Locally connected layers: convolutions each of whose windows has weights of its own.

Tensors are (N, C, H, W), and in memory the batch comes last, (H, W, C, N), as strides only: a chain
of such layers copies nothing from one to the next. In that order the windows of the input are few
and large blocks of memory, and their products one batch of matrix products.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .asymmetric import AsymmetricLayer, register_layer
from .feedback import Fans
from .functional import (
    FeedbackFn,
    IntOrTuple,
    _autocast_dtype,
    _cast,
    _feedback_in_backward,
    _feedback_source,
    _numbers,
    _state_gradient,
    is_recording,
    stock_serves,
)

__all__ = [
    "AsymmetricLocallyConnected2d",
    "LocallyConnected2d",
    "LocallyConnectedTranspose2d",
]

# Bytes of windows that are copied at once: what a CPU's cache holds, and some of a GPU's memory.
_AT_ONCE = {"cpu": 1 << 23}
_AT_ONCE_ELSEWHERE = 1 << 28


@dataclass(frozen=True)
class _Grid:
    """Where the windows lie on the input, in rows and columns."""

    size: tuple[int, int]
    """Of the input."""
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]
    """Zeros above the input and left of it."""
    after: tuple[int, int]

    @property
    def padded_size(self) -> tuple[int, int]:
        (height, width), (top, left), (bottom, right) = self.size, self.before, self.after
        return top + height + bottom, left + width + right

    @property
    def positions(self) -> tuple[int, int]:
        """How many windows there are: the size of the output."""
        (height, width), (down, right) = self.padded_size, self.stride
        rows, columns = self.kernel_size
        return (height - rows) // down + 1, (width - columns) // right + 1

    def zeros(self, like: Tensor, channels: int) -> Tensor:
        """Return zeros of the padded input's size, for as large a batch as ``like`` has."""
        return like.new_zeros(*self.padded_size, channels, like.shape[-1])

    def padded(self, input: Tensor) -> Tensor:
        """(H, W, C, N) -> the same with zeros around it."""
        if not any(self.before + self.after):
            return input
        padded = self.zeros(input, input.shape[2])
        self.cropped(padded).copy_(input)
        return padded

    def cropped(self, padded: Tensor) -> Tensor:
        """Return the view without the zeros."""
        (top, left), (height, width) = self.before, self.size
        return padded[top : top + height, left : left + width]

    def windows(self, padded: Tensor) -> Tensor:
        """(H, W, C, N) with zeros -> a view (*positions, *kernel_size, C, N)."""
        (height, width), (down, right) = self.kernel_size, self.stride
        return padded.unfold(0, height, down).unfold(1, width, right).permute(0, 1, 4, 5, 2, 3)

    def places(self, padded: Tensor, i: int, j: int) -> Tensor:
        """Return the view (*positions, C, N) of what the windows have in row i and column j."""
        (rows, columns), (down, right) = self.positions, self.stride
        return padded[i : i + rows * down : down, j : j + columns * right : right]


def _grid(
    size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: str | IntOrTuple,
) -> _Grid:
    if min(*size, *kernel_size, *stride) < 1:
        raise ValueError(
            f"input_size is {size}, kernel_size {kernel_size} and stride {stride}; none is below 1"
        )
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"padding is {padding!r}; it must be 'same' or numbers")
        spans = zip(size, kernel_size, stride, strict=True)
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in spans]
        before = tuple(t // 2 for t in total)
        after = tuple(t - b for t, b in zip(total, before, strict=True))
    else:
        before = after = _numbers(2)(padding)
    grid = _Grid(*cast(Any, (size, kernel_size, stride, before, after)))
    if min(before) < 0 or min(grid.positions) < 1:
        raise ValueError(
            f"no window of {kernel_size} fits into an input of {size} with padding {padding}"
        )
    return grid


def _dense(tensor: Tensor) -> Tensor:
    """(H, W, C, N), dense in that order."""
    if torch.compiler.is_compiling() or tensor.is_contiguous():
        return tensor.contiguous()
    # Two steps take a third of the time: torch transposes matrices fast, and nothing else.
    height, width, channels, _ = tensor.shape
    rows = tensor.permute(3, 2, 0, 1).flatten(1).t().contiguous()
    return rows.view(channels, height, width, -1).permute(1, 2, 0, 3).contiguous()


def _parts(padded: Tensor, grid: _Grid) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """
    Part by part of the grid: which of its rows, which positions these are, room for their windows,
    (rows, columns, *kernel_size, C, N), and that room as matrices, (positions, K, N). The room is
    the same for all parts.
    """
    rows, columns = grid.positions
    row = columns, *grid.kernel_size, *padded.shape[2:]
    at_once = _AT_ONCE.get(padded.device.type, _AT_ONCE_ELSEWHERE)
    count = min(rows, max(1, at_once // max(1, math.prod(row) * padded.element_size())))
    rooms = padded.new_empty(count, *row)
    for first in range(0, rows, count):
        last = min(first + count, rows)
        room = rooms[: last - first]
        positions = slice(first * columns, last * columns)
        yield slice(first, last), positions, room, room.flatten(0, 1).flatten(1, 3)


def _product(weight: Tensor, padded: Tensor, grid: _Grid) -> Tensor:
    """(positions, C_out, K), (H, W, C_in, N) with zeros -> (positions, C_out, N)."""
    windows = grid.windows(padded)
    output = weight.new_empty(*weight.shape[:2], padded.shape[-1])
    for rows, at, room, matrices in _parts(padded, grid):
        room.copy_(windows[rows])
        torch.bmm(weight[at], matrices, out=output[at])
    return output


def _weight_gradient(error: Tensor, padded: Tensor, grid: _Grid) -> Tensor:
    """(positions, C_out, N), (H, W, C_in, N) with zeros -> (positions, C_out, K)."""
    windows = grid.windows(padded)
    output = error.new_empty(*error.shape[:2], math.prod(windows.shape[2:5]))
    for rows, at, room, matrices in _parts(padded, grid):
        room.copy_(windows[rows])
        torch.bmm(error[at], matrices.transpose(1, 2), out=output[at])
    return output


def _adjoint(error: Tensor, weight: Tensor, grid: _Grid) -> Tensor:
    """(positions, C_out, N), (positions, C_out, K) -> (H, W, C_in, N)."""
    padded = grid.zeros(error, weight.shape[2] // math.prod(grid.kernel_size))
    for rows, at, room, matrices in _parts(padded, grid):
        torch.bmm(weight[at].transpose(1, 2), error[at], out=matrices)
        for i, j in itertools.product(*map(range, grid.kernel_size)):
            grid.places(padded, i, j)[rows] += room[:, :, i, j]
    return grid.cropped(padded)


_KERNELS = {"product": _product, "weight_gradient": _weight_gradient, "adjoint": _adjoint}


def _compute(kernel: str, first: Tensor, second: Tensor, grid: _Grid) -> Tensor:
    """Run a kernel, which is one operator to a compiler: it would take minutes over its slices."""
    if torch.compiler.is_compiling():
        pairs = grid.size, grid.kernel_size, grid.stride, grid.before, grid.after
        numbers = [number for pair in pairs for number in pair]
        return cast(Tensor, _kernel_operator(kernel, first, second, numbers))
    return _KERNELS[kernel](first, second, grid)


def _grid_of(numbers: list[int]) -> _Grid:
    return _Grid(*cast(Any, zip(numbers[::2], numbers[1::2], strict=True)))


@torch.library.custom_op(
    "ss_detectron::locally_connected",
    mutates_args=(),
    schema="(str kernel, Tensor first, Tensor second, int[] grid) -> Tensor",
)
def _kernel_operator(kernel: str, first: Tensor, second: Tensor, grid: list[int]) -> Tensor:
    return _KERNELS[kernel](first, second, _grid_of(grid))


@_kernel_operator.register_fake
def _(kernel: str, first: Tensor, second: Tensor, numbers: list[int]) -> Tensor:
    grid = _grid_of(numbers)
    area = math.prod(grid.kernel_size)
    if kernel == "product":
        return first.new_empty(*first.shape[:2], second.shape[-1])
    if kernel == "weight_gradient":
        return first.new_empty(*first.shape[:2], area * second.shape[2])
    return grid.cropped(grid.zeros(first, second.shape[2] // area))


def _refuse_derivative_of_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "a locally connected layer has no second derivative: call backward without "
            "create_graph=True"
        )


class _LocallyConnected(torch.autograd.Function):
    """(H, W, C_in, N), (positions, C_out, K) -> (*positions, C_out, N)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        feedback: FeedbackFn | None,
        dtype: torch.dtype | None,
        grid: _Grid,
    ) -> Tensor:
        ctx.feedback, ctx.grid = feedback, grid
        input, cast_weight, bias = _cast(dtype, _dense(input), weight, bias)
        padded = grid.padded(input)
        ctx.save_for_backward(padded, weight, state)
        output = _compute("product", cast_weight, padded, grid)
        if bias is not None:
            output += bias.unsqueeze(-1)
        return output.view(*grid.positions, *output.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_derivative_of_derivative()
        padded, weight, state = ctx.saved_tensors
        need_input, need_weight, need_bias, need_state = ctx.needs_input_grad[:4]
        error = _dense(grad_output).flatten(0, 1)
        grad_input = grad_weight = grad_bias = grad_state = None
        feedback = weight
        if ctx.feedback is not None:
            feedback = _feedback_in_backward(ctx, weight, state)
        if need_input:
            grad_input = _compute("adjoint", error, feedback.to(error.dtype), ctx.grid)
        if need_weight:
            grad_weight = _compute("weight_gradient", error, padded, ctx.grid)
        if grad_weight is not None and need_state:
            grad_state = _state_gradient(weight, feedback, state, grad_weight)
        if need_bias:
            grad_bias = error.sum(-1)
        return grad_input, grad_weight, grad_bias, grad_state, None, None, None


class _Adjoint(torch.autograd.Function):
    """(*positions, C_out, N), (positions, C_out, K) -> (H, W, C_in, N)."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, dtype: torch.dtype | None, grid: _Grid
    ) -> Tensor:
        ctx.grid = grid
        vectors, cast_weight = _cast(dtype, _dense(input).flatten(0, 1), weight)
        ctx.save_for_backward(vectors, weight)
        return _compute("adjoint", vectors, cast_weight, grid)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_derivative_of_derivative()
        vectors, weight = ctx.saved_tensors
        padded = ctx.grid.padded(_dense(grad_output))
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            product = _compute("product", weight.to(padded.dtype), padded, ctx.grid)
            grad_input = product.view(*ctx.grid.positions, *product.shape[1:])
        if ctx.needs_input_grad[1]:
            grad_weight = _compute("weight_gradient", vectors, padded, ctx.grid)
        return grad_input, grad_weight, None, None


def _fans(layer: "_LocalLayer") -> Fans:
    """
    How many inputs an output has, and how many outputs an input: of the C_out k k within a kernel's
    reach, a stride s leaves every (s s)th.
    """
    area, apart = math.prod(layer.grid.kernel_size), math.prod(layer.grid.stride)
    return Fans(layer.in_channels * area, max(1, layer.out_channels * area // apart), False)


class _LocalLayer(nn.Module):
    """What a locally connected layer and its adjoint share: one weight's shape and start."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: _Grid,
        bias_shape: tuple[int, int] | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.grid = in_channels, out_channels, grid
        length = math.prod(grid.kernel_size) * in_channels
        shape = math.prod(grid.positions), out_channels, length
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias_shape is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty(bias_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight as Glorot and Bengio (2010) do, uniformly; the bias is zero."""
        fans = _fans(self)
        bound = math.sqrt(6 / (fans.fan_in + fans.fan_out))
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check_shape(self, input: Tensor, channels: int, size: tuple[int, int]) -> None:
        if input.dim() != 4 or input.shape[1:] != (channels, *size):
            raise ValueError(
                f"{type(self).__name__} takes inputs of shape (N, {channels}, {size[0]}, "
                f"{size[1]}); this one's is {tuple(input.shape)}"
            )

    def extra_repr(self) -> str:
        grid = self.grid
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={grid.kernel_size}, "
            f"input_size={grid.size}, stride={grid.stride}, padding={grid.before + grid.after}, "
            f"bias={self.bias is not None}"
        )


class LocallyConnected2d(_LocalLayer):
    """
    A convolution without shared weights: each position of the output has a kernel and a bias of
    its own::

        layer = LocallyConnected2d(3, 64, 5, input_size=32, stride=2, padding="same")
        layer(torch.randn(8, 3, 32, 32)).shape  # (8, 64, 16, 16)

    The weight is (positions, C_out, K): positions are those of the output row by row, and K counts
    the kernel's rows, its columns and the input's channels, the channels fastest. The bias is
    (positions, C_out). Both start as Glorot's, see :meth:`reset_parameters`.

    Fastest is a batch that lies in memory as the layer's own outputs do, the batch last;
    elementwise functions keep it so. On a CPU, much of a step's time can be that of getting fresh
    memory for the weights' gradients; torch's THP_MEM_ALLOC_ENABLE=1 in the environment (Linux)
    takes most of that away.

    Args:
        in_channels, out_channels: C_in and C_out.
        kernel_size, stride: numbers or pairs (height, width).
        input_size: height and width of the input, a number or a pair.
        padding: how many zeros there are on each side, a number or a pair; or "same", as
            TensorFlow has it: the output is the input's size / stride, rounded up, and where the
            two sides cannot be equal, one more zero comes below and to the right.
        bias: whether there is one.

    Raises:
        ValueError: no window fits into the input, or in ``forward`` the input is another size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple,
        input_size: IntOrTuple,
        stride: IntOrTuple = 1,
        padding: str | IntOrTuple = 0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        pair = _numbers(2)
        grid = _grid(pair(input_size), pair(kernel_size), pair(stride), padding)
        bias_shape = (math.prod(grid.positions), out_channels) if bias else None
        super().__init__(in_channels, out_channels, grid, bias_shape, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, *input_size) -> (N, C_out, *output_size), in memory with the batch last."""
        return self._forward(input)

    def _forward(
        self, input: Tensor, feedback: FeedbackFn | None = None, state: Tensor | None = None
    ) -> Tensor:
        self._check_shape(input, self.in_channels, self.grid.size)
        if is_recording():
            output = self._by_torch(input, self.weight)
            return output if self.bias is None else output + self.bias.t().view(output.shape[1:])
        if feedback is not None and stock_serves(input, self.weight, self.bias):
            feedback = state = None
        output = _LocallyConnected.apply(
            input.permute(2, 3, 1, 0),
            self.weight,
            self.bias,
            state,
            feedback,
            _autocast_dtype(input),
            self.grid,
        )
        return cast(Tensor, output.permute(3, 2, 0, 1))

    def _by_torch(self, input: Tensor, weight: Tensor) -> Tensor:
        """
        The same by torch's own operations, without a bias: for programs that are recorded, and for
        second derivatives (which information alignment takes).
        """
        grid = self.grid
        (top, left), (bottom, right) = grid.before, grid.after
        padded = F.pad(input, (left, right, top, bottom)).permute(2, 3, 1, 0)
        output = torch.bmm(weight, grid.windows(padded).flatten(0, 1).flatten(1, 3))
        return output.view(*grid.positions, *output.shape[1:]).permute(3, 2, 0, 1)


class LocallyConnectedTranspose2d(_LocalLayer):
    """
    The adjoint of a locally connected layer, with a weight V of its own, of the layer's shape: what
    is a transposed convolution to a convolution. With V = W, and no biases, it computes the layer's
    input gradient from that of its output. Its bias is one for each value of its output,
    (H W, C_in).

    Args:
        layer: whose adjoint it is.
        bias: whether there is one.
        device, dtype: by default, those of the layer.
    """

    def __init__(
        self,
        layer: LocallyConnected2d,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        grid = layer.grid
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            grid,
            (math.prod(grid.size), layer.in_channels) if bias else None,
            layer.weight.device if device is None else device,
            layer.weight.dtype if dtype is None else dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_out, *output_size) of the layer -> (N, C_in, *input_size)."""
        self._check_shape(input, self.out_channels, self.grid.positions)
        dtype = _autocast_dtype(input)
        output: Tensor = _Adjoint.apply(input.permute(2, 3, 1, 0), self.weight, dtype, self.grid)
        if self.bias is not None:
            output = output + self.bias.to(output.dtype).view(*self.grid.size, -1, 1)
        return output.permute(3, 2, 0, 1)


class AsymmetricLocallyConnected2d(AsymmetricLayer, LocallyConnected2d):
    """
    :class:`LocallyConnected2d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of :class:`LocallyConnected2d`.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = LocallyConnected2d

    def fans(self) -> Fans:
        return _fans(self)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight  # one for each position

    def linear_map(self, input: Tensor, weight: Tensor) -> Tensor:
        return self._by_torch(input, weight)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, *input_size) -> (N, C_out, *output_size), in memory with the batch last."""
        feedback, state = _feedback_source(weight=self.weight, **self.feedback_arguments())
        return self._forward(input, feedback=feedback, state=state)


register_layer(LocallyConnected2d, AsymmetricLocallyConnected2d)
