"""
The number by which dense detectors such as RetinaNet divide their losses: a moving mean of the
foreground anchors, which Detectron2 keeps in a plain attribute and in no state dict.
"""

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

__all__ = ["get_loss_normalizers", "set_loss_normalizers"]


def get_loss_normalizers(model: nn.Module) -> dict[str, float]:
    """Of the dense detectors that have one yet, by their module's name in the model."""
    found = {name: vars(module).get("loss_normalizer") for name, module in _detectors(model)}
    return {name: value for name, value in found.items() if value is not None}


def set_loss_normalizers(model: nn.Module, values: dict[str, float]) -> None:
    """Puts back what :func:`get_loss_normalizers` gave. A detector without any begins anew."""
    for name, module in _detectors(model):
        if name in values:
            module.loss_normalizer = values[name]
        else:  # the next forward pass makes it
            vars(module).pop("loss_normalizer", None)


def _detectors(model: nn.Module) -> list[tuple[str, DenseDetector]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, DenseDetector)]
