"""Sign-symmetry and feedback alignment for Detectron2."""

__version__ = "0.1.0"
