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

from .layers import AsymmetricLayer, feedback_report

__all__ = ["FeedbackCheckpointer"]

logger = logging.getLogger(__name__)


class FeedbackCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer; a checkpoint also says by which rule each layer learned (under
    "feedback": layer name -> rule name, which stock Detectron2 ignores), and loading one whose
    rules are not the model's gives a warning that says so.
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
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        data["feedback"] = {row.name: row.rule for row in feedback_report(self.model)}
        target = os.path.join(self.save_dir, name + ".pth")
        self.logger.info("Saving checkpoint to %s", target)
        with _whole(target) as path:
            torch.save({**data, **kwargs}, path)
        if tag:
            self.tag_last_checkpoint(name + ".pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with _whole(os.path.join(self.save_dir, "last_checkpoint")) as path:
            Path(path).write_text(last_filename_basename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self._compare_rules(checkpoint.get("feedback"))
        return super()._load_model(checkpoint)

    def _compare_rules(self, saved: dict[str, str] | None) -> None:
        model = {row.name: row.rule for row in feedback_report(self.model)}
        if saved is None:
            if any(isinstance(m, AsymmetricLayer) for m in self.model.modules()):
                logger.info(
                    "The checkpoint does not say which rule trained it (a stock Detectron2 "
                    "checkpoint, then: backpropagation); this model learns by %s.",
                    _count(model),
                )
            return
        differ = [name for name in model if name in saved and saved[name] != model[name]]
        if differ:
            logger.warning(
                "The checkpoint was trained with %s, but this model learns by %s: %d layers "
                "differ, such as %s (%s in the checkpoint, %s here). Set MODEL.FEEDBACK.RULE to "
                "the checkpoint's rule unless the change is meant.",
                _count(saved),
                _count(model),
                len(differ),
                differ[0],
                saved[differ[0]],
                model[differ[0]],
            )


@contextmanager
def _whole(target: str) -> Iterator[str]:
    """A path to write to that becomes ``target`` in one step, for a run may be killed any time."""
    yield target + ".new"
    os.replace(target + ".new", target)


def _count(rules: dict[str, str]) -> str:
    return ", ".join(f"{rule} ({n} layers)" for rule, n in Counter(rules.values()).most_common())
