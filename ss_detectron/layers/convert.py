"""Conversion of a whole model, in place: the only walk over a model that changes it.

A converted module stays the same object and changes its class, so parameters, hooks, device, names
and every other reference to it (Detectron2's FPN keeps its convolutions in plain lists as well)
stay as they are.
"""

import logging
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, cast

from torch import Tensor, nn

from .asymmetric import AsymmetricLayer, asymmetric_form, is_form, obstacle
from .feedback import Backpropagation, FeedbackRule, get_rule
from .names import as_patterns, first_match, grouped, plain_modules
from .report import EXCLUDED, OWN_RULE, feedback_report, weight_layers
from .sharded import is_sharded
from .watch import unwatch, watch

__all__ = [
    "advance_feedback",
    "backpropagation",
    "check_exclude",
    "convert_feedback",
    "convert_part",
    "mirror_feedback",
    "reset_feedback",
]

logger = logging.getLogger(__name__)

_REDUCING = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def convert_feedback(
    model: nn.Module,
    rule: str | type[FeedbackRule] = "sign_symmetry",
    *,
    scale: str = "mean_abs",
    gain: float = 1.0,
    exclude: str | Iterable[str] = (),
    overrides: Mapping[str, str | type[FeedbackRule]] | None = None,
    seed: int = 0,
) -> nn.Module:
    """
    Make every convolution, transposed convolution, linear layer and ``nn.MultiheadAttention`` of
    ``model`` send its error back by ``rule``, in place.

    That includes the last layer, a classifier's or a detector's outputs. Published comparisons,
    and the configs of this package, keep it on backpropagation::

        convert_feedback(resnet18(), "sign_symmetry", overrides={"fc": "backpropagation"})

    A layer that has a rule already changes to this one. ``rule="backpropagation"`` restores the
    stock classes and drops all feedback state. Layers that cannot be converted stay on
    backpropagation and are in :func:`feedback_report`, with the reason; a warning names those that
    nobody excluded. A layer that is converted and whose parent uses its weight without calling it
    stays on backpropagation as well: the first forward pass with gradients warns of it.

    What records a program of the model (torch.export, ONNX, torch.jit.trace) gets stock operations:
    a program that is trained learns by backpropagation. torch.func's gradients, torch.jit.script
    and torch.ao's quantisation refuse a converted model.

    Args:
        model: any module; convert it before wrapping it (DistributedDataParallel, torch.compile)
            and sharding it (fully_shard), and before building its optimiser, which has to know
            learned feedback weights.
        rule: the name, short name or class of a rule, see :mod:`ss_detectron.layers.feedback`.
        scale: how large the feedback weight is, one of ``FEEDBACK_SCALES``.
        gain: multiplies the scale.
        exclude: shell-style patterns of module names (``"head.cls_score"``, ``"*.fpn_*"``). A
            pattern that matches a module excludes every layer in it. Excluded layers stay as they
            are.
        overrides: such patterns -> another rule for the layers that they match.
        seed: with each layer's name within ``model``, determines all random feedback, the same on
            every rank whatever the ranks' own seeds. Parts that are converted one by one and have
            layers of the same names need different seeds.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: unknown rule or scale, a gain that is not positive, a wrapped or sharded model,
            a pattern that matches no layer, or a layer that cannot be converted back. The model is
            then unchanged.
    """
    exclude = as_patterns(exclude)
    check_exclude(model, exclude)
    _check_patterns(model, overrides or (), "overrides")
    convert_part(
        model, rule, scale=scale, gain=gain, exclude=exclude, overrides=overrides, seed=seed
    )
    left_out: dict[str, list[str]] = {}
    for row in feedback_report(model):
        if row.left_out and get_rule(rule) is not Backpropagation:
            left_out.setdefault(row.why, []).append(row.name)
    if left_out:
        logger.warning(
            "%d layers stay on backpropagation that nobody excluded: %s",
            sum(map(len, left_out.values())),
            "; ".join(f"{', '.join(grouped(names))}: {why}" for why, names in left_out.items()),
        )
    return model


