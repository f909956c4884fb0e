"""From MODEL.FEEDBACK to the arguments of a conversion."""

from typing import Any

from detectron2.config import CfgNode

from ss_detectron.config import feedback_seed
from ss_detectron.layers import get_rule

__all__ = ["common_options", "feedback_config", "feedback_options"]


def feedback_config(cfg: CfgNode, builder: str) -> CfgNode:
    """Return MODEL.FEEDBACK; raise ValueError where it is missing, on behalf of ``builder``."""
    if "FEEDBACK" not in cfg.MODEL:
        raise ValueError(f"{builder} needs the keys MODEL.FEEDBACK: call add_ss_config(cfg) first")
    return cfg.MODEL.FEEDBACK


def common_options(cfg: CfgNode) -> dict[str, Any]:
    """Return MODEL.FEEDBACK's arguments of a conversion that do not depend on the rule."""
    feedback = cfg.MODEL.FEEDBACK
    return {
        "scale": feedback.SCALE,
        "gain": feedback.GAIN,
        "exclude": tuple(feedback.EXCLUDE),
        "seed": feedback_seed(cfg),
    }


def feedback_options(cfg: CfgNode, builder: str, fixed_rule: str | None) -> dict[str, Any]:
    """
    Return the keyword arguments of :func:`~ss_detectron.layers.convert_feedback`.

    Args:
        builder: who asks, for the error messages.
        fixed_rule: the rule that ``builder`` is named after, or None if it follows the config.

    Raises:
        ValueError: no rule is given, or the config's contradicts the builder's.
    """
    options = feedback_config(cfg, builder)
    if not (options.RULE or fixed_rule):
        raise ValueError(f"{builder} needs MODEL.FEEDBACK.RULE, such as 'sign_symmetry'")
    rule = get_rule(options.RULE or fixed_rule).name
    if rule != (fixed_rule or rule):
        raise ValueError(
            f"{builder} stands for the rule {fixed_rule!r}, but MODEL.FEEDBACK.RULE is "
            f"{options.RULE!r}: change one of them, or use build_feedback_*, FeedbackRetinaNetHead"
        )
    return {"rule": rule, **common_options(cfg)}
