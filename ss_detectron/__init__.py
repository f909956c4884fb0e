"""
Sign-symmetry and feedback alignment for Detectron2.

Importing this package registers its data sets, backbones, heads and meta-architectures with
Detectron2. In an existing project, one call is enough::

    from . import convert_feedback

    model = convert_feedback(build_model(cfg), "sign_symmetry")
"""

__version__ = "0.1.0"

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ss_detectron extends Detectron2, which is not installed (and not on PyPI). "
        "tools/install_detectron2.py of the ss_detectron source installs it; or see "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
    ) from error

from . import data, modeling  # noqa: F401  (importing them registers what they hold)
from .config import add_ss_config, find_config
from .layers import (
    FEEDBACK_REGISTRY,
    FEEDBACK_SCALES,
    AsymmetricConv2d,
    AsymmetricConvTranspose2d,
    AsymmetricLinear,
    FeedbackRule,
    backpropagation,
    convert_feedback,
    feedback_report,
    reset_feedback,
)

__all__ = [
    "FEEDBACK_REGISTRY",
    "FEEDBACK_SCALES",
    "AsymmetricConv2d",
    "AsymmetricConvTranspose2d",
    "AsymmetricLinear",
    "FeedbackRule",
    "add_ss_config",
    "backpropagation",
    "convert_feedback",
    "feedback_report",
    "find_config",
    "reset_feedback",
]
