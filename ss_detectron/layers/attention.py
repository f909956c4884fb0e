"""torch's multi-head attention, whose projections send the error back through feedback weights."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .asymmetric import AsymmetricLayer, AsymmetricLinear, register_layer
from .feedback import Fans
from .functional import asymmetric_linear, stock_serves

__all__ = ["AsymmetricMultiheadAttention"]

_OutputProjection = nn.modules.linear.NonDynamicallyQuantizableLinear


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

        # From here on the operations are those of torch's multi_head_attention_forward, in its
        # order, on which the last bits depend.
        dtype, heads = query.dtype, self.num_heads
        mask_type = F._none_or_dtype(attn_mask)
        padding = F._canonical_mask(
            key_padding_mask, "key_padding_mask", mask_type, "attn_mask", dtype
        )
        mask = F._canonical_mask(attn_mask, "attn_mask", None, "", dtype, False)
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            padding = None if padding is None else padding.unsqueeze(0)
        elif self.batch_first:
            # Which of the three are the same tensor decides how they are projected.
            inputs = query, key, value
            query, key, value = (x.transpose(0, 1) for x in inputs)
            key = query if inputs[1] is inputs[0] else key
            value = key if inputs[2] is inputs[1] else value
        length, batch, _ = query.shape

        if is_causal and mask is None:
            raise RuntimeError("is_causal says what attn_mask is: it must be given as well")
        is_causal = is_causal and padding is None and not need_weights
        if is_causal:
            mask = None
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
            size = length, key.shape[0]
            if mask.shape not in ((1, *size), (batch * heads, *size)):
                raise RuntimeError(
                    f"attn_mask is of shape {tuple(mask.shape)}; it must be of {size} or "
                    f"{(batch * heads, *size)}"
                )

        q, k, v = self._project(query, key, value, feedback)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
        q, k, v = (
            x.view(x.shape[0], batch * heads, self.head_dim).transpose(0, 1) for x in (q, k, v)
        )
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1) for x in (k, v))
        source = k.shape[1]
        added = source - key.shape[0]
        if mask is not None and added:
            mask = F.pad(mask, (0, added))
        if padding is not None:
            padding = F.pad(padding, (0, added)).view(batch, 1, 1, source)
            padding = padding.expand(-1, heads, -1, -1).reshape(batch * heads, 1, source)
            mask = padding if mask is None else mask + padding

        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            q = q * math.sqrt(1.0 / self.head_dim)
            k = k.transpose(1, 2)
            weights = torch.bmm(q, k) if mask is None else torch.baddbmm(mask, q, k)
            weights = weights.softmax(-1)
            if dropout > 0:
                weights = F.dropout(weights, dropout)
            y = torch.bmm(weights, v).transpose(0, 1).reshape(length * batch, self.embed_dim)
            weights = weights.view(batch, heads, length, source)
            if average_attn_weights:
                weights = weights.mean(1)
            if not is_batched:
                weights = weights.squeeze(0)
        else:
            if mask is not None:
                one_for_all = mask.shape[0] == 1
                mask = mask[None] if one_for_all else mask.view(batch, heads, -1, source)
            q, k, v = (x.view(batch, heads, x.shape[1], self.head_dim) for x in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
            y = y.permute(2, 0, 1, 3).reshape(batch * length, self.embed_dim)
        y = self.out_proj(y).view(length, batch, self.embed_dim)
        if not is_batched:
            y = y.squeeze(1)
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, feedback: dict[str, Any]
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
