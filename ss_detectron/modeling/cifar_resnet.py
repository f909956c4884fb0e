"""Detectron2's ResNet for images of 32 pixels."""

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

__all__ = ["NARROW_DEPTHS", "CifarStem", "PaddedShortcutBlock", "build_cifar_resnet_backbone"]

NARROW_DEPTHS = 20, 32, 44, 56, 110
"""Of the networks of 6 n + 2 layers that He et al. (2016) made for CIFAR-10."""


class CifarStem(CNNBlockBase):
    """
    A 3x3 convolution with stride 1, a norm and ReLU; no pooling, so that small images stay large.

    Args:
        in_channels: of the image.
        out_channels: of the output.
        norm: as in ``detectron2.layers.get_norm``.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: str = "BN") -> None:
        super().__init__(in_channels, out_channels, stride=1)
        norm = get_norm(norm, out_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, bias=False, norm=norm)
        c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H, W)."""
        return F.relu_(self.conv1(x))


class _PaddedShortcut(nn.Module):
    def __init__(self, added_channels: int, stride: int) -> None:
        super().__init__()
        self.padding = 0, 0, 0, 0, added_channels // 2, added_channels - added_channels // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class PaddedShortcutBlock(BasicBlock):
    """
    Detectron2's basic block, whose shortcut to more channels learns nothing: every ``stride``-th
    pixel, with channels of zeros before and after (option A of He et al. 2016).

    Args:
        in_channels, out_channels, stride, norm: see Detectron2's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN"
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        if self.shortcut is not None:
            self.shortcut = _PaddedShortcut(out_channels - in_channels, stride)


@BACKBONE_REGISTRY.register()
def build_cifar_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """
    Build Detectron2's ResNet with :class:`CifarStem`: strides 1, 2, 4 and 8 after its four stages.
    MODEL.BACKBONE.FREEZE_AT and MODEL.RESNETS.{DEPTH, NORM, OUT_FEATURES} hold and, from depth 50
    on, MODEL.RESNETS.STRIDE_IN_1X1.

    With one of :data:`NARROW_DEPTHS`, it has He et al.'s (2016, section 4.2) three stages instead,
    res2 to res4 of 16, 32 and 64 channels, made of :class:`PaddedShortcutBlock`.
    """
    options = cfg.MODEL.RESNETS
    width = 64
    if options.DEPTH in NARROW_DEPTHS:
        width, count = 16, (options.DEPTH - 2) // 6
        stages = [
            ResNet.make_stage(
                PaddedShortcutBlock,
                count,
                in_channels=inputs,
                out_channels=outputs,
                stride_per_block=[outputs // inputs] + [1] * (count - 1),
                norm=options.NORM,
            )
            for inputs, outputs in ((16, 16), (16, 32), (32, 64))
        ]
    else:
        bottleneck = {"stride_in_1x1": options.STRIDE_IN_1X1} if options.DEPTH >= 50 else {}
        stages = ResNet.make_default_stages(options.DEPTH, norm=options.NORM, **bottleneck)
    return ResNet(
        CifarStem(input_shape.channels, width, options.NORM),
        stages,
        out_features=options.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
