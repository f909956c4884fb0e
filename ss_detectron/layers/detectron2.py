"""Detectron2's convolution, which has a norm and an activation; loaded where Detectron2 is."""

from collections.abc import Callable

import detectron2.layers
from torch import Tensor, nn

from .asymmetric import AsymmetricConv2d, is_registered, register_layer

__all__ = ["AsymmetricDetectron2Conv2d"]


class AsymmetricDetectron2Conv2d(AsymmetricConv2d, detectron2.layers.Conv2d):  # type: ignore[misc]
    """
    :class:`detectron2.layers.Conv2d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``detectron2.layers.Conv2d``.
        rule, scale, gain, seed, layer_name: see :class:`~ss_detectron.layers.AsymmetricLayer`.
    """

    stock_class = detectron2.layers.Conv2d

    norm: nn.Module | None
    activation: Callable[[Tensor], Tensor] | None

    @staticmethod
    def obstacle(layer: nn.Module) -> str | None:
        if layer.padding_mode != "zeros":
            return f"Detectron2's Conv2d pads with zeros in spite of {layer.padding_mode!r}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H_out, W_out), norm and activation applied."""
        x = super().forward(x)
        if x.numel() == 0 and self.training and isinstance(self.norm, nn.SyncBatchNorm):
            raise AssertionError("SyncBatchNorm does not support empty inputs!")  # as stock
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


if not is_registered(detectron2.layers.Conv2d):  # by the user
    register_layer(detectron2.layers.Conv2d, AsymmetricDetectron2Conv2d)
