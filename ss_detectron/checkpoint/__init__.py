"""Whole, verified checkpoints, and weights that find their place in another model."""

from .. import _detectron2  # noqa: F401
from .checkpointer import FeedbackCheckpointer, NotWrittenError
from .files import read_checkpoint

__all__ = ["FeedbackCheckpointer", "NotWrittenError", "read_checkpoint"]
