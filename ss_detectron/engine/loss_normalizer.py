"""What each rank of a run has of its own, and a checkpoint has to hold of all of them."""

from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from ss_detectron.utils.random_state import get_random_state, set_random_state

__all__ = ["get_loss_normalizers", "load_rank_state", "rank_state", "set_loss_normalizers"]


def rank_state(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """
    Return, in tensors, numbers and strings, this rank's random numbers and the loss normalisers of
    its own images.
    """
    return {"random": get_random_state(device), "loss_normalizer": get_loss_normalizers(model)}


def load_rank_state(model: nn.Module, device: torch.device, state: dict[str, Any]) -> None:
    """Put :func:`rank_state` back."""
    set_loss_normalizers(model, state["loss_normalizer"])
    set_random_state(state["random"], device)


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
