"""Evaluators: classification, and COCO's with what a damaged data set needs."""

from .. import _detectron2  # noqa: F401
from .classification import ClassificationEvaluator
from .coco import DetectionEvaluator

__all__ = ["ClassificationEvaluator", "DetectionEvaluator"]
