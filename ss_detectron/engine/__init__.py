"""Training and evaluation: Detectron2's engine with what asymmetric feedback adds."""

from .. import _detectron2  # noqa: F401
from .command_line import argument_parser, main, setup
from .defaults import Trainer
from .hooks import AlignmentHook, BestCheckpointer, PeriodicCheckpointer

__all__ = [
    "AlignmentHook",
    "BestCheckpointer",
    "PeriodicCheckpointer",
    "Trainer",
    "argument_parser",
    "main",
    "setup",
]
