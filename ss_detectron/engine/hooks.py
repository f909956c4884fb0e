"""Hooks of Detectron2's trainers: checkpoints, and the alignment of feedback."""

import math
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import Tensor, nn

from ss_detectron.alignment import (
    GradientAngles,
    WeightAlignment,
    backpropagation_gradients,
    gradient_angles,
    weight_alignment,
)
from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.checkpoint.files import find_checkpoints

__all__ = ["AlignmentHook", "BestCheckpointer", "EpochLogger", "PeriodicCheckpointer"]


class EpochLogger(HookBase):
    """Logs, as "epoch", how many times the run has been over its training images."""

    def __init__(self, epochs_per_step: float) -> None:
        self.epochs_per_step = epochs_per_step

    def after_step(self) -> None:
        epoch = (self.trainer.iter + 1) * self.epochs_per_step
        self.trainer.storage.put_scalar("epoch", epoch, smoothing_hint=False)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """
    Saves what every rank has of its own as well, and keeps the latest checkpoints: of a run that is
    resumed, those before count too.
    """

    def __init__(self, checkpointer: FeedbackCheckpointer, period: int, *, keep: int = 0) -> None:
        """
        Args:
            checkpointer: of the trainer.
            period: in iterations.
            keep: how many checkpoints stay, that of the end included and the best not; 0 for all.
        """
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
    Logs the alignment of weights and gradients every ``period`` iterations, beginning with the
    first, for Detectron2's trainers: alignment/gradient_angle (of the whole model), and with the
    layer's name behind alignment/gradient_angle/, alignment/weight_angle/, alignment/norm_ratio/
    and alignment/sign_agreement/.

    Such an iteration takes one more backward pass. Training stays as it is, bit for bit. The
    weights are those that the iteration begins with; the gradients those before clipping, except
    under a DefaultTrainer other than this package's, which tells its hooks only after the step.
    """

    def __init__(self, period: int) -> None:
        """
        Args:
            period: in iterations.

        Raises:
            ValueError: it is not positive.
        """
        if period < 1:
            raise ValueError(f"the alignment period is {period}; it must be positive")
        self.period = period
        self._reference: dict[str, Tensor] = {}
        self._weights: dict[str, WeightAlignment] = {}
        self._handle = None

    def before_step(self) -> None:
        iteration = self.trainer.iter
        if iteration == 0 or (iteration + 1) % self.period == 0:
            self._handle = self._model.register_forward_hook(self._after_forward)

    def after_backward(self) -> None:
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        self._average_over_processes()
        angles = gradient_angles(self._model, self._reference)
        if comm.is_main_process():
            self._log(angles, self._weights)
        self._reference, self._weights = {}, {}

    def after_step(self) -> None:
        # Detectron2's DefaultTrainer does not call after_backward. The gradients are still there,
        # though clipped.
        self.after_backward()

    @property
    def _model(self) -> nn.Module:
        # The inner model: DistributedDataParallel must not see the extra backward pass.
        model = self.trainer.model
        return getattr(model, "module", model)

    def _after_forward(self, model: nn.Module, args: Any, losses: Any) -> None:
        loss = sum(losses.values()) if isinstance(losses, dict) else losses
        if comm.is_main_process():
            self._weights = weight_alignment(model)
        # A step may have several passes, whose gradients add up.
        for name, gradient in backpropagation_gradients(model, loss).items():
            self._reference[name] = self._reference.get(name, 0) + gradient

    def _average_over_processes(self) -> None:
        if comm.get_world_size() > 1:
            for gradient in self._reference.values():
                torch.distributed.all_reduce(gradient)

    def _log(self, angles: GradientAngles, weights: dict[str, WeightAlignment]) -> None:
        values = {}
        if math.isfinite(angles.total):
            values["gradient_angle"] = angles.total
        for name, angle in angles.per_layer.items():
            values[f"gradient_angle/{name}"] = angle
        for name, alignment in weights.items():
            values[f"weight_angle/{name}"] = alignment.angle
            values[f"norm_ratio/{name}"] = alignment.norm_ratio
            values[f"sign_agreement/{name}"] = alignment.sign_agreement
        for name, value in values.items():
            self.trainer.storage.put_scalar(f"alignment/{name}", value, smoothing_hint=False)
