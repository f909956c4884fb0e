"""Hooks of Detectron2's trainers: checkpoints, and the alignment of feedback."""

import logging
import math
import os
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
from ss_detectron.checkpoint.files import read_checkpoint

__all__ = ["AlignmentHook", "BestCheckpointer", "EpochLogger", "PeriodicCheckpointer"]

logger = logging.getLogger(__name__)


class EpochLogger(HookBase):
    """Logs, as "epoch", how many times the run has been over its training images."""

    def __init__(self, epochs_per_step: float) -> None:
        self.epochs_per_step = epochs_per_step

    def after_step(self) -> None:
        epoch = (self.trainer.iter + 1) * self.epochs_per_step
        self.trainer.storage.put_scalar("epoch", epoch, smoothing_hint=False)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's, on every rank, whose state it keeps."""

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % self.period == 0 or iteration + 1 >= self.max_iter:
            self.step(iteration, ranks=self.trainer.gather_rank_states())


class BestCheckpointer(hooks.BestCheckpointer):
    """
    Detectron2's, but the best metric is kept in the checkpoint, from where a resumed run knows it.
    """

    def before_train(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, self._file_prefix + ".pth")
        if self.trainer.start_iter == 0 or not os.path.isfile(path):
            return
        try:
            saved = read_checkpoint(path, mmap=True)
        except (OSError, ValueError) as error:
            logger.warning("%s. The best metric is found anew.", error)
            return
        value = saved.get("metric", {}).get(self._val_metric)
        if value is not None:
            self._update_best(value, saved["iteration"])

    def _best_checking(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, None))
        if math.isnan(value):
            logger.warning("The evaluation gave no %s: no best checkpoint.", self._val_metric)
            return
        if self.best_metric is not None and not self._compare(value, self.best_metric):
            logger.info(
                "%s is %.3f, not better than %.3f at iteration %d.",
                self._val_metric,
                value,
                self.best_metric,
                self.best_iter,
            )
        elif self._update_best(value, iteration):
            metric = {self._val_metric: value}
            # A resumed run goes on from the latest checkpoint, which this need not be.
            self._checkpointer.save(
                self._file_prefix, tag=False, iteration=iteration, metric=metric
            )


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
