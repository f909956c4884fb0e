"""
Instruments: how far feedback weights, and the gradients they give, are from backpropagation's.

In a training loop of one's own::

    loss = model(batch)
    reference = backpropagation_gradients(model, loss)   # a second backward pass, nothing else
    loss.backward()
    angles = gradient_angles(model, reference)           # .total, .per_layer["layer1.conv1"]
    weights = weight_alignment(model)                    # {"layer1.conv1": (angle, ...), ...}

Detectron2's trainers get :class:`ss_detectron.engine.AlignmentHook`.
"""

import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import AsymmetricLayer, backpropagation
from .layers.report import weight_layers
from .layers.sharded import gather, is_sharded

__all__ = [
    "GradientAngles",
    "WeightAlignment",
    "backpropagation_gradients",
    "compiled_parts",
    "gradient_angles",
    "weight_alignment",
]


class WeightAlignment(NamedTuple):
    """How one layer's feedback weight B lies to its weight W."""

    angle: float
    """Between W and B as vectors, in degrees: 0 for backpropagation, about 90 for a random B."""
    norm_ratio: float
    """norm(B) / norm(W)."""
    sign_agreement: float
    """The share of weights whose sign is that of their feedback weight, 0 to 1."""


class GradientAngles(NamedTuple):
    """Angles, in degrees, between a model's gradients and others of the same parameters."""

    total: float
    """Over all parameters; nan where one of the two is zero or not finite."""
    per_layer: dict[str, float]
    """Layer name -> that of the layer's own parameters (weight and bias)."""


@torch.no_grad()
def weight_alignment(model: nn.Module) -> dict[str, WeightAlignment]:
    """
    For every layer of the model's feedback report that has a weight, in the model's order. A layer
    on backpropagation has B = W.
    """
    found = {}
    for name, layer in _layers(model):
        weight = gather(layer.weight)
        # While backpropagation(model) is in force, this is W.
        acts = isinstance(layer, AsymmetricLayer) and not hasattr(layer, "feedback_reason")
        feedback = layer.current_feedback() if acts else weight
        sums = _sums(weight, feedback)
        squares = sums[1].item()
        found[name] = WeightAlignment(
            _angle(sums),
            math.sqrt(sums[2].item() / squares) if squares else math.nan,
            (weight.sign() == feedback.sign()).double().mean().item(),
        )
    return found


def backpropagation_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """
    The gradients that backpropagation gives, at the same weights, on the same batch and from the
    same forward pass; ``loss`` can be passed backwards afterwards, by the model's own rules.

    Nothing else changes: no ``grad``, no random state, no statistics. DistributedDataParallel does
    not exchange these gradients: they are this process's.

    Args:
        model: which computed ``loss``, not compiled.
        loss: a scalar; where forward passes run under autocast, it need not be scaled.

    Returns:
        parameter name -> gradient, for the parameters that learn, but for learned feedback.

    Raises:
        ValueError: a part of the model is compiled; its graph would go on by the rules. Or the
            model is sharded.
    """
    if is_sharded(model):
        raise ValueError("backpropagation's gradients cannot be taken of a sharded model")
    if compiled := compiled_parts(model):
        raise ValueError(
            f"backpropagation's gradients cannot be taken from a forward pass of a compiled model: "
            f"{', '.join(name or type(model).__name__ for name in compiled)} is compiled"
        )
    parameters = dict(_parameters(model))
    with backpropagation(model), torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True
        )
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


@torch.no_grad()
def gradient_angles(model: nn.Module, reference: dict[str, Tensor]) -> GradientAngles:
    """
    Return the angles between the parameters' ``grad`` and other gradients of them, those of
    :func:`backpropagation_gradients`.

    Args:
        model: after its backward pass.
        reference: parameter name -> gradient; other scalings do not matter.

    Returns:
        the angle over all parameters, and those of the layers of the feedback report. A layer
        where one of the two gradients is zero or not finite has no angle, and is not there.
    """
    total = torch.zeros(3, dtype=torch.float64)
    by_parameter: dict[nn.Parameter, Tensor] = {}
    for name, parameter in _parameters(model):
        if name in reference and parameter.grad is not None:
            sums = _sums(parameter.grad, reference[name]).cpu()
            total += sums
            by_parameter[parameter] = sums
    per_layer = {}
    for name, layer in _layers(model):
        own = [by_parameter[p] for p in layer.parameters(recurse=False) if p in by_parameter]
        if own and math.isfinite(angle := _angle(torch.stack(own).sum(0))):
            per_layer[name] = angle
    return GradientAngles(_angle(total), per_layer)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in weight_layers(model):
        if isinstance(layer, AsymmetricLayer) or isinstance(
            getattr(layer, "weight", None), nn.Parameter
        ):
            yield name, layer


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those that learn, but for learned feedback."""
    feedback = {
        layer.feedback_state
        for layer in model.modules()
        if isinstance(layer, AsymmetricLayer) and layer.rule.learned
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in feedback:
            yield name, parameter


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a . b, a . a and b . b, in double precision: near 0 degrees, the angle needs it."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return torch.stack((a @ b, a @ a, b @ b))


def _angle(sums: Tensor) -> float:
    """In degrees; nan where a vector is zero."""
    dot, a, b = sums.tolist()
    norm = math.sqrt(a) * math.sqrt(b)
    if not (norm > 0 and math.isfinite(dot)):
        return math.nan
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / norm))))


def compiled_parts(model: nn.Module) -> list[str]:
    """Return the names of the modules of ``model`` that are compiled, by whatever way."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds
    return [
        name
        for name, module in model.named_modules()
        if module._compiled_call_impl is not None
        or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))
    ]
