"""
Backbone builders with asymmetric feedback: Detectron2's own, and those of this package.

``build_ss_*`` builds sign-symmetric layers, ``build_fa_*`` feedback alignment, ``build_feedback_*``
whatever MODEL.FEEDBACK.RULE says. Each calls the stock builder and converts what it returns.
"""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    Backbone,
    build_resnet_backbone,
)
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)

from ss_detectron.layers import convert_part

from .alexnet import build_alexnet_backbone
from .cifar_resnet import build_cifar_resnet_backbone
from .feedback import feedback_options

BackboneBuilder = Callable[[CfgNode, ShapeSpec], Backbone]


def _register(stock: BackboneBuilder, kind: str, fixed_rule: str | None) -> BackboneBuilder:
    """Registers the stock builder's sibling of this kind (ss, fa, feedback) and returns it."""
    name = stock.__name__.replace("build_", f"build_{kind}_", 1)

    def build(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        options = feedback_options(cfg, name, fixed_rule)
        # A meta-architecture holds its backbone as self.backbone.
        return convert_part(stock(cfg, input_shape), prefix="backbone", **options)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""
    ``{stock.__name__}`` with every layer on {fixed_rule or "MODEL.FEEDBACK.RULE"}.

    Args:
        cfg: a Detectron2 config with the keys of ``add_ss_config``.
        input_shape: of the image.

    Returns:
        the stock backbone, converted.

    Raises:
        ValueError: the rule is missing, unknown or contradicts MODEL.FEEDBACK.RULE.
    """
    BACKBONE_REGISTRY.register(build)
    return build


_SS, _FA = "sign_symmetry", "feedback_alignment"

build_ss_resnet_backbone = _register(build_resnet_backbone, "ss", _SS)
build_fa_resnet_backbone = _register(build_resnet_backbone, "fa", _FA)
build_feedback_resnet_backbone = _register(build_resnet_backbone, "feedback", None)

build_ss_resnet_fpn_backbone = _register(build_resnet_fpn_backbone, "ss", _SS)
build_fa_resnet_fpn_backbone = _register(build_resnet_fpn_backbone, "fa", _FA)
build_feedback_resnet_fpn_backbone = _register(build_resnet_fpn_backbone, "feedback", None)

build_ss_retinanet_resnet_fpn_backbone = _register(build_retinanet_resnet_fpn_backbone, "ss", _SS)
build_fa_retinanet_resnet_fpn_backbone = _register(build_retinanet_resnet_fpn_backbone, "fa", _FA)
build_feedback_retinanet_resnet_fpn_backbone = _register(
    build_retinanet_resnet_fpn_backbone, "feedback", None
)

build_ss_cifar_resnet_backbone = _register(build_cifar_resnet_backbone, "ss", _SS)
build_fa_cifar_resnet_backbone = _register(build_cifar_resnet_backbone, "fa", _FA)
build_feedback_cifar_resnet_backbone = _register(build_cifar_resnet_backbone, "feedback", None)

build_ss_alexnet_backbone = _register(build_alexnet_backbone, "ss", _SS)
build_fa_alexnet_backbone = _register(build_alexnet_backbone, "fa", _FA)
build_feedback_alexnet_backbone = _register(build_alexnet_backbone, "feedback", None)
