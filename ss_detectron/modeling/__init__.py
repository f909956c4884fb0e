"""Detectron2 models with asymmetric feedback; importing this registers them."""

from .. import _detectron2  # noqa: F401
from . import backbone  # noqa: F401, it registers its builders
from .alexnet import AlexNet
from .chain import Chain
from .cifar_resnet import CifarStem
from .classifier import ImageClassifier
from .retinanet import (
    RETINANET_HEAD_REGISTRY,
    FARetinaNetHead,
    FeedbackRetinaNet,
    FeedbackRetinaNetHead,
    SSRetinaNetHead,
)

__all__ = [
    "RETINANET_HEAD_REGISTRY",
    "AlexNet",
    "Chain",
    "CifarStem",
    "FARetinaNetHead",
    "FeedbackRetinaNet",
    "FeedbackRetinaNetHead",
    "ImageClassifier",
    "SSRetinaNetHead",
]