def convert_part(
    part: nn.Module,
    rule: str | type[FeedbackRule],
    *,
    scale: str = "mean_abs",
    gain: float = 1.0,
    exclude: str | Iterable[str] = (),
    overrides: Mapping[str, str | type[FeedbackRule]] | None = None,
    seed: int = 0,
    prefix: str = "",
) -> nn.Module:
    """
    Do what :func:`convert_feedback` does, for the builder of a part that will stand as ``prefix``
    in the whole model. Patterns speak of names in the whole model and may match nothing here.
    """
    rule = get_rule(rule)
    others = {pattern: get_rule(other) for pattern, other in (overrides or {}).items()}
    rule(scale, gain)  # refuses a wrong scale or gain, whether or not a layer will have one
    _check_not_wrapped(part)
    if is_sharded(part):
        raise ValueError(
            "the model is sharded over processes: convert it before fully_shard (reset_feedback, "
            "advance_feedback and backpropagation work afterwards)"
        )
    exclude = as_patterns(exclude)
    changes = []
    for name, layer in weight_layers(part):
        full_name = ".".join(filter(None, (prefix, name)))
        if (pattern := first_match(full_name, exclude)) is not None:
            if not isinstance(layer, AsymmetricLayer):
                changes.append(_Change(layer, reason=f"{EXCLUDED}{pattern!r}"))
            continue
        overridden = first_match(full_name, others)
        layer_rule = rule if overridden is None else others[overridden]
        if layer_rule is Backpropagation:
            _check_restorable(layer)
            reason = "" if overridden is None else OWN_RULE
            changes.append(_Change(layer, reason=reason))
        elif obstacle(layer) is None and layer_rule.needs_inputs and not _form(layer).linear_map:
            reason = (
                f"{layer_rule.name} needs a linear map of {type(layer).__name__}, which has none"
            )
            changes.append(_Change(layer, reason=reason))
        elif obstacle(layer) is None:
            # A part that is itself a layer has no name within itself.
            changes.append(_conversion(layer, layer_rule(scale, gain, seed, name or prefix)))
        else:
            changes.append(_Change(layer))
    _share_learned(part, changes)
    # Not before all of them are known to be possible.
    unwatch(part.modules())
    for change in changes:
        change.apply()
    watch(part)
    return part


class _Change(NamedTuple):
    """What becomes of a layer: the rule and its state, or the stock class and a reason."""

    layer: nn.Module
    rule: FeedbackRule | None = None
    state: Tensor | None = None
    reason: str = ""

    def apply(self) -> None:
        self.layer.__dict__.pop("feedback_reason", None)
        if self.rule is None:
            _restore(self.layer)
            if self.reason:
                self.layer.feedback_reason = self.reason  # type: ignore[assignment]
            return
        if not isinstance(self.layer, AsymmetricLayer):
            stock_class = type(self.layer)
            self.layer.__class__ = asymmetric_form(stock_class)  # type: ignore[assignment]
            self.layer.stock_class = stock_class  # type: ignore[assignment]
        self.layer.set_rule(self.rule, self.state)  # type: ignore[operator]


def _form(layer: nn.Module) -> type[AsymmetricLayer]:
    """Of a layer that is converted, or can be."""
    form = type(layer) if isinstance(layer, AsymmetricLayer) else asymmetric_form(type(layer))
    assert form is not None
    return form


def _conversion(layer: nn.Module, rule: FeedbackRule) -> _Change:
    form = _form(layer)
    weight = form.weight_of(layer).detach()
    return _Change(layer, rule, rule.initial_state(weight, form.fans(layer)))  # type: ignore[arg-type]


def _share_learned(part: nn.Module, changes: list[_Change]) -> None:
    """
    Let layers that share a weight share its learned feedback, which so receives all that the weight
    receives. Where others use the weight as well, it cannot: leave the layers on backpropagation.
    """
    places = {change.layer: i for i, change in enumerate(changes)}
    rules: dict[nn.Module, FeedbackRule | None] = {
        module: module.rule
        for module in part.modules()
        if isinstance(module, AsymmetricLayer) and module not in places
    }
    rules |= {change.layer: change.rule for change in changes}
    users: dict[Tensor, dict[nn.Module, str]] = {}
    for name, module in plain_modules(part):
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, {})[module] = name
    shared: dict[tuple[Tensor, ...], tuple[FeedbackRule, Tensor]] = {}
    for layer, rule in rules.items():
        if rule is None or not (rule.learned or rule.has_factor):
            continue
        weights = tuple(getattr(layer, name) for name in _form(layer).weight_names(layer))
        uses = {user: name for w in weights for user, name in users.get(w, {}).items()}
        other = next((u for u in uses if type(rules.get(u)) is not type(rule)), None)
        if other is not None:
            reason = (
                f"its weight is also {uses[other] or 'the whole model'}'s "
                f"({type(other).__name__}); {rule.name} needs all that the weight learns"
            )
            if layer not in places:
                raise ValueError(f"{uses[layer]} cannot keep its rule: {reason}")
            changes[places[layer]] = _Change(layer, reason=reason)
        elif layer not in places:
            # Of a folded one, nothing new can share the feedback: it has another rule.
            shared[weights] = rule, cast(Tensor, layer.feedback_state)
        elif len(uses) > 1:
            own = rule, nn.Parameter(cast(Tensor, changes[places[layer]].state))
            changes[places[layer]] = _Change(layer, *shared.setdefault(weights, own))


def _check_restorable(layer: nn.Module) -> None:
    if isinstance(layer, AsymmetricLayer) and not is_form(type(layer)):
        raise ValueError(
            f"there is no stock layer to go back to from {type(layer).__name__}: undo what changed "
            "the class of a converted layer (a parametrization), or register_layer it"
        )


