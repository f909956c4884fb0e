"""Learners: where the gradients of a network come from."""

from .blocks import BlockLearner
from .direct_feedback import DirectFeedbackAlignment
from .learner import LEARNER_REGISTRY, Backpropagation, Learner, build_learner
from .target_propagation import (
    AuxiliaryOutputTargetPropagation,
    DifferenceTargetPropagation,
    Inverse,
    SimplifiedTargetPropagation,
)

__all__ = [
    "LEARNER_REGISTRY",
    "AuxiliaryOutputTargetPropagation",
    "Backpropagation",
    "BlockLearner",
    "DifferenceTargetPropagation",
    "DirectFeedbackAlignment",
    "Inverse",
    "Learner",
    "SimplifiedTargetPropagation",
    "build_learner",
]
