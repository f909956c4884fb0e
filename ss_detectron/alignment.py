"""
Instruments: how far feedback weights, and the gradients they give, are from backpropagation's.

In a training loop of one's own::

    loss = model(batch)
    reference = backpropagation_gradients(model, loss)   # a second backward pass, nothing else
    loss.backward()
    angles = gradient_angles(model, reference)           # {"": 41.2, "layer1.conv1": 38.0, ...}
    weights = weight_alignment(model)                    # {"layer1.conv1": (angle, ...), ...}

Detectron2's trainers get :class:`AlignmentHook`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from .compilation import compiled_parts
from .layers import AsymmetricLayer, backpropagation, feedback_report

__all__ = [
    "AlignmentHook",
    "WeightAlignment",
    "backpropagation_gradients",
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


@torch.no_grad()
def weight_alignment(model: nn.Module) -> dict[str, WeightAlignment]:
    """
    For every layer of the model's feedback report that has a weight, in the model's order. A layer
    on backpropagation has B = W.
    """
    found = {}
    for name, layer in _layers(model):
        weight = layer.weight
        # While backpropagation(model) is in force, this is W.
        feedback = layer.current_feedback() if isinstance(layer, AsymmetricLayer) else weight
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
        ValueError: a part of the model is compiled; its graph would go on by the rules.
    """
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
def gradient_angles(model: nn.Module, reference: dict[str, Tensor]) -> dict[str, float]:
    """
    The angles, in degrees, between the parameters' ``grad`` and other gradients of them, those of
    :func:`backpropagation_gradients`.

    Args:
        model: after its backward pass.
        reference: parameter name -> gradient; other scalings do not matter.

    Returns:
        "" -> the angle over all parameters, layer name -> that of the layer's own parameters
        (weight and bias), for the layers of the feedback report. A layer where one of the two
        gradients is zero or not finite has no angle, and is not there.
    """
    total, by_module = torch.zeros(3, dtype=torch.float64), defaultdict(float)
    for name, parameter in _parameters(model):
        if name in reference and parameter.grad is not None:
            sums = _sums(parameter.grad, reference[name]).cpu()
            total += sums
            by_module[name.rpartition(".")[0]] += sums
    layers = {name: by_module[name] for name, _ in _layers(model) if name in by_module}
    angles = {name: _angle(sums) for name, sums in {"": total, **layers}.items()}
    return {name: angle for name, angle in angles.items() if math.isfinite(angle)}


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

    def _log(self, angles: dict[str, float], weights: dict[str, WeightAlignment]) -> None:
        values = {}
        for name, angle in angles.items():
            values["/".join(filter(None, ("gradient_angle", name)))] = angle
        for name, alignment in weights.items():
            values[f"weight_angle/{name}"] = alignment.angle
            values[f"norm_ratio/{name}"] = alignment.norm_ratio
            values[f"sign_agreement/{name}"] = alignment.sign_agreement
        for name, value in values.items():
            self.trainer.storage.put_scalar(f"alignment/{name}", value, smoothing_hint=False)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for row in feedback_report(model):
        layer = model.get_submodule(row.name)
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            yield row.name, layer


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
