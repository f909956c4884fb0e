"""Losses, gradients and weights that are not finite: found, told, and a forward pass taken back."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ss_detectron.alignment import weight_alignment
from ss_detectron.layers import AsymmetricLayer
from ss_detectron.learners import Learner
from ss_detectron.utils.text import abbreviate

from .loss_normalizer import get_loss_normalizers, set_loss_normalizers

__all__ = [
    "ForwardState",
    "Pass",
    "all_finite",
    "check_state",
    "describe_step",
    "image_names",
    "named_parameters",
    "not_finite",
]


class Pass(NamedTuple):
    """One forward pass of one rank."""

    losses: dict[str, Any]
    """Loss name -> a scalar tensor, or a number once it is to be reported."""
    images: list[str] | None
    """The batch's files; None if it does not say."""


def image_names(batch: Any) -> list[str] | None:
    """
    Return the files of a batch, which is {"file_name": names, ...} for classification and
    [{"file_name": name, ...}, ...] for detection; None for a batch of another kind.
    """
    names = None
    if isinstance(batch, dict):
        names = batch.get("file_name")
    elif isinstance(batch, list) and all(isinstance(image, dict) for image in batch):
        names = [image.get("file_name", "unnamed") for image in batch]
    return None if names is None else [str(name) for name in names]


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """
    Return, as a tensor, whether all the numbers of one or more tensors are finite. Each is read
    once, on its device, and nothing is waited for. Numbers so large that the sum of their squares
    overflows make it False as well: :func:`not_finite` tells.
    """
    norms = torch._foreach_norm(list(tensors))
    return torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of those in which not every number is finite."""
    return [name for name, tensor in tensors if not tensor.isfinite().all()]


def named_parameters(learner: Learner) -> dict[str, nn.Parameter]:
    """Return the model's parameters, by their names there, and those of the learner's own."""
    return {name.removeprefix("model."): p for name, p in learner.named_parameters()}


class ForwardState:
    """
    Keep what a forward pass in training changes in a learner and its model: their buffers, such as
    the statistics of batch norm, but for feedback; and the loss normalisers of dense detectors.
    What layers took in, for a feedback rule to learn from, is forgotten.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._buffers = {
            name: buffer.clone()
            for name, buffer in learner.named_buffers()
            if not name.rpartition(".")[2].startswith("feedback")
        }
        self._normalizers = get_loss_normalizers(learner)

    @torch.no_grad()
    def restore(self) -> None:
        """Make the learner and its model what they were."""
        buffers = dict(self._learner.named_buffers())
        for name, value in self._buffers.items():
            buffers[name].copy_(value)
        set_loss_normalizers(self._learner, self._normalizers)
        for module in self._learner.modules():
            if isinstance(module, AsymmetricLayer):
                module.forget_inputs()


def describe_step(
    learner: Learner, optimizer: torch.optim.Optimizer, ranks: list[list[Pass]]
) -> str:
    """
    Return what is known of a step whose losses or gradients are not all finite, a line each.

    Args:
        learner: after the backward pass.
        optimizer: of the learner.
        ranks: the passes of every rank, with losses that are numbers.
    """
    lines = []
    for rank, passes in enumerate(ranks):
        for i, (losses, images) in enumerate(passes):
            where = f"rank {rank}" + f", pass {i + 1} of {len(passes)}" * (len(passes) > 1)
            values = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            files = "the batch names none" if images is None else ", ".join(images) or "none"
            lines.append(f"{where}: {values}; images: {files}")
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    lines.append(f"learning rate: {', '.join(f'{rate:g}' for rate in rates)}")
    used = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    parameters = named_parameters(learner)
    gradients = not_finite((name, p.grad) for name, p in parameters.items() if p in used)
    lines.append(f"gradients that are not finite: {_counted(gradients)}")
    if weights := not_finite(parameters.items()):
        lines.append(f"weights that are not finite: {_counted(weights)}")
    ratios = {name: found.norm_ratio for name, found in weight_alignment(learner.model).items()}
    # What is no number comes first.
    largest = sorted(ratios, key=lambda name: (ratios[name] == ratios[name], -ratios[name]))
    said = ", ".join(f"{name} {ratios[name]:.3g}" for name in largest[:5])
    lines.append(f"largest norm(B)/norm(W): {said or 'no layers'}")
    return "\n".join(f"  {line}" for line in lines)


def _counted(names: list[str]) -> str:
    return f"{len(names)}: {abbreviate(names, 5)}" if names else "0"


def check_state(learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """
    Refuse a state that is of no use to go on from or to evaluate.

    Raises:
        FloatingPointError: a parameter, a statistic of batch norm or a tensor of the optimiser's
            state is not finite; names some.
    """
    named = dict(named_parameters(learner))
    names = {parameter: name for name, parameter in named.items()}
    statistics = ("running_mean", "running_var")
    named |= {n: b for n, b in learner.model.named_buffers() if n.endswith(statistics)}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                named[f"{key} of {names.get(parameter)}"] = value
    if found := not_finite(named.items()):
        raise FloatingPointError(
            f"Not finite: {_counted(found)}. The training has diverged, and no checkpoint of it is "
            "written: those before are kept. A lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS "
            "or SOLVER.CLIP_GRADIENTS may help."
        )
