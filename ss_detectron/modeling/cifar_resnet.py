"""Detectron2's ResNet for images of 32 pixels."""

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor

__all__ = ["CifarStem", "build_cifar_resnet_backbone"]


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


@BACKBONE_REGISTRY.register()
def build_cifar_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """
    Build Detectron2's ResNet with :class:`CifarStem`: strides 1, 2, 4 and 8 after its four stages.
    MODEL.BACKBONE.FREEZE_AT and MODEL.RESNETS.{DEPTH, NORM, OUT_FEATURES} hold and, from depth 50
    on, MODEL.RESNETS.STRIDE_IN_1X1.
    """
    options = cfg.MODEL.RESNETS
    bottleneck = {"stride_in_1x1": options.STRIDE_IN_1X1} if options.DEPTH >= 50 else {}
    return ResNet(
        CifarStem(input_shape.channels, norm=options.NORM),
        ResNet.make_default_stages(options.DEPTH, norm=options.NORM, **bottleneck),
        out_features=options.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
