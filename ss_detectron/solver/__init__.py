"""The authors' optimiser options and parameter groups; :mod:`.build` reads a config."""

from .groups import match_feedback_groups
from .sgd import SGD

__all__ = ["SGD", "match_feedback_groups"]
