"""Data sets: importing this package registers them with Detectron2 and creates no file."""

from .shapes import SHAPES_CLASSES, draw_shapes, ensure_shapes, generate_shapes, register_shapes

__all__ = ["SHAPES_CLASSES", "draw_shapes", "ensure_shapes", "generate_shapes", "register_shapes"]

register_shapes()
