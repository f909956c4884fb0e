"""A training step that Detectron2's trainers lack."""

import logging
import time
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ss_detectron.layers import advance_feedback
from ss_detectron.utils.comm import any_rank, reduce_flags

from .not_finite import (
    ForwardState,
    Pass,
    all_finite,
    check_state,
    describe_step,
    image_names,
    not_finite,
)
from .preemption import stop_requested

__all__ = ["StepTrainer"]

logger = logging.getLogger(__name__)

# From its first scale, a gradient scaler comes here by 30 overflows in a row (fairseq ends a run at
# the same scale): then it is not the scale that makes gradients overflow.
_SMALLEST_SCALE = 1e-4


def _kind(group: dict[str, Any]) -> tuple[int, bool, bool]:
    """What tells one group of an optimiser's parameters from another: how many, SGD's or Adam's."""
    return len(group["params"]), "momentum" in group, "betas" in group


class StepTrainer(SimpleTrainer):
    """
    Detectron2's trainer, whose steps are taken only if all losses, on all ranks, and all gradients
    are finite. Otherwise the run ends with a report: the losses and image files of every rank, the
    learning rate, which gradients it is, and the layers whose feedback is largest. Hooks on the
    backward pass come before that. Nothing of such a step is kept, and a state that is not finite
    is refused to checkpoints.

    It also makes steps of several batches, whose gradients are averaged, and has mixed precision on
    the CPU as well (Detectron2's AMPTrainer is CUDA's): float16 and a gradient scaler on a GPU,
    bfloat16, which needs no scaling, on the CPU. Gradients that overflow in float16 are the
    scaler's business, until it has lowered its scale to 1e-4.

    Several small batches give the gradients of one large batch, but each has batch statistics of
    its own, and RetinaNet moves its loss normaliser in every one.

    Args:
        model, data_loader, optimizer: as Detectron2's.
        passes: batches per step.
        mixed_precision: whether forward passes run under autocast.
        device: the model's type of device.
        skips: how many steps that are not finite may be left out in one run, resumed or not,
            before the next ends it. They leave no trace in the model and the optimiser.

    Attributes:
        stop_agreed: whether any rank had been asked to stop by the last step's backward pass, the
            same on all ranks; see :class:`~ss_detectron.engine.preemption.PreemptionHook`.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        passes: int = 1,
        mixed_precision: bool = False,
        device: str = "cpu",
        skips: int = 0,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.passes = passes
        self.autocast = {
            "device_type": device,
            "dtype": torch.bfloat16 if device == "cpu" else torch.float16,
            "enabled": mixed_precision,
        }
        self.scaler = torch.amp.GradScaler(device, enabled=mixed_precision and device != "cpu")
        if self.scaler.is_enabled():
            # The scaler itself leaves out a step with an overflow, for a fused optimiser too:
            # hooks on the step would count it, and a checkpoint may turn it into another kind.
            optimizer._step_supports_amp_scaling = False
        self.skips = skips
        self.skipped = 0
        self.stop_agreed = False

    def run_step(self) -> None:
        """
        Raises:
            FloatingPointError: a loss or gradient is not finite, and no more steps may be left out.
        """
        assert self.model.training, "the model was left in evaluation mode"
        before = ForwardState(self._model) if self.skipped < self.skips else None
        self.optimizer.zero_grad()
        passes, data_time = [], 0.0
        for remaining in reversed(range(self.passes)):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            # DistributedDataParallel averages over the ranks once, in the last backward pass.
            local = remaining and isinstance(self.model, nn.parallel.DistributedDataParallel)
            with self.model.no_sync() if local else nullcontext():
                with torch.autocast(**self.autocast):
                    parts = self.model(batch)
                    if isinstance(parts, torch.Tensor):
                        parts = {"total_loss": parts}
                    loss = sum(parts.values()) / self.passes
                self.scaler.scale(loss).backward()
            losses = {name: part.detach() for name, part in parts.items()}
            passes.append(Pass(losses, image_names(batch)))
        if self.scaler.is_enabled():
            # Hooks and gradient clipping are to see gradients without the scale.
            self.scaler.unscale_(self.optimizer)
        self.after_backward()
        if not self._is_finite(passes):
            self._leave_out(passes, before)
            return
        self._write_metrics(self._mean_losses(passes), data_time)
        for name, value in getattr(self._model, "train_metrics", {}).items():
            get_event_storage().put_scalar(name, value.item())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        advance_feedback(self._model)

    def state_dict(self) -> dict[str, Any]:
        """
        Raises:
            FloatingPointError: it is no state to go on from: see
                :func:`~ss_detectron.engine.not_finite.check_state`.
        """
        check_state(self._model, self.optimizer)
        state = super().state_dict()
        state["skipped_steps"] = self.skipped
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Goes on where another trainer was, but with this optimiser's own settings (learning rates,
        which follow a schedule, excepted); which of them have changed is logged.

        Raises:
            ValueError: it is the state of another optimiser, or of other parameters.
        """
        groups, saved = self.optimizer.param_groups, state_dict["optimizer"]["param_groups"]
        if [_kind(group) for group in groups] != [_kind(group) for group in saved]:
            raise ValueError(
                "the checkpoint's optimiser is of another kind (SOLVER.OPTIMIZER) or has its "
                "parameters in other groups (SOLVER, MODEL) than this config's: resume the run by "
                "the config.yaml in its OUTPUT_DIR, or begin another one from its weights, by "
                "MODEL.WEIGHTS and without --resume"
            )
        own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        super().load_state_dict(state_dict)
        changed = set()
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            differ = [key for key, value in settings.items() if group.get(key, value) != value]
            changed |= {f"{key} {group[key]} -> {settings[key]}" for key in differ}
            group.update(settings)
        if changed:
            logger.warning(
                "The optimiser's settings are not those of the run that is resumed, which goes on "
                "with the new ones: %s.",
                ", ".join(sorted(changed)),
            )
        self.skipped = state_dict.get("skipped_steps", 0)
        if self.scaler.is_enabled() and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])

    @property
    def _model(self) -> nn.Module:
        wrapped = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model.module if wrapped else self.model

    def _mean_losses(self, passes: list[Pass]) -> dict[str, Tensor]:
        means = defaultdict(float)
        for losses, _ in passes:
            for name, loss in losses.items():
                means[name] += loss / self.passes
        return means

    def _is_finite(self, passes: list[Pass]) -> bool:
        """
        Whether the step may be taken, on every rank; all of them have to ask. Ranks agree on
        ``stop_agreed`` as well, in the same reduction.
        """
        losses = [item for losses, _ in passes for item in losses.items()]
        gradients = self._judged_gradients()
        finite = all_finite(loss for _, loss in losses)
        if gradients:
            finite = finite & all_finite(gradients.values())
        # One reduction, and one wait for the device.
        flags = torch.stack([~finite, torch.full_like(finite, stop_requested())])
        doubtful, self.stop_agreed = reduce_flags(flags)
        if not doubtful:
            return True
        return not any_rank(bool(not_finite(losses) or not_finite(gradients.items())))

    def _judged_gradients(self) -> dict[nn.Parameter, Tensor]:
        if self.scaler.is_enabled() and self.scaler.get_scale() >= _SMALLEST_SCALE:
            return {}
        return self._gradients()

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        """What the optimiser would use."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {p: p.grad for p in parameters if p.grad is not None}

    def _leave_out(self, passes: list[Pass], before: ForwardState | None) -> None:
        """Tells of a step that is not finite, and ends the run or goes on without it."""
        weights = not_finite(self._model.named_parameters())
        no_use = any_rank(bool(weights))
        skip = before is not None and not no_use
        numbers = [
            Pass({name: loss.item() for name, loss in losses.items()}, images)
            for losses, images in passes
        ]
        ranks, message = comm.all_gather(numbers), ""
        if comm.is_main_process():
            gradients = self._gradients()
            named = [
                (name, gradients.pop(p))
                for name, p in self._model.named_parameters()
                if p in gradients
            ]
            named += [("a parameter outside the model", g) for g in gradients.values()]
            facts = describe_step(self._model, self.optimizer, ranks, not_finite(named), weights)
            message = (
                f"Loss or gradient not finite at iteration {self.iter}, whose step is not taken:\n"
                f"{facts}\n{self._outcome(skip, no_use)}"
            )
            logger.log(logging.WARNING if skip else logging.ERROR, message)
        # No rank ends before the main one has told, and each with the whole message.
        message = comm.all_gather(message)[0]
        if not skip:
            raise FloatingPointError(message)
        self.skipped += 1
        self.optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())
        before.restore()
        get_event_storage().put_scalar("skipped_steps", self.skipped, smoothing_hint=False)

    def _outcome(self, skip: bool, no_use: bool) -> str:
        if skip:
            return f"Skipped: {self.skipped + 1} of SOLVER.MAX_SKIPPED_STEPS {self.skips} steps."
        if no_use:
            said = "The weights were not finite before this step already: skipping it is no use."
        elif self.skips:
            said = f"All {self.skips} steps of SOLVER.MAX_SKIPPED_STEPS have been skipped."
        else:
            said = "SOLVER.MAX_SKIPPED_STEPS N would skip up to N such steps."
        return (
            f"The run ends with a loss or gradient that is not finite, at iteration {self.iter}; "
            f"its last checkpoint is kept. {said} A lower SOLVER.BASE_LR, a longer "
            "SOLVER.WARMUP_ITERS, SOLVER.CLIP_GRADIENTS or, where norm(B)/norm(W) is large, a "
            "lower MODEL.FEEDBACK.GAIN may help."
        )
