"""Networks that are chains of fully or locally connected layers, as of Bartunov et al. (2018)."""

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ss_detectron.config import choose

__all__ = ["Chain", "build_conv_backbone", "build_fc_backbone"]

Layer = int | Sequence[int]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Chain(Backbone):
    """
    A chain of blocks, each a layer and a nonlinearity; initialised by Glorot's uniform scheme.

    Args:
        in_channels: of the image.
        size: its height and width.
        layers: units of a fully connected layer or, before the first of these, (kernel size,
            channels, stride) of one that is not, whose map is as large as the input's over the
            stride, rounded up (TensorFlow's "SAME" padding).
        make_layer: (channels in, channels out, kernel size, stride, size in) -> the layer for
            those.
        activation: the class of the nonlinearity.

    Raises:
        ValueError: there are no layers, or a map is asked for after a fully connected layer.
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        layers: Sequence[Layer],
        make_layer: Callable[[int, int, int, int, int], nn.Module],
        activation: type[nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("MODEL.CHAIN.LAYERS is empty: the network needs a layer")
        channels, flat = in_channels, False
        for number, layer in enumerate(layers, start=1):
            if isinstance(layer, int):
                before = [] if flat else [nn.Flatten()]
                made = [*before, nn.Linear(channels * size**2, layer)]
                channels, size, flat = layer, 1, True
            elif flat:
                raise ValueError(
                    f"MODEL.CHAIN.LAYERS has {layer} after a fully connected layer, which makes no "
                    "map"
                )
            else:
                kernel_size, outputs, stride = layer
                made = [make_layer(channels, outputs, kernel_size, stride, size)]
                channels, size = outputs, -(-size // stride)
            self.add_module(f"block{number}", nn.Sequential(*made, activation()))
        self._units = channels * size**2
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def learner_blocks(self) -> list[nn.Module]:
        """Return the blocks that a learner tells apart."""
        return list(self.children())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, size, size) -> {"out": (N, units)}."""
        for block in self.children():
            x = block(x)
        return {"out": torch.flatten(x, 1)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"out": ShapeSpec(channels=self._units)}


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Return how far TensorFlow's "SAME" padding goes before and after; the smaller half first."""
    total = max(0, (-(-size // stride) - 1) * stride + kernel_size - size)
    return total // 2, total - total // 2


def _convolution(
    channels: int, outputs: int, kernel_size: int, stride: int, size: int
) -> nn.Module:
    padding = same_padding(size, kernel_size, stride)
    convolution = nn.Conv2d(channels, outputs, kernel_size, stride)
    return nn.Sequential(nn.ZeroPad2d(padding * 2), convolution)


def _build(cfg: CfgNode, input_shape: ShapeSpec, make_layer: Callable[..., nn.Module]) -> Chain:
    activation = choose(cfg, "MODEL.CHAIN.ACTIVATION", *_ACTIVATIONS)
    size = cfg.INPUT.CLASSIFICATION.SIZE
    layers = cfg.MODEL.CHAIN.LAYERS
    return Chain(input_shape.channels, size, layers, make_layer, _ACTIVATIONS[activation])


@BACKBONE_REGISTRY.register()
def build_conv_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Chain:
    """Build :class:`Chain` of MODEL.CHAIN.LAYERS with convolutions."""
    return _build(cfg, input_shape, _convolution)


@BACKBONE_REGISTRY.register()
def build_fc_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Chain:
    """
    Build :class:`Chain` of fully connected layers, MODEL.CHAIN.LAYERS.

    Raises:
        ValueError: one of them is none.
    """
    for layer in cfg.MODEL.CHAIN.LAYERS:
        if not isinstance(layer, int):
            raise ValueError(
                f"MODEL.CHAIN.LAYERS has {layer}; build_fc_backbone takes numbers of units alone, "
                "build_lc_backbone and build_conv_backbone (kernel size, channels, stride) too"
            )
    return _build(cfg, input_shape, _convolution)
