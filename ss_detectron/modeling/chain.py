"""Networks that are chains of layers, as LeNet and those of Bartunov et al. (2018)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ss_detectron.config import choose
from ss_detectron.layers import LocallyConnected2d

__all__ = ["Chain", "build_conv_backbone", "build_fc_backbone", "build_lc_backbone"]

Layer = int | str | Sequence[int]

_POOLS: dict[str, Callable[[], nn.Module]] = {
    "max_pool": partial(nn.MaxPool2d, 2),
    "average_pool": partial(nn.AdaptiveAvgPool2d, 1),
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Chain(Backbone):
    """
    A chain of blocks, each a layer, a nonlinearity and perhaps pooling; initialised by Glorot's
    uniform scheme. LeNet-5 with max-pooling and ReLU, for images of 32 pixels::

        layers = [(5, 6, 1), "max_pool", (5, 16, 1), "max_pool", (5, 120, 1), 84]
        Chain(1, 32, layers, make_convolution, nn.ReLU, padding="valid")

    Args:
        in_channels: of the image.
        size: its height and width.
        layers: units of a fully connected layer or, before the first of these, (kernel size,
            channels, stride) of one that is not, each of which may be followed by "max_pool", of
            2 x 2 with stride 2, or "average_pool", of the whole map.
        make_layer: (channels in, channels out, kernel size, stride, size in, padding) -> the layer
            for those.
        activation: the class of the nonlinearity.
        padding: "same", TensorFlow's, with which a map is as large as the one before over the
            stride, rounded up; or "valid", none.

    Raises:
        ValueError: there are no layers, or one is asked for where there is no map for it.
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        layers: Sequence[Layer],
        make_layer: Callable[[int, int, int, int, int, str], nn.Module],
        activation: type[nn.Module] = nn.Tanh,
        padding: str = "same",
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("MODEL.CHAIN.LAYERS is empty: the network needs a layer")
        channels, flat = in_channels, False
        blocks: list[nn.Sequential] = []
        for layer in layers:
            if isinstance(layer, int):
                before = [] if flat else [nn.Flatten()]
                made = nn.Linear(channels * size**2, layer)
                blocks.append(nn.Sequential(*before, made, activation()))
                channels, size, flat = layer, 1, True
            elif flat:
                raise ValueError(
                    f"MODEL.CHAIN.LAYERS has {layer} after a fully connected layer, which makes no "
                    "map"
                )
            elif isinstance(layer, str):
                if layer not in _POOLS or not blocks:
                    raise ValueError(
                        f"MODEL.CHAIN.LAYERS has {layer}; after a layer, choose "
                        f"{' or '.join(_POOLS)}"
                    )
                blocks[-1].append(_POOLS[layer]())
                size = size // 2 if layer == "max_pool" else 1
            else:
                kernel_size, outputs, stride = layer
                if padding == "valid" and kernel_size > size:
                    raise ValueError(
                        f"MODEL.CHAIN.LAYERS has {layer} on a map of {size} pixels: choose a "
                        "larger INPUT.CLASSIFICATION.SIZE, or MODEL.CHAIN.PADDING same"
                    )
                made = make_layer(channels, outputs, kernel_size, stride, size, padding)
                blocks.append(nn.Sequential(made, activation()))
                inside = size if padding == "same" else size - kernel_size + 1
                channels, size = outputs, -(-inside // stride)
        for number, block in enumerate(blocks, start=1):
            self.add_module(f"block{number}", block)
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


def make_convolution(
    channels: int, outputs: int, kernel_size: int, stride: int, size: int, padding: str
) -> nn.Module:
    convolution = nn.Conv2d(channels, outputs, kernel_size, stride)
    if padding == "valid":
        return convolution
    return nn.Sequential(nn.ZeroPad2d(same_padding(size, kernel_size, stride) * 2), convolution)


def make_locally_connected(
    channels: int, outputs: int, kernel_size: int, stride: int, size: int, padding: str
) -> nn.Module:
    zeros = padding if padding == "same" else 0
    return LocallyConnected2d(channels, outputs, kernel_size, size, stride, zeros)


def _build(cfg: CfgNode, input_shape: ShapeSpec, make_layer: Callable[..., nn.Module]) -> Chain:
    return Chain(
        input_shape.channels,
        cfg.INPUT.CLASSIFICATION.SIZE,
        cfg.MODEL.CHAIN.LAYERS,
        make_layer,
        _ACTIVATIONS[choose(cfg, "MODEL.CHAIN.ACTIVATION", *_ACTIVATIONS)],
        choose(cfg, "MODEL.CHAIN.PADDING", "same", "valid"),
    )


@BACKBONE_REGISTRY.register()
def build_conv_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Chain:
    """Build :class:`Chain` of MODEL.CHAIN.LAYERS with convolutions."""
    return _build(cfg, input_shape, make_convolution)


@BACKBONE_REGISTRY.register()
def build_lc_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Chain:
    """Build :class:`Chain` of MODEL.CHAIN.LAYERS with locally connected layers."""
    return _build(cfg, input_shape, make_locally_connected)


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
    return _build(cfg, input_shape, make_convolution)
