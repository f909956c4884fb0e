"""What the core's tests share; needs torch alone."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from ss_detectron import FEEDBACK_REGISTRY, FeedbackRule, convert_feedback
from ss_detectron.layers.feedback import InformationAlignment

RULES = [rule.short_name for _, rule in FEEDBACK_REGISTRY]
each_rule = pytest.mark.parametrize("rule", RULES)
each_feedback_rule = pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "bp"])


def assert_same(actual, expected) -> None:
    """Equal bit for bit, with the same names."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Flipping(FeedbackRule):
    """A rule of one's own, which counts updates: W and -W in turns."""

    name = "flipping"
    counts_updates = True

    def feedback(self, weight, state, fans):
        return (-1) ** state * weight


class FromInputs(InformationAlignment):
    """Information alignment that learns from what the layer takes in."""

    name = "information_alignment_from_inputs"
    short_name = ""
    needs_inputs = True
    rate = 0.1


def on_the(way: str) -> AbstractContextManager:
    """A convolution's way: the "exchange", or the "function" that others' hooks call for."""
    if way == "exchange":
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def stock_net(seed: int = 0) -> nn.Sequential:
    """A layer of each kind, for images of (2, 4, 4)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.Flatten(),
        nn.Linear(3 * 8 * 8, 5),
    )


def net(rule: str, scale: str = "mean_abs") -> nn.Sequential:
    """A network with what an instrument must not disturb: batch statistics and dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64 * 16, 5),
    )
    return convert_feedback(model, rule, scale=scale)


def images(count: int = 4) -> Tensor:
    """What :func:`net` takes."""
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(1).mean()
