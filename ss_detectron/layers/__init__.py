"""Asymmetric layers, the feedback rules, and the conversion of whole models. Needs torch alone."""

from .asymmetric import (
    AsymmetricConv1d,
    AsymmetricConv2d,
    AsymmetricConv3d,
    AsymmetricConvTranspose1d,
    AsymmetricConvTranspose2d,
    AsymmetricConvTranspose3d,
    AsymmetricLayer,
    AsymmetricLinear,
    register_layer,
)
from .attention import AsymmetricMultiheadAttention
from .convert import (
    advance_feedback,
    backpropagation,
    check_exclude,
    convert_feedback,
    convert_part,
    mirror_feedback,
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
from .functional import (
    asymmetric_conv1d,
    asymmetric_conv2d,
    asymmetric_conv3d,
    asymmetric_conv_transpose1d,
    asymmetric_conv_transpose2d,
    asymmetric_conv_transpose3d,
    asymmetric_linear,
)
from .local import (
    AsymmetricLocallyConnected2d,
    LocallyConnected2d,
    LocallyConnectedTranspose2d,
)
from .report import FeedbackReport, FeedbackRow, feedback_report

__all__ = [
    "FEEDBACK_REGISTRY",
    "FEEDBACK_SCALES",
    "AsymmetricConv1d",
    "AsymmetricConv2d",
    "AsymmetricConv3d",
    "AsymmetricConvTranspose1d",
    "AsymmetricConvTranspose2d",
    "AsymmetricConvTranspose3d",
    "AsymmetricLayer",
    "AsymmetricLinear",
    "AsymmetricLocallyConnected2d",
    "AsymmetricMultiheadAttention",
    "Fans",
    "FeedbackReport",
    "FeedbackRow",
    "FeedbackRule",
    "FeedbackScale",
    "LocallyConnected2d",
    "LocallyConnectedTranspose2d",
    "advance_feedback",
    "asymmetric_conv1d",
    "asymmetric_conv2d",
    "asymmetric_conv3d",
    "asymmetric_conv_transpose1d",
    "asymmetric_conv_transpose2d",
    "asymmetric_conv_transpose3d",
    "asymmetric_linear",
    "backpropagation",
    "check_exclude",
    "convert_feedback",
    "convert_part",
    "feedback_report",
    "get_rule",
    "register_layer",
    "mirror_feedback",
    "reset_feedback",
]
