"""The loss normalisers of dense detectors, which each rank has of its own."""

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

__all__ = ["get_loss_normalizers", "set_loss_normalizers"]


def get_loss_normalizers(model: nn.Module) -> dict[str, float]:
    """
    Return, by their module's name, the numbers by which dense detectors such as RetinaNet divide
    their losses: moving means of the foreground anchors, which Detectron2 keeps in plain attributes
    and in no state dict. A detector has none before its first forward pass.
    """
    return {
        name: module.loss_normalizer
        for name, module in model.named_modules()
        if isinstance(module, DenseDetector) and "loss_normalizer" in vars(module)
    }


def set_loss_normalizers(model: nn.Module, values: dict[str, float]) -> None:
    """Put back what :func:`get_loss_normalizers` gave. A detector without any begins anew."""
    for name, module in model.named_modules():
        if isinstance(module, DenseDetector):
            vars(module).pop("loss_normalizer", None)  # the next forward pass makes it
            if name in values:
                module.loss_normalizer = values[name]
