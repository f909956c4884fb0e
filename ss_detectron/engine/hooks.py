"""Hooks of Detectron2's trainers: checkpoints, and the alignment of feedback."""

import logging
import math
import time
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import Tensor, nn

from ss_detectron.alignment import (
    GradientAngles,
    WeightAlignment,
    gradient_angles,
    weight_alignment,
)
from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.checkpoint.files import find_checkpoints
from ss_detectron.learners import Backpropagation, Learner

__all__ = [
    "AlignmentHook",
    "BestCheckpointer",
    "EpochLogger",
    "FirstStepLogger",
    "PeriodicCheckpointer",
]

logger = logging.getLogger(__name__)

_MANY_EPOCHS = 100


class EpochLogger(HookBase):
    """
    Log, as "epoch", how many times the run has been over its training images.

    Args:
        images_per_step: SOLVER.IMS_PER_BATCH.
        images: of the training sets.
        chosen: whether the number of epochs was, so that many of them are no mistake.
    """

    def __init__(self, images_per_step: int, images: int, *, chosen: bool = False) -> None:
        self._step, self._images, self._chosen = images_per_step, images, chosen

    def before_train(self) -> None:
        steps, step, images = self.trainer.max_iter, self._step, self._images
        epochs = steps * step / images
        said = f"{steps} steps of {step} images are {epochs:.4g} epochs of {images} images."
        if epochs > _MANY_EPOCHS and not self._chosen:
            logger.warning(f"{said} SOLVER.EPOCHS sets a schedule that follows the images.")
        else:
            logger.info(said)

    def after_step(self) -> None:
        epoch = (self.trainer.iter + 1) * self._step / self._images
        self.trainer.storage.put_scalar("epoch", epoch, smoothing_hint=False)


class FirstStepLogger(HookBase):
    """Log, after the first step, how long it took and when the run ends at that pace."""

    _began: float | None = None

    def before_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter:
            self._began = time.time()

    def after_step(self) -> None:
        if self._began is None:
            return
        now, steps = time.time(), self.trainer.max_iter - 1 - self.trainer.iter
        seconds, self._began = now - self._began, None
        end = time.strftime("%a %d %b %Y %H:%M", time.localtime(now + steps * seconds))
        logger.info(
            "The first step took %.2g s, more than later ones as a rule. At that pace, the other "
            "%d would end at about %s.",
            *(seconds, steps, end),
        )


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """
    Save every rank's own state too, and keep the latest checkpoints, of before a resumption too.

    Args:
        checkpointer: of the trainer.
        period: in iterations.
        keep: how many checkpoints stay, that of the end included and the best not; 0 for all.
    """

    def __init__(self, checkpointer: FeedbackCheckpointer, period: int, *, keep: int = 0) -> None:
        super().__init__(checkpointer, period)
        self.keep = keep

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % self.period and iteration + 1 < self.max_iter:
            return
        self.step(iteration, ranks=self.trainer.gather_rank_states())
        if self.keep and comm.is_main_process():
            for path in find_checkpoints(self.checkpointer.save_dir)[self.keep :]:
                self.path_manager.rm(path)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's; a resumed run knows the best metric from before."""

    def state_dict(self) -> dict[str, Any]:
        return {self._val_metric: (self.best_metric, self.best_iter)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_metric, self.best_iter = state_dict.get(self._val_metric, (None, None))


class AlignmentHook(HookBase):
    """
    Log the alignment of weights and gradients every ``period`` iterations, beginning with the
    first, for Detectron2's trainers: alignment/gradient_angle of the whole model, and per layer
    alignment/{gradient_angle,weight_angle,norm_ratio,sign_agreement}/NAME, and what the learner
    measures.

    Such an iteration takes one more backward pass. Training stays as it is, bit for bit. The
    weights are those that the iteration begins with; the gradients those before clipping, except
    under a DefaultTrainer other than this package's, which tells its hooks only after the step.

    Args:
        period: in iterations.

    Raises:
        ValueError: it is not positive.
    """

    def __init__(self, period: int) -> None:
        if period < 1:
            raise ValueError(f"the alignment period is {period}; it must be positive")
        self.period = period
        self._reference: dict[str, Tensor] = {}
        self._weights: dict[str, WeightAlignment] = {}
        self._measured: dict[str, float] = {}
        self._handle = None

    def before_step(self) -> None:
        iteration = self.trainer.iter
        if iteration == 0 or (iteration + 1) % self.period == 0:
            module = getattr(self.trainer, "learner", self._learner.model)
            self._handle = module.register_forward_hook(self._after_forward)

    def after_backward(self) -> None:
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        if comm.get_world_size() > 1:
            for gradient in self._reference.values():
                torch.distributed.all_reduce(gradient)
        if comm.is_main_process():
            self._log(gradient_angles(self._learner.model, self._reference))
        self._reference, self._weights = {}, {}

    def after_step(self) -> None:
        # Detectron2's DefaultTrainer does not call after_backward. The gradients are still there,
        # though clipped.
        self.after_backward()

    @property
    def _learner(self) -> Learner:
        """The trainer's, not wrapped: DistributedDataParallel must not see the extra pass."""
        model = self.trainer.model
        if hasattr(self.trainer, "learner"):
            return self.trainer.learner
        return Backpropagation(getattr(model, "module", model))

    def _after_forward(self, module: nn.Module, args: Any, losses: Any) -> None:
        learner = self._learner
        loss = sum(losses.values()) if isinstance(losses, dict) else losses
        if comm.is_main_process():
            self._weights = weight_alignment(learner.model)
        batch = args[0] if args else None
        target = batch.get("label") if isinstance(batch, dict) else None
        target = None if target is None else target.to(loss.device)
        # On every rank: a learner may pass forward once more, and norms may wait for all.
        self._measured = learner.measure(loss, target)
        # A step may have several passes, whose gradients add up.
        for name, gradient in learner.reference_gradients(loss).items():
            self._reference[name] = self._reference.get(name, 0) + gradient

    def _log(self, angles: GradientAngles) -> None:
        values = {f"gradient_angle/{name}": angle for name, angle in angles.per_layer.items()}
        if math.isfinite(angles.total):
            values["gradient_angle"] = angles.total
        for name, (angle, norm_ratio, sign_agreement) in self._weights.items():
            values[f"weight_angle/{name}"] = angle
            values[f"norm_ratio/{name}"] = norm_ratio
            values[f"sign_agreement/{name}"] = sign_agreement
        for name, value in {**values, **self._measured}.items():
            self.trainer.storage.put_scalar(f"alignment/{name}", value, smoothing_hint=False)
