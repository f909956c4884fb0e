"""RetinaNet with a head of one's choice, and heads with asymmetric feedback."""

from collections.abc import Iterable
from typing import Any, ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils.registry import Registry

from ss_detectron.layers import check_exclude, convert_part

from .feedback import feedback_config, feedback_options

__all__ = [
    "RETINANET_HEAD_REGISTRY",
    "FARetinaNetHead",
    "FeedbackRetinaNet",
    "FeedbackRetinaNetHead",
    "SSRetinaNetHead",
]

RETINANET_HEAD_REGISTRY = Registry("RETINANET_HEAD")
RETINANET_HEAD_REGISTRY.__doc__ = """
Heads for :class:`FeedbackRetinaNet`, chosen by MODEL.RETINANET.HEAD. A registered object is called
as ``obj(cfg, input_shape: list[ShapeSpec])`` and returns a module like Detectron2's RetinaNetHead.
"""

RETINANET_HEAD_REGISTRY.register(RetinaNetHead)

LAST_LAYERS = ("cls_score", "bbox_pred")
"""RetinaNetHead's output layers, which follow MODEL.FEEDBACK.LAST_LAYER_RULE."""


@RETINANET_HEAD_REGISTRY.register()
class FeedbackRetinaNetHead(RetinaNetHead):
    """
    Detectron2's RetinaNet head with its towers on MODEL.FEEDBACK.RULE and its output layers on
    MODEL.FEEDBACK.LAST_LAYER_RULE.
    """

    fixed_rule: ClassVar[str | None] = None

    @configurable
    def __init__(
        self,
        *,
        rule: str,
        last_layer_rule: str = "backpropagation",
        scale: str = "mean_abs",
        gain: float = 1.0,
        exclude: Iterable[str] = (),
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            rule, last_layer_rule: of the two towers; of ``cls_score`` and ``bbox_pred``.
            scale, gain, seed: see :func:`~ss_detectron.layers.convert_feedback`.
            exclude: patterns of names in the whole model, where this head is ``head``.
            **kwargs: those of Detectron2's RetinaNetHead.
        """
        super().__init__(**kwargs)
        convert_part(
            self,
            rule,
            scale=scale,
            gain=gain,
            exclude=exclude,
            seed=seed,
            prefix="head",
            overrides={f"head.{name}": last_layer_rule for name in LAST_LAYERS},
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        return {
            **super().from_config(cfg, input_shape),
            **feedback_options(cfg, cls.__name__, cls.fixed_rule),
            "last_layer_rule": cfg.MODEL.FEEDBACK.LAST_LAYER_RULE,
        }


@RETINANET_HEAD_REGISTRY.register()
class SSRetinaNetHead(FeedbackRetinaNetHead):
    """:class:`FeedbackRetinaNetHead` whose towers learn by sign-symmetry."""

    fixed_rule = "sign_symmetry"


@RETINANET_HEAD_REGISTRY.register()
class FARetinaNetHead(FeedbackRetinaNetHead):
    """:class:`FeedbackRetinaNetHead` whose towers learn by feedback alignment."""

    fixed_rule = "feedback_alignment"


@META_ARCH_REGISTRY.register()
class FeedbackRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with the head that MODEL.RETINANET.HEAD names."""

    last_layers: ClassVar[tuple[str, ...]] = tuple(f"head.{name}" for name in LAST_LAYERS)

    @configurable
    def __init__(self, *, exclude: Iterable[str] = (), **kwargs: Any) -> None:
        """
        Args:
            exclude: MODEL.FEEDBACK.EXCLUDE, which only the whole model can check.
            **kwargs: those of Detectron2's RetinaNet.
        """
        super().__init__(**kwargs)
        check_exclude(self, exclude)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        exclude = tuple(feedback_config(cfg, cls.__name__).EXCLUDE)
        features = cfg.MODEL.RETINANET.IN_FEATURES
        try:
            args = super().from_config(cfg)
        except KeyError as error:
            if error.args[0] not in features:
                raise
            raise ValueError(
                f"MODEL.RETINANET.IN_FEATURES is {features}, but the backbone has no output {error}"
            ) from error
        if RetinaNetHead.__name__ != cfg.MODEL.RETINANET.HEAD:
            shapes = args["backbone"].output_shape()
            args["head"] = RETINANET_HEAD_REGISTRY.get(cfg.MODEL.RETINANET.HEAD)(
                cfg, [shapes[f] for f in features]
            )
        return {**args, "exclude": exclude}
