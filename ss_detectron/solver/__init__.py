"""The authors' optimiser options and parameter groups; :mod:`.build` reads a config."""

from .groups import match_feedback_groups
from .kolen_pollack import fold_kolen_pollack
from .sgd import SGD

__all__ = ["SGD", "fold_kolen_pollack", "match_feedback_groups"]
