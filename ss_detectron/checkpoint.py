"""Checkpoints that know which rule trained which layer."""

import logging
import os
from collections import Counter
from typing import Any

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

    def save(self, name: str, **kwargs: Any) -> None:
        rules = {row.name: row.rule for row in feedback_report(self.model)}
        super().save(name, feedback=rules, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        # In one step, so that a run killed here still has a checkpoint to resume from.
        target = os.path.join(self.save_dir, "last_checkpoint")
        with open(target + ".new", "w") as f:
            f.write(last_filename_basename)
        os.replace(target + ".new", target)

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


def _count(rules: dict[str, str]) -> str:
    return ", ".join(f"{rule} ({n} layers)" for rule, n in Counter(rules.values()).most_common())
