"""Detectron2 models with asymmetric feedback; importing this registers them."""

from .alexnet import AlexNet, build_alexnet_backbone
from .backbone import (
    build_fa_alexnet_backbone,
    build_fa_cifar_resnet_backbone,
    build_fa_resnet_backbone,
    build_fa_resnet_fpn_backbone,
    build_fa_retinanet_resnet_fpn_backbone,
    build_feedback_alexnet_backbone,
    build_feedback_cifar_resnet_backbone,
    build_feedback_resnet_backbone,
    build_feedback_resnet_fpn_backbone,
    build_feedback_retinanet_resnet_fpn_backbone,
    build_ss_alexnet_backbone,
    build_ss_cifar_resnet_backbone,
    build_ss_resnet_backbone,
    build_ss_resnet_fpn_backbone,
    build_ss_retinanet_resnet_fpn_backbone,
)
from .cifar_resnet import CifarStem, build_cifar_resnet_backbone
from .classifier import ImageClassifier
from .retinanet import (
    RETINANET_HEAD_REGISTRY,
    FARetinaNetHead,
    FeedbackRetinaNet,
    FeedbackRetinaNetHead,
    SSRetinaNetHead,
)

__all__ = [
    "AlexNet",
    "CifarStem",
    "FARetinaNetHead",
    "FeedbackRetinaNet",
    "FeedbackRetinaNetHead",
    "ImageClassifier",
    "RETINANET_HEAD_REGISTRY",
    "SSRetinaNetHead",
    "build_alexnet_backbone",
    "build_cifar_resnet_backbone",
    "build_fa_alexnet_backbone",
    "build_fa_cifar_resnet_backbone",
    "build_fa_resnet_backbone",
    "build_fa_resnet_fpn_backbone",
    "build_fa_retinanet_resnet_fpn_backbone",
    "build_feedback_alexnet_backbone",
    "build_feedback_cifar_resnet_backbone",
    "build_feedback_resnet_backbone",
    "build_feedback_resnet_fpn_backbone",
    "build_feedback_retinanet_resnet_fpn_backbone",
    "build_ss_alexnet_backbone",
    "build_ss_cifar_resnet_backbone",
    "build_ss_resnet_backbone",
    "build_ss_resnet_fpn_backbone",
    "build_ss_retinanet_resnet_fpn_backbone",
]
