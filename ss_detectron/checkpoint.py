"""Checkpoints that know which rule trained which layer."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .layers import AsymmetricLayer, feedback_report
from .layers.feedback import Backpropagation

__all__ = ["FeedbackCheckpointer"]

logger = logging.getLogger(__name__)


class FeedbackCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer; a checkpoint also says by which rule each layer learned (under
    "feedback": layer name -> rule and its settings, which stock Detectron2 ignores), and loading
    one whose rules or settings are not the model's gives a warning that says so.
    """

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """
        Args:
            name: of the file, without ".pth".
            tag: whether a resumed run is to go on from this checkpoint.
            **kwargs: what else to save.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        if "://" in self.save_dir:  # where a file cannot be renamed into place
            return super().save(name, feedback=_rules(self.model), **kwargs)
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        data["feedback"] = _rules(self.model)
        target = os.path.join(self.save_dir, name + ".pth")
        self.logger.info("Saving checkpoint to %s", target)
        with _whole(target) as path:
            torch.save({**data, **kwargs}, path)
        if tag:
            self.tag_last_checkpoint(name + ".pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            return super().tag_last_checkpoint(last_filename_basename)
        with _whole(os.path.join(self.save_dir, "last_checkpoint")) as path:
            Path(path).write_text(last_filename_basename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self._compare_rules(checkpoint.get("feedback"))
        return super()._load_model(checkpoint)

    def _compare_rules(self, saved: dict[str, str] | None) -> None:
        model = _rules(self.model)
        if saved is None:
            if any(isinstance(m, AsymmetricLayer) for m in self.model.modules()):
                logger.info(
                    "The checkpoint does not say which rule trained it; this model learns by %s.",
                    _count(model),
                )
            return
        differ = [name for name in model if name in saved and saved[name] != model[name]]
        if differ:
            logger.warning(
                "The checkpoint was trained with %s, but this model learns by %s: %d layers "
                "differ, such as %s (%s in the checkpoint, %s here). Set MODEL.FEEDBACK to what "
                "the checkpoint was trained with unless the change is meant. Fixed or learned "
                "feedback that the checkpoint brings is used as it is, whatever the scale, gain "
                "and seed.",
                _count(saved),
                _count(model),
                len(differ),
                differ[0],
                saved[differ[0]],
                model[differ[0]],
            )


def _rules(model: nn.Module) -> dict[str, str]:
    """Layer name -> its rule, with what the rule is set to."""
    layers = {row.name: model.get_submodule(row.name) for row in feedback_report(model)}
    return {
        name: str(layer.rule) if isinstance(layer, AsymmetricLayer) else Backpropagation.name
        for name, layer in layers.items()
    }


@contextmanager
def _whole(target: str) -> Iterator[str]:
    """A path to write to that becomes ``target`` in one step, for a run may be killed any time."""
    yield target + ".new"
    os.replace(target + ".new", target)


def _count(rules: dict[str, str]) -> str:
    return ", ".join(f"{rule} ({n} layers)" for rule, n in Counter(rules.values()).most_common())
