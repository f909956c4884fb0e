"""Asymmetric layers, the feedback rules, and the conversion of whole models."""

from .asymmetric import (
    AsymmetricConv2d,
    AsymmetricConvTranspose2d,
    AsymmetricLayer,
    AsymmetricLinear,
)
from .convert import (
    FeedbackReport,
    FeedbackRow,
    backpropagation,
    check_exclude,
    convert_feedback,
    convert_part,
    feedback_report,
    reset_feedback,
)
from .feedback import (
    FEEDBACK_REGISTRY,
    FEEDBACK_SCALES,
    Fans,
    FeedbackRule,
    FeedbackScale,
    get_rule,
)
from .functional import asymmetric_conv2d, asymmetric_conv_transpose2d, asymmetric_linear

__all__ = [
    "FEEDBACK_REGISTRY",
    "FEEDBACK_SCALES",
    "AsymmetricConv2d",
    "AsymmetricConvTranspose2d",
    "AsymmetricLayer",
    "AsymmetricLinear",
    "Fans",
    "FeedbackReport",
    "FeedbackRow",
    "FeedbackRule",
    "FeedbackScale",
    "asymmetric_conv2d",
    "asymmetric_conv_transpose2d",
    "asymmetric_linear",
    "backpropagation",
    "check_exclude",
    "convert_feedback",
    "convert_part",
    "feedback_report",
    "get_rule",
    "reset_feedback",
]
