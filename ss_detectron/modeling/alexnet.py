"""AlexNet, which Detectron2 lacks, as Xiao et al. (2019) trained it."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

__all__ = ["AlexNet", "build_alexnet_backbone"]


class AlexNet(Backbone):
    """
    The AlexNet of "One weird trick for parallelizing convolutional neural networks" (Krizhevsky
    2014, arXiv:1404.5997), as in torchvision, with the changes of Xiao et al. (2019): batch norm
    before every nonlinearity, no bias in a layer that a batch norm follows, no dropout. The last
    linear layer is the classifier's.

    With 3 channels and 1000 classes that makes 61,110,184 parameters: torchvision's 61,100,840,
    less 9,344 biases, plus a scale and a shift for each of these 9,344 units.

    Weights are initialised as torchvision does: by torch's default.

    Args:
        in_channels: of the image.
        freeze_at: how many of the convolutions, from the first, are frozen.
    """

    def __init__(self, in_channels: int = 3, freeze_at: int = 0) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, kernel_size: int, **kwargs: int) -> Conv2d:
            norm = nn.BatchNorm2d(outputs)
            return Conv2d(
                inputs, outputs, kernel_size, bias=False, norm=norm, activation=F.relu_, **kwargs
            )

        self.conv1 = conv(in_channels, 64, 11, stride=4, padding=2)
        self.conv2 = conv(64, 192, 5, padding=2)
        self.conv3 = conv(192, 384, 3, padding=1)
        self.conv4 = conv(384, 256, 3, padding=1)
        self.conv5 = conv(256, 256, 3, padding=1)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096, bias=False)
        self.fc6_norm = nn.BatchNorm1d(4096)
        self.fc7 = nn.Linear(4096, 4096, bias=False)
        self.fc7_norm = nn.BatchNorm1d(4096)
        convolutions = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5)
        for layer in convolutions[: max(freeze_at, 0)]:
            layer.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(layer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (N, C, H, W), H and W at least 63; at 224, where the last feature map has the 6 x 6
                that the linear layers want, it is not resampled.

        Returns:
            {"fc7": (N, 4096)}.
        """
        x = F.max_pool2d(self.conv1(x), 3, 2)
        x = F.max_pool2d(self.conv2(x), 3, 2)
        x = self.conv5(self.conv4(self.conv3(x)))
        x = F.adaptive_avg_pool2d(F.max_pool2d(x, 3, 2), 6)
        x = F.relu_(self.fc6_norm(self.fc6(torch.flatten(x, 1))))
        x = F.relu_(self.fc7_norm(self.fc7(x)))
        return {"fc7": x}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"fc7": ShapeSpec(channels=4096)}


@BACKBONE_REGISTRY.register()
def build_alexnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> AlexNet:
    """Build :class:`AlexNet`, of which MODEL.BACKBONE.FREEZE_AT convolutions are frozen."""
    return AlexNet(input_shape.channels, cfg.MODEL.BACKBONE.FREEZE_AT)
