"""Evaluators: classification, and COCO's with what a damaged data set needs."""

from .classification import ClassificationEvaluator
from .coco import DetectionEvaluator

__all__ = ["ClassificationEvaluator", "DetectionEvaluator"]
