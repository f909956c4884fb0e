"""Detectron2 models with asymmetric feedback; importing this registers them."""

from .backbone import (
    build_fa_resnet_backbone,
    build_fa_resnet_fpn_backbone,
    build_fa_retinanet_resnet_fpn_backbone,
    build_feedback_resnet_backbone,
    build_feedback_resnet_fpn_backbone,
    build_feedback_retinanet_resnet_fpn_backbone,
    build_ss_resnet_backbone,
    build_ss_resnet_fpn_backbone,
    build_ss_retinanet_resnet_fpn_backbone,
)
from .retinanet import (
    RETINANET_HEAD_REGISTRY,
    FARetinaNetHead,
    FeedbackRetinaNet,
    FeedbackRetinaNetHead,
    SSRetinaNetHead,
)

__all__ = [
    "RETINANET_HEAD_REGISTRY",
    "FARetinaNetHead",
    "FeedbackRetinaNet",
    "FeedbackRetinaNetHead",
    "SSRetinaNetHead",
    "build_fa_resnet_backbone",
    "build_fa_resnet_fpn_backbone",
    "build_fa_retinanet_resnet_fpn_backbone",
    "build_feedback_resnet_backbone",
    "build_feedback_resnet_fpn_backbone",
    "build_feedback_retinanet_resnet_fpn_backbone",
    "build_ss_resnet_backbone",
    "build_ss_resnet_fpn_backbone",
    "build_ss_retinanet_resnet_fpn_backbone",
]
