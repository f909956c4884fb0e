"""A training step that Detectron2's trainers lack."""

import time
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

__all__ = ["AccumulatingTrainer"]


class AccumulatingTrainer(SimpleTrainer):
    """
    Detectron2's trainer, with a step over several batches, whose gradients are averaged, and with
    mixed precision on the CPU as well (Detectron2's AMPTrainer is CUDA's): float16 and a gradient
    scaler on a GPU, bfloat16, which needs no scaling, on the CPU.

    Several small batches give the gradients of one large batch, but each has batch statistics of
    its own, and RetinaNet moves its loss normaliser in every one.

    Args:
        model, data_loader, optimizer: as Detectron2's.
        passes: batches per step.
        mixed_precision: whether forward passes run under autocast.
        device: the model's type of device.
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

    def run_step(self) -> None:
        self.optimizer.zero_grad()
        losses, data_time = defaultdict(float), 0.0
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
            for name, part in parts.items():
                losses[name] += part.detach() / self.passes
        if self.scaler.is_enabled():
            # Hooks and gradient clipping are to see gradients without the scale.
            self.scaler.unscale_(self.optimizer)
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
