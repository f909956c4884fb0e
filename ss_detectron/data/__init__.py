"""Data sets: importing this package registers them with Detectron2 and creates no file."""

from .. import _detectron2  # noqa: F401
from .arrays import CIFAR10_CLASSES, register_arrays
from .check import check_datasets
from .coco import register_coco_from_config
from .detection import DetectionMapper, build_detection_test_loader
from .folders import register_image_folders, register_image_folders_from_config
from .images import ClassificationMapper, UnreadableImageError, read_image
from .loaders import (
    build_classification_test_loader,
    build_classification_train_loader,
    build_resumable_detection_train_loader,
)
from .shapes import SHAPES_CLASSES, draw_shapes, generate_shapes, register_shapes
from .shapes_cls import SHAPES_CLS_CLASSES, draw_shape, generate_shapes_cls, register_shapes_cls

__all__ = [
    "CIFAR10_CLASSES",
    "SHAPES_CLASSES",
    "SHAPES_CLS_CLASSES",
    "ClassificationMapper",
    "DetectionMapper",
    "UnreadableImageError",
    "build_classification_test_loader",
    "build_classification_train_loader",
    "build_detection_test_loader",
    "build_resumable_detection_train_loader",
    "check_datasets",
    "draw_shape",
    "draw_shapes",
    "generate_shapes",
    "generate_shapes_cls",
    "read_image",
    "register_arrays",
    "register_coco_from_config",
    "register_image_folders",
    "register_image_folders_from_config",
    "register_shapes",
    "register_shapes_cls",
]

register_arrays()
register_image_folders()
register_shapes()
register_shapes_cls()
