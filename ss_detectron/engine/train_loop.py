"""A training step that Detectron2's trainers lack."""

import logging
import time
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ss_detectron.learners import Learner
from ss_detectron.utils.comm import any_rank, reduce_flags

from .not_finite import (
    ForwardState,
    Pass,
    all_finite,
    check_state,
    describe_step,
    image_names,
    named_parameters,
    not_finite,
)
from .preemption import stop_requested

__all__ = ["StepTrainer"]

logger = logging.getLogger(__name__)

# From its first scale, a gradient scaler comes here by 30 overflows in a row (fairseq ends a run at
# the same scale): then it is not the scale that makes gradients overflow.
_SMALLEST_SCALE = 1e-4


class StepTrainer(SimpleTrainer):
    """
    Train by a learner, with steps that Detectron2's trainer lacks.

    A step is taken only if all losses and gradients are finite on all ranks. Otherwise the run ends
    with a report of what is not, and of the images. Nothing of such a step is kept, and a state
    that is not finite is refused to checkpoints.

    A step may be of several batches, whose gradients are averaged: those of one large batch, but
    each has batch statistics of its own, and RetinaNet moves its loss normaliser in every one.

    Mixed precision is float16 with a gradient scaler on a GPU, and bfloat16 on the CPU. Gradients
    that overflow in float16 are the scaler's business, until it has lowered its scale to 1e-4.

    Args:
        learner: possibly wrapped in DistributedDataParallel.
        data_loader, optimizer: as Detectron2's.
        passes: batches per step.
        mixed_precision: whether forward passes run under autocast.
        device: the model's type of device.
        skips: how many steps that are not finite may be left out in one run, resumed or not,
            before the next ends it. They leave no trace in the model and the optimiser.

    Attributes:
        model: what the learner trains, not wrapped.
        learner: not wrapped.
        stop_agreed: whether any rank was asked to stop by this step, the same on all ranks.
    """

    def __init__(
        self,
        learner: Learner | DistributedDataParallel,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        passes: int = 1,
        mixed_precision: bool = False,
        device: str = "cpu",
        skips: int = 0,
    ) -> None:
        self._wrapped = learner.train()
        is_wrapped = isinstance(learner, DistributedDataParallel)
        self.learner: Learner = learner.module if is_wrapped else learner
        super().__init__(self.learner.model, data_loader, optimizer)
        self.passes = passes
        self.autocast = {
            "device_type": device,
            "dtype": torch.bfloat16 if device == "cpu" else torch.float16,
            "enabled": mixed_precision,
        }
        self.scaler = torch.amp.GradScaler(device, enabled=mixed_precision and device != "cpu")
        if self.scaler.is_enabled():
            # The scaler itself leaves out a step with an overflow, for a fused optimiser too.
            optimizer._step_supports_amp_scaling = False
        self.skips = skips
        self.skipped = 0
        self.stop_agreed = False
        # The scaler does not tell whether it has taken a step, and its scale is a wait for the GPU.
        self._stepped = True
        optimizer.register_step_post_hook(lambda *_: setattr(self, "_stepped", True))

    def run_step(self) -> None:
        """
        Take a step, or leave it out.

        Raises:
            FloatingPointError: a loss or gradient is not finite, and no more steps may be left out.
        """
        assert self.model.training, "the model was left in evaluation mode"
        before = ForwardState(self.learner) if self.skipped < self.skips else None
        self.optimizer.zero_grad()
        passes, data_time = [], 0.0
        for remaining in reversed(range(self.passes)):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            passes.append(Pass(self._forward_backward(batch, remaining), image_names(batch)))
        if self.scaler.is_enabled():
            # Hooks and gradient clipping are to see gradients without the scale.
            self.scaler.unscale_(self.optimizer)
        self.after_backward()
        if not self._is_finite(passes):
            self._leave_out(passes, before)
            return
        names = passes[0].losses
        means = {name: sum(p.losses[name] for p in passes) / self.passes for name in names}
        self._write_metrics(means, data_time)
        for name, value in getattr(self.model, "train_metrics", {}).items():
            get_event_storage().put_scalar(name, value.item())
        self._stepped = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self._stepped:  # else gradients overflowed
            self.learner.step()

    def _forward_backward(self, batch: Any, remaining: int) -> dict[str, Tensor]:
        """The losses of one of a step's passes, with so many to come."""
        # DistributedDataParallel averages over the ranks once, in the last backward pass.
        local = remaining and isinstance(self._wrapped, DistributedDataParallel)
        with self._wrapped.no_sync() if local else nullcontext():
            with torch.autocast(**self.autocast):
                losses = self._wrapped(batch)
                if isinstance(losses, Tensor):
                    losses = {"total_loss": losses}
                loss = sum(losses.values()) / self.passes
            target = batch.get("label") if isinstance(batch, dict) else None
            if target is not None:
                target = target.to(loss.device, non_blocking=True)
            self.learner.backward(self.scaler.scale(loss), target=target)
        return {name: part.detach() for name, part in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """
        Return Detectron2's state, and what a resumed run needs beside.

        Raises:
            FloatingPointError: it is no state to go on from: see
                :func:`~ss_detectron.engine.not_finite.check_state`.
        """
        check_state(self.learner, self.optimizer)
        state = {**super().state_dict(), "skipped_steps": self.skipped}
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Go on where another trainer was, but with this optimiser's own settings, which are logged
        where they have changed; but for learning rates, which follow a schedule.

        Raises:
            ValueError: it is the state of another optimiser, or of other parameters.
        """
        groups, saved = self.optimizer.param_groups, state_dict["optimizer"]["param_groups"]
        if [_kind(group) for group in groups] != [_kind(group) for group in saved]:
            raise ValueError(
                "the checkpoint's optimiser is of another kind (SOLVER.OPTIMIZER) or has its "
                "parameters in other groups (SOLVER, MODEL) than this config's: resume the run by "
                "the config.yaml in its OUTPUT_DIR, or begin another from its weights, without "
                "--resume"
            )
        other = ("params", "lr", "foreach", "fused")  # the last two: which kernel does it
        own = [{k: v for k, v in group.items() if k not in other} for group in groups]
        super().load_state_dict(state_dict)
        changed = set()
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            differ = [key for key, value in settings.items() if group.get(key, value) != value]
            changed |= {f"{key} {group[key]} -> {settings[key]}" for key in differ}
            group.update(settings)
        if changed:
            logger.warning(
                "The resumed run goes on with the config's new settings of the optimiser: %s.",
                ", ".join(sorted(changed)),
            )
        self.skipped = state_dict.get("skipped_steps", 0)
        if self.scaler.is_enabled() and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])

    def _is_finite(self, passes: list[Pass]) -> bool:
        """
        Whether the step may be taken, on every rank; all of them have to ask. Ranks agree on
        ``stop_agreed`` as well, in the same reduction.
        """
        losses = [item for losses, _ in passes for item in losses.items()]
        may_overflow = self.scaler.is_enabled() and (
            self._stepped or self.scaler.get_scale() >= _SMALLEST_SCALE
        )
        gradients = {}
        if not may_overflow:  # those that the optimiser would use
            parameters = (p for group in self.optimizer.param_groups for p in group["params"])
            gradients = {p: p.grad for p in parameters if p.grad is not None}
        finite = all_finite(loss for _, loss in losses)
        if gradients:
            finite = finite & all_finite(gradients.values())
        # One reduction, and one wait for the device.
        flags = torch.stack([~finite, torch.full_like(finite, stop_requested())])
        doubtful, self.stop_agreed = reduce_flags(flags)
        if not doubtful:
            return True
        return not any_rank(bool(not_finite(losses) or not_finite(gradients.items())))

    def _leave_out(self, passes: list[Pass], before: ForwardState | None) -> None:
        """Tells of a step that is not finite, and ends the run or goes on without it."""
        ranks = comm.all_gather(
            [Pass({k: v.item() for k, v in p.losses.items()}, p.images) for p in passes]
        )
        weights = any_rank(bool(not_finite(named_parameters(self.learner).items())))
        skip = before is not None and not weights
        self.skipped += skip
        said = f"Skipped: {self.skipped} of SOLVER.MAX_SKIPPED_STEPS {self.skips} steps."
        if not skip:
            said = "The run ends; its last checkpoint is kept. " + (
                "Skipping this step is no use: the weights were not finite before it."
                if weights
                else f"{said} A lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, "
                "SOLVER.CLIP_GRADIENTS or, where norm(B)/norm(W) is large, a lower "
                "MODEL.FEEDBACK.GAIN may help."
            )
        message = (
            f"Loss or gradient not finite at iteration {self.iter}, whose step is not taken:\n"
            f"{describe_step(self.learner, self.optimizer, ranks)}\n{said}"
        )
        if comm.is_main_process():
            logger.log(logging.WARNING if skip else logging.ERROR, message)
        comm.synchronize()  # no rank ends before the main one has told
        if not skip:
            raise FloatingPointError(message)
        self.optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())
        before.restore()
        get_event_storage().put_scalar("skipped_steps", self.skipped, smoothing_hint=False)


def _kind(group: dict[str, Any]) -> tuple[int, bool, bool]:
    """What tells one group of an optimiser's parameters from another: how many, SGD's or Adam's."""
    return len(group["params"]), "momentum" in group, "betas" in group
