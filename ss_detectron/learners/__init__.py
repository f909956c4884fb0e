"""Learners: where the gradients of a network come from."""

from .learner import LEARNER_REGISTRY, Backpropagation, Learner, build_learner

__all__ = ["LEARNER_REGISTRY", "Backpropagation", "Learner", "build_learner"]
