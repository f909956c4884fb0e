"""Data sets: importing this package registers them with Detectron2 and creates no file."""

from .coco import check_detection_datasets, register_coco_from_config
from .shapes import SHAPES_CLASSES, draw_shapes, ensure_shapes, generate_shapes, register_shapes

__all__ = [
    "SHAPES_CLASSES",
    "check_detection_datasets",
    "draw_shapes",
    "ensure_shapes",
    "generate_shapes",
    "register_coco_from_config",
    "register_shapes",
]

register_shapes()