def _restore(layer: nn.Module) -> None:
    if not isinstance(layer, AsymmetricLayer):
        return
    layer.drop_state()
    stock_class = layer.stock_class
    for name in ("rule", "stock_class", "bypass_feedback", "__module__"):
        layer.__dict__.pop(name, None)
    layer.__class__ = stock_class  # type: ignore[assignment]


def _check_not_wrapped(model: nn.Module) -> None:
    # Those that reduce gradients know the parameters of the time when they were made, wherever they
    # stand (Lightning Fabric wraps them once more). The compiler takes seconds to import.
    dynamo = sys.modules.get("torch._dynamo")
    wrapped = [m for m in model.modules() if isinstance(m, _REDUCING)]
    wrapped += [model] if dynamo and isinstance(model, dynamo.OptimizedModule) else []
    if wrapped:
        raise ValueError(
            f"the model is wrapped in {type(wrapped[0]).__name__}; convert it before wrapping it"
        )


def advance_feedback(model: nn.Module) -> None:
    """
    Note that the weights of ``model`` have been updated, for rules that count updates (brSF).

    To be called once after every step of the optimiser, which a learner's ``step()`` and this
    package's Trainer do. In a loop of one's own::

        optimizer.register_step_post_hook(lambda *_: advance_feedback(model))
    """
    for module in model.modules():
        if isinstance(module, AsymmetricLayer):
            module.advance_feedback()


def reset_feedback(model: nn.Module) -> None:
    """
    Derive all feedback state of ``model`` again from its weights as they are now; random draws
    stay the same draws.

    For several processes that start from weights of their own: DistributedDataParallel gives them
    all rank 0's, and Detectron2 tells it not to share buffers, so call this after wrapping. With a
    model that is sharded (fully_shard), every process has to call it.
    """
    for layer in _resharded(model):
        layer.reset_feedback()


def mirror_feedback(model: nn.Module, samples: int = 10) -> int:
    """
    Let feedback that starts at random learn what the weights are, from noise sent through each
    layer: one phase of the weight mirrors of Akrout et al. (2019, arXiv:1904.05391), for every
    rule with such feedback (fa, kp, wm, ia). B becomes the gain times the mean of y x^T over
    inputs x ~ N(0, 1), where y = W x without bias and nonlinearity; its angle to W is about
    atan(samples^-1/2), 18 degrees for 10.

    Kolen-Pollack, whose B learns as W does, keeps what such a phase gives, and need not wait until
    what W has learned outweighs its start::

        model = convert_feedback(resnet18(), "kp")
        mirror_feedback(model)

    To be called before the first step: an optimiser that has begun may still move B by what it was.
    The random numbers follow from the rules' seeds. With a model that is sharded (fully_shard),
    every process has to call it.

    Args:
        samples: how many times as many vectors of noise as a layer has inputs (of a convolution,
            those of one output position).

    Returns:
        how many layers have learned.

    Raises:
        ValueError: ``samples`` is no whole number, or below 1.
    """
    if not isinstance(samples, numbers.Integral) or samples < 1:
        raise ValueError(f"samples is {samples!r}; it must be a whole number, 1 at least")
    return sum(layer.mirror_feedback(samples) for layer in _resharded(model))


def _resharded(model: nn.Module) -> list[AsymmetricLayer]:
    """The layers of a model, of which nothing is gathered for the moment: that does not stay."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]
    return [module for module in model.modules() if isinstance(module, AsymmetricLayer)]


@contextmanager
def backpropagation(model: nn.Module) -> Iterator[nn.Module]:
    """
    Run the backward passes of ``model`` within the context on backpropagation, also those of
    forward passes made before it; rules and state stay. Learned feedback receives no gradient
    meanwhile (under DistributedDataParallel, one of zero). A compiled model has to run its forward
    pass within the context as well.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, AsymmetricLayer) and not layer.bypass_feedback
    ]
    before = {layer: [*layer.gradients()] for layer in layers}
    for layer in layers:
        layer.bypass_feedback = True
    try:
        yield model
    finally:
        for layer in layers:
            # Unless the layer was converted back meanwhile.
            if layer.__dict__.pop("bypass_feedback", None) and not before[layer]:
                for gradient in layer.gradients():
                    gradient.suspends_feedback = True  # type: ignore[attr-defined]


def check_exclude(model: nn.Module, exclude: str | Iterable[str]) -> None:
    """
    Refuse patterns to no effect.

    Raises:
        ValueError: a pattern of ``exclude`` matches no layer of ``model``.
    """
    _check_patterns(model, as_patterns(exclude), "exclude (in a config, MODEL.FEEDBACK.EXCLUDE)")


def _check_patterns(model: nn.Module, patterns: Iterable[str], where: str) -> None:
    names = [name for name, _ in weight_layers(model)]
    for pattern in patterns:
        if not any(first_match(name, (pattern,)) for name in names):
            raise ValueError(
                f"the pattern {pattern!r} of {where} matches no layer of {type(model).__name__}; "
                f"its layers are named like {', '.join(map(repr, names[:3] + names[-2:]))} "
                "(print(feedback_report(model)) lists them)"
            )
