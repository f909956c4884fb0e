"""
Sign-symmetry, feedback alignment and their relatives, for any PyTorch model and for Detectron2.

One call converts a model::

    from ss_detectron import convert_feedback

    model = convert_feedback(torchvision.models.resnet18(), "sign_symmetry")

Importing this package needs torch alone. The names of the Detectron2 plug-in (``add_ss_config``,
``find_config``) load it on first use, which registers its data sets, backbones, heads and
meta-architectures with Detectron2; where Detectron2 is imported already, that happens at once.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from . import alignment, layers, learners, solver
from .alignment import backpropagation_gradients, gradient_angles, weight_alignment
from .layers import (
    FEEDBACK_REGISTRY,
    FEEDBACK_SCALES,
    AsymmetricConv1d,
    AsymmetricConv2d,
    AsymmetricConv3d,
    AsymmetricConvTranspose1d,
    AsymmetricConvTranspose2d,
    AsymmetricConvTranspose3d,
    AsymmetricLayer,
    AsymmetricLinear,
    AsymmetricLocallyConnected2d,
    AsymmetricMultiheadAttention,
    FeedbackRule,
    LocallyConnected2d,
    LocallyConnectedTranspose2d,
    advance_feedback,
    backpropagation,
    convert_feedback,
    feedback_report,
    mirror_feedback,
    register_layer,
    reset_feedback,
)
from .learners import LEARNER_REGISTRY, Learner, build_learner

if TYPE_CHECKING:
    from .config import add_ss_config as add_ss_config
    from .config import find_config as find_config

__version__ = "0.1.0"

__all__ = [
    "FEEDBACK_REGISTRY",
    "FEEDBACK_SCALES",
    "LEARNER_REGISTRY",
    "AsymmetricConv1d",
    "AsymmetricConv2d",
    "AsymmetricConv3d",
    "AsymmetricConvTranspose1d",
    "AsymmetricConvTranspose2d",
    "AsymmetricConvTranspose3d",
    "AsymmetricLayer",
    "AsymmetricLinear",
    "AsymmetricLocallyConnected2d",
    "AsymmetricMultiheadAttention",
    "FeedbackRule",
    "Learner",
    "LocallyConnected2d",
    "LocallyConnectedTranspose2d",
    "advance_feedback",
    "alignment",
    "backpropagation",
    "backpropagation_gradients",
    "build_learner",
    "convert_feedback",
    "feedback_report",
    "gradient_angles",
    "layers",
    "learners",
    "mirror_feedback",
    "register_layer",
    "reset_feedback",
    "solver",
    "weight_alignment",
]

_PLUGIN = {"add_ss_config": "config", "find_config": "config"}
"""Names of the Detectron2 plug-in, and their modules."""


def _load_plugin() -> None:
    """
    Register what the plug-in holds with Detectron2.

    Raises:
        ImportError: there is no Detectron2; says how to get it.
    """
    from . import _detectron2  # noqa: F401

    for room in ("data", "modeling"):
        importlib.import_module(f".{room}", __name__)


def __getattr__(name: str) -> Any:
    if name not in _PLUGIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load_plugin()
    return getattr(importlib.import_module(f".{_PLUGIN[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLUGIN])


if sys.modules.get("detectron2"):
    _load_plugin()
