"""Training and evaluation: Detectron2's engine with what asymmetric feedback adds."""

from .defaults import Trainer, argument_parser, setup
from .hooks import AlignmentHook, BestCheckpointer, PeriodicCheckpointer

__all__ = [
    "AlignmentHook",
    "BestCheckpointer",
    "PeriodicCheckpointer",
    "Trainer",
    "argument_parser",
    "setup",
]
