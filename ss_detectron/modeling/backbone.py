"""
Backbone builders with asymmetric feedback: Detectron2's own, and those of this package.

``build_ss_*`` builds sign-symmetric layers, ``build_fa_*`` feedback alignment, ``build_feedback_*``
whatever MODEL.FEEDBACK.RULE says. Each calls the stock builder and converts what it returns.
"""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)

from ss_detectron.layers import convert_part

from .alexnet import build_alexnet_backbone
from .chain import build_conv_backbone, build_fc_backbone, build_lc_backbone
from .cifar_resnet import build_cifar_resnet_backbone
from .feedback import feedback_options

BackboneBuilder = Callable[[CfgNode, ShapeSpec], Backbone]


def _register(stock: BackboneBuilder, kind: str, fixed_rule: str | None) -> None:
    """Register a sibling of the stock builder: ``build_X`` becomes ``build_KIND_X``."""

    def build(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        options = feedback_options(cfg, build.__name__, fixed_rule)
        # A meta-architecture holds its backbone as self.backbone.
        return convert_part(stock(cfg, input_shape), prefix="backbone", **options)

    build.__name__ = build.__qualname__ = stock.__name__.replace("build_", f"build_{kind}_", 1)
    build.__doc__ = f"Build ``{stock.__name__}`` on {fixed_rule or 'MODEL.FEEDBACK.RULE'}."
    BACKBONE_REGISTRY.register(build)


for _stock in (
    build_resnet_backbone,
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
    build_cifar_resnet_backbone,
    build_alexnet_backbone,
    build_fc_backbone,
    build_conv_backbone,
    build_lc_backbone,
):
    _register(_stock, "ss", "sign_symmetry")
    _register(_stock, "fa", "feedback_alignment")
    _register(_stock, "feedback", None)
