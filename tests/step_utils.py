"""What the tests of a training step share."""

from typing import Any

import torch
from detectron2.engine import HookBase, SimpleTrainer, TrainerBase
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ss_detectron import convert_feedback


class Model(nn.Module):
    """With two losses of a batch, which is images or also has a factor of the second loss."""

    def __init__(self, rule: str = "ss", norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3),
            nn.Flatten(),
            nn.Linear(12, 5),
        )
        convert_feedback(self, rule)
        self.calls = 0

    def forward(self, batch: Any) -> dict[str, Tensor]:
        self.calls += 1
        images, factor = (
            (batch["image"], batch["factor"]) if isinstance(batch, dict) else (batch, 1)
        )
        out = self.layers(images)
        return {"loss_a": out.square().sum(1).mean(), "loss_b": factor * out[:, 0].abs().mean()}


class Run(TrainerBase):
    """A trainer around a training step, as DefaultTrainer is."""

    def __init__(self, trainer: SimpleTrainer, own_hooks: list[HookBase]) -> None:
        super().__init__()
        self._trainer, self.model = trainer, trainer.model
        self.register_hooks(own_hooks)

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()


def train(trainer: SimpleTrainer, steps: int) -> list[dict[str, float]]:
    """The losses that each step has logged."""
    logged = []
    for _ in range(steps):
        with EventStorage(trainer.iter) as storage:
            trainer.run_step()
            logged.append({k: v for k, (v, _) in storage.latest().items() if "loss" in k})
        trainer.iter += 1
    return logged
