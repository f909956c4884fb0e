"""torch's multi-head attention, whose projections send the error back through feedback weights."""

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .asymmetric import AsymmetricLayer, AsymmetricLinear, register_layer
from .feedback import Fans
from .functional import asymmetric_linear, stock_serves

__all__ = ["AsymmetricMultiheadAttention"]

_OutputProjection = nn.modules.linear.NonDynamicallyQuantizableLinear


def _with(function: Any, **names: Any) -> Any:
    """Return a function as it is, but for what some names in it mean."""
    names = {**function.__globals__, **names}
    return types.FunctionType(function.__code__, names, None, function.__defaults__)


# torch's own attention, given functions that project in the place of weights.
_attention = _with(
    F.multi_head_attention_forward,
    has_torch_function=lambda tensors: False,  # it would begin again, with weights
    _mha_shape_check=_with(F._mha_shape_check),  # type: ignore[attr-defined]  # an older compiler
    linear=lambda x, layer, bias: layer(x),
    _in_projection_packed=lambda q, k, v, project, bias: project(q, k, v),
    _in_projection=lambda q, k, v, project, *others: project(q, k, v),
)


class AsymmetricMultiheadAttention(AsymmetricLayer, nn.MultiheadAttention):
    """
    :class:`torch.nn.MultiheadAttention` with asymmetric feedback.

    The projections of query, key and value are one weight with one rule: ``in_proj_weight``, or,
    where keys and values have sizes of their own (``kdim``, ``vdim``), the three weights side by
    side. ``out_proj`` is a layer of its own. Between them, attention is torch's; without a gradient
    all of it is the stock module's forward pass.

    Args:
        *args, **kwargs: those of ``torch.nn.MultiheadAttention``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`; ``out_proj`` gets the
            same.
    """

    stock_class = nn.MultiheadAttention

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        out_proj: Any = self.out_proj
        out_proj.__class__, out_proj.stock_class = AsymmetricLinear, _OutputProjection
        of, name = self.rule, f"{self.rule.layer_name}.out_proj".lstrip(".")
        out_proj.set_rule(type(of)(of.scale, of.gain, of.seed, name))

    @staticmethod
    def weight_names(layer: nn.Module) -> tuple[str, ...]:
        if layer._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return "q_proj_weight", "k_proj_weight", "v_proj_weight"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights of query, key and value: one above the other, or side by side."""
        return self.weight_of(self)

    def fans(self) -> Fans:
        if self._qkv_same_embed_dim:
            return Fans(self.embed_dim, 3 * self.embed_dim, True)
        return Fans((self.embed_dim + self.kdim + self.vdim) // 3, self.embed_dim, True)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What the stock module computes, of the same shapes."""
        feedback = self.feedback_arguments()
        options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        parameters = (p for name, p in self.named_parameters() if "feedback" not in name)
        if query.is_nested or stock_serves(query, key, value, *parameters):
            return super().forward(query, key, value, *options)

        inputs = query, key, value
        is_transposed = self.batch_first and query.dim() == 3
        if is_transposed:
            # Which of the three are the same tensor decides how they are projected.
            query, key, value = (x.transpose(0, 1) for x in inputs)
            key = query if inputs[1] is inputs[0] else key
            value = key if inputs[2] is inputs[1] else value
        project = functools.partial(self._project, feedback)
        output, weights = _attention(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            project,
            None,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj,
            None,
            self.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            not self._qkv_same_embed_dim,
            project,
            project,
            project,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (output.transpose(0, 1) if is_transposed else output), weights

    def _project(
        self, feedback: dict[str, Any], query: Tensor, key: Tensor, value: Tensor
    ) -> list[Tensor]:
        """Return the three projections: what is the same input is projected at once."""
        weight, bias, size = self.weight, self.in_proj_bias, self.embed_dim
        inputs, counts, packed = [query, key, value], [1, 1, 1], self._qkv_same_embed_dim
        if packed and key is value:
            inputs, counts = ([query], [3]) if query is key else ([query, key], [1, 2])
        sizes = [count * size for count in counts]
        biases = [None] * 3 if bias is None else torch.split(bias, sizes)
        parts: list[Any] = [None]
        if not packed:
            parts = [(slice(None), c) for c in _spans([size, self.kdim, self.vdim])]
        elif len(counts) > 1:
            parts = [(rows,) for rows in _spans(sizes)]
        projected: list[Tensor] = []
        for x, b, count, part in zip(inputs, biases, counts, parts, strict=False):
            y = asymmetric_linear(x, weight, b, part=part, **feedback)
            if count > 1:
                y = y.view(*y.shape[:-1], count, size).movedim(-2, 0)
                projected += y.contiguous().unbind()
            else:
                projected.append(y)
        return projected


def _spans(sizes: list[int]) -> list[slice]:
    """One behind the other."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


register_layer(nn.MultiheadAttention, AsymmetricMultiheadAttention)
