"""Conversion of a whole model, in place: the only walk over a model.

A converted module stays the same object and changes its class, so parameters, hooks, device, names
and every other reference to it (Detectron2's FPN keeps its convolutions in plain lists as well)
stay as they are.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import detectron2.layers
import torch
import torchvision
from tabulate import tabulate
from torch import nn

from .asymmetric import (
    AsymmetricConv2d,
    AsymmetricConvTranspose2d,
    AsymmetricLayer,
    AsymmetricLinear,
)
from .feedback import Backpropagation, FeedbackRule, get_rule

__all__ = [
    "FeedbackReport",
    "FeedbackRow",
    "as_patterns",
    "backpropagation",
    "check_exclude",
    "convert_feedback",
    "convert_part",
    "feedback_report",
    "first_match",
    "reset_feedback",
]

# By exact type: a subclass may compute something else, and only its author knows.
_ASYMMETRIC: dict[type[nn.Module], type[AsymmetricLayer]] = {
    nn.Conv2d: AsymmetricConv2d,
    detectron2.layers.Conv2d: AsymmetricConv2d,
    nn.ConvTranspose2d: AsymmetricConvTranspose2d,
    nn.Linear: AsymmetricLinear,
}

# Layers that multiply their input by a weight, so that a reader expects them in a report.
_WEIGHTED = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    detectron2.layers.DeformConv,
    detectron2.layers.ModulatedDeformConv,
    torchvision.ops.DeformConv2d,
)

# Within these the layers have other names.
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch._dynamo.OptimizedModule)


class FeedbackRow(NamedTuple):
    """One layer of a :class:`FeedbackReport`."""

    name: str
    rule: str
    reason: str
    """Why the layer stays on backpropagation; empty for a converted layer."""


class FeedbackReport(list[FeedbackRow]):
    """One row per layer with a weight, in the model's order; ``str()`` is a table."""

    def __str__(self) -> str:
        return tabulate(self, headers=("layer", "rule", "why on backpropagation"), tablefmt="pipe")


def convert_feedback(
    model: nn.Module,
    rule: str | type[FeedbackRule] = "sign_symmetry",
    *,
    scale: str = "mean_abs",
    gain: float = 1.0,
    exclude: Iterable[str] = (),
    seed: int = 0,
) -> nn.Module:
    """
    Makes every convolution, transposed convolution and linear layer of ``model`` send its error
    back by ``rule``, in place.

    A layer that has a rule already changes to this one. ``rule="backpropagation"`` restores the
    stock classes and drops all feedback state. Layers that cannot be converted stay on
    backpropagation and are in :func:`feedback_report`, with the reason.

    Args:
        model: any module; convert it before wrapping it (DistributedDataParallel, torch.compile)
            and before building its optimiser, which has to know learned feedback weights.
        rule: the name, short name or class of a rule, see :mod:`ss_detectron.layers.feedback`.
        scale: how large the feedback weight is, one of ``FEEDBACK_SCALES``.
        gain: multiplies the scale.
        exclude: shell-style patterns of module names (``"head.cls_score"``, ``"*.fpn_*"``). A
            pattern that matches a module excludes every layer in it. Excluded layers stay as they
            are.
        seed: with each layer's name within ``model``, determines all random feedback, the same on
            every rank whatever the ranks' own seeds. Parts that are converted one by one and have
            layers of the same names need different seeds.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: unknown rule or scale, a gain that is not positive, a wrapped model, or a
            pattern that matches no layer. The model is then unchanged.
    """
    exclude = as_patterns(exclude)
    check_exclude(model, exclude)
    return convert_part(model, rule, scale=scale, gain=gain, exclude=exclude, seed=seed)


def convert_part(
    part: nn.Module,
    rule: str | type[FeedbackRule],
    *,
    scale: str = "mean_abs",
    gain: float = 1.0,
    exclude: Iterable[str] = (),
    seed: int = 0,
    prefix: str = "",
    overrides: Mapping[str, str | type[FeedbackRule]] | None = None,
) -> nn.Module:
    """
    :func:`convert_feedback` for the builder of a part that will stand as ``prefix`` in the whole
    model: ``exclude`` speaks of names in the whole model, and a pattern may match nothing here.
    So does ``overrides``, which gives layers that match a pattern another rule.
    """
    rule = get_rule(rule)
    overrides = {pattern: get_rule(other) for pattern, other in (overrides or {}).items()}
    rule(scale, gain)  # refuses a wrong scale or gain before anything has changed
    for wrapper in _WRAPPERS:
        if isinstance(part, wrapper):
            raise ValueError(
                f"the model is wrapped in {wrapper.__name__}; convert it before wrapping it"
            )
    exclude = as_patterns(exclude)
    for name, layer in _layers(part):
        full_name = ".".join(filter(None, (prefix, name)))
        excluded_by = first_match(full_name, exclude)
        overridden_by = first_match(full_name, overrides)
        layer_rule = rule if overridden_by is None else overrides[overridden_by]
        if excluded_by is not None:
            if not isinstance(layer, AsymmetricLayer):
                layer.feedback_reason = f"excluded by {excluded_by!r}"
            continue
        layer.__dict__.pop("feedback_reason", None)
        if layer_rule is Backpropagation:
            _restore(layer)
            if overridden_by is not None:
                layer.feedback_reason = "its own rule is backpropagation"
        elif _obstacle(layer) is None:
            # A part that is itself a layer has no name within itself.
            _convert(layer, layer_rule(scale, gain, seed, name or prefix))
    return part


def feedback_report(model: nn.Module) -> FeedbackReport:
    """
    Which layer of ``model`` learns by which rule, now: one row per layer with a weight, in the
    order of ``named_modules``. The rule of a layer that stays on backpropagation comes with the
    reason.
    """
    report = FeedbackReport()
    for name, layer in _layers(model):
        if isinstance(layer, AsymmetricLayer):
            rule = Backpropagation if layer.feedback_suspended else layer.rule
            reason = "suspended for a moment" if layer.feedback_suspended else ""
            report.append(FeedbackRow(name, rule.name, reason))
        else:
            reason = getattr(layer, "feedback_reason", None) or _obstacle(layer) or "not converted"
            report.append(FeedbackRow(name, Backpropagation.name, reason))
    return report


def reset_feedback(model: nn.Module) -> None:
    """
    Derives all feedback state of ``model`` again from its weights as they are now; random draws
    stay the same draws.

    For several processes that start from weights of their own: DistributedDataParallel gives them
    all rank 0's, and Detectron2 tells it not to share buffers, so call this after wrapping.
    """
    for module in model.modules():
        if isinstance(module, AsymmetricLayer):
            module.reset_feedback()


@contextmanager
def backpropagation(model: nn.Module) -> Iterator[nn.Module]:
    """
    Within the context, backward passes of ``model`` run on backpropagation, also those of forward
    passes made before it; rules and state stay. Learned feedback receives no gradient meanwhile
    (under DistributedDataParallel, one of zero). A compiled model has to run its forward pass
    within the context as well.
    """
    layers = [
        layer
        for _, layer in _layers(model)
        if isinstance(layer, AsymmetricLayer) and not layer.feedback_suspended
    ]
    for layer in layers:
        layer.feedback_suspended = True
    try:
        yield model
    finally:
        for layer in layers:
            # Unless the layer was converted back meanwhile.
            layer.__dict__.pop("feedback_suspended", None)


def check_exclude(model: nn.Module, exclude: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a pattern of ``exclude`` matches no layer of ``model``.
    """
    names = [name for name, _ in _layers(model)]
    for pattern in as_patterns(exclude):
        if not any(first_match(name, (pattern,)) for name in names):
            raise ValueError(
                f"the exclude pattern {pattern!r} matches no layer of {type(model).__name__}; "
                f"its layers are named like {', '.join(map(repr, names[:3] + names[-2:]))} "
                "(print(feedback_report(model)) lists them). In a config, the patterns are "
                "MODEL.FEEDBACK.EXCLUDE."
            )


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern or several, as several."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first of shell-style patterns that matches the name or that of a module around it."""
    parts = name.split(".")
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(module, pattern) for module in around):
            return pattern
    return None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that belongs in a report."""
    for name, module in model.named_modules():
        if isinstance(module, _WEIGHTED) or _owns_matrix(module):
            yield name, module


def _owns_matrix(module: nn.Module) -> bool:
    """Whether the module itself holds a parameter of two or more dimensions: perhaps a weight."""
    parameters = module.parameters(recurse=False)
    return any(nn.parameter.is_lazy(p) or p.dim() >= 2 for p in parameters)


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot be converted, or None."""
    if isinstance(layer, AsymmetricLayer):
        return None
    kind = type(layer)
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance"
    if kind not in _ASYMMETRIC:
        known = next((stock for stock in _ASYMMETRIC if isinstance(layer, stock)), None)
        if known is not None:
            return f"{kind.__name__}, a subclass of {known.__name__} that may compute otherwise"
        return f"no asymmetric form of {kind.__name__}"
    if "weight" not in layer._parameters:
        return "its weight is computed, not a parameter (weight_norm, spectral_norm)"
    if kind is detectron2.layers.Conv2d and layer.padding_mode != "zeros":
        return f"Detectron2's Conv2d pads with zeros in spite of {layer.padding_mode!r}"
    return None


def _convert(layer: nn.Module, rule: FeedbackRule) -> None:
    if not isinstance(layer, AsymmetricLayer):
        stock_class = type(layer)
        layer.__class__ = _ASYMMETRIC[stock_class]
        layer.stock_class = stock_class
    layer.set_rule(rule)


def _restore(layer: nn.Module) -> None:
    if not isinstance(layer, AsymmetricLayer):
        return
    if type(layer) not in _ASYMMETRIC.values():
        raise ValueError(
            f"the class of a converted layer became {type(layer).__name__}, perhaps by a "
            "parametrization: undo that before converting back"
        )
    layer.drop_state()
    stock_class = layer.stock_class
    for name in ("rule", "stock_class", "feedback_suspended"):
        layer.__dict__.pop(name, None)
    layer.__class__ = stock_class
