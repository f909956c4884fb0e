"""Kolen-Pollack at the price of fixed feedback."""

import logging
from collections.abc import Iterable, Iterator, MutableMapping
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ss_detectron.layers import AsymmetricLayer
from ss_detectron.layers.feedback import FoldedKolenPollack, KolenPollack
from ss_detectron.layers.sharded import is_sharded

from .hooks import before_update
from .sgd import SGD

__all__ = ["fold_kolen_pollack", "why_not_folded"]

logger = logging.getLogger(__name__)

_HANDLES: MutableMapping[torch.optim.Optimizer, tuple[RemovableHandle, ...]] = WeakKeyDictionary()
_RULES = KolenPollack, FoldedKolenPollack
_SUITED = SGD, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def fold_kolen_pollack(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """
    Keep Kolen-Pollack's feedback as a fixed offset from the weight and one number per layer,
    instead of a parameter that has a gradient and a state of the optimiser.

    W and B receive equal gradients, so with one learning rate and weight decay their difference
    only decays (Akrout et al. 2019, arXiv:1904.05391): B = W + c (B_0 - W_0). c stands in B's place
    in the optimiser, which is told before each step that its gradient is zero, or that there is
    none where the weight has none: so c decays as the optimiser decays, through momentum and
    whatever becomes of the learning rate. Training differs from that with a parameter by rounding
    alone, as long as the optimiser is all that moves W: B = W + c (B_0 - W_0) follows what else
    happens to W (a penalty in the loss, clamping), and, after steps within backpropagation(model),
    their momentum::

        model = convert_feedback(model, "kp")
        groups = match_feedback_groups([{"params": model.parameters()}], model)
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4)
        fold_kolen_pollack(model, optimizer)

    To be called when the model is where it stays, before it is wrapped for several processes and
    before a checkpoint is loaded. A checkpoint without folding is converted, but for what its
    optimiser kept of B. The norm of all gradients (clip_grad_norm_) has no part of B's any more.
    Another optimiser of the same weights needs another call, and so does a copy: torch's optimisers
    lose their hooks where they are copied or pickled.

    Args:
        model: some of whose layers learn by kolen_pollack; none is fine.
        optimizer: that of their weights.

    Returns:
        how many layers are folded.

    Raises:
        ValueError: it cannot be (:func:`why_not_folded`).
    """
    if reason := why_not_folded(model, optimizer):
        raise ValueError(f"Kolen-Pollack's feedback cannot be folded: {reason}")
    groups = _groups(optimizer)
    folded = [layer for layer in _layers(model) if _weights(layer)[0] in groups]
    shared: dict[Tensor, tuple[Tensor | None, Tensor]] = {}  # by layers that share their weight
    for layer in folded:
        state, rule = layer.feedback_state, layer.rule
        assert state is not None
        if rule.has_factor:
            if layer.feedback_factor not in groups:
                groups[layer.feedback_factor] = groups[_weights(layer)[0]]
                _insert(groups[layer.feedback_factor], layer)
            continue
        made = FoldedKolenPollack(rule.scale, rule.gain, rule.seed, rule.layer_name)
        if state in shared:
            layer.set_rule(made, *shared[state])
            continue
        layer.set_rule(made, made.state_of(state, layer.weight).detach())
        shared[state] = layer.feedback_state, layer.feedback_factor
        members = groups[state]["params"]
        members[next(i for i, p in enumerate(members) if p is state)] = layer.feedback_factor
    if folded:
        sharing: dict[Tensor, list[AsymmetricLayer]] = {}
        for layer in folded:
            sharing.setdefault(layer.feedback_factor, []).append(layer)
        entries = [
            _Entry(factor, torch.zeros_like(factor), _weights(layers[0]), layers)
            for factor, layers in sharing.items()
        ]
        suspended: dict[AsymmetricLayer, Tensor] = {}
        for handle in _HANDLES.pop(optimizer, ()):  # of an earlier call
            handle.remove()
        drop = partial(_drop_others, factors=[*sharing])
        _HANDLES[optimizer] = (
            before_update(optimizer, partial(_before_update, entries, suspended)),
            optimizer.register_step_post_hook(lambda *_: _after_step(entries, suspended)),
            optimizer.register_load_state_dict_post_hook(drop, prepend=True),
        )
        logger.info("Kolen-Pollack's feedback of %d layers is folded.", len(folded))
    return len(folded)


def why_not_folded(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """
    Return why the feedback of a model has to stay a parameter, or "".

    Because an optimiser looks at a weight itself (no-sign-change, weight decay within Adam's
    gradient) or may do so (any but SGD, Adam and AdamW), has begun already or has other settings
    for B than for W; or because the model is wrapped or sharded.
    """
    groups = _groups(optimizer)
    layers = [layer for layer in _layers(model) if _weights(layer)[0] in groups]
    if not layers:
        return ""
    kind = type(optimizer)
    if kind not in _SUITED:
        return f"{kind.__name__} may treat W and B differently"
    if is_sharded(model):
        return "the model is sharded"
    if any(isinstance(m, DataParallel | DistributedDataParallel) for m in model.modules()):
        return "the model is wrapped already"
    for layer in layers:
        weights, state = _weights(layer), layer.feedback_state
        group = groups[weights[0]]
        if group.get("no_sign_change"):
            return "no-sign-change looks at the weight itself"
        decoupled = kind is not torch.optim.Adam or group.get("decoupled_weight_decay")
        if group["weight_decay"] and not decoupled:
            return "Adam divides the weight decay, too, by the size of the gradients: use AdamW"
        learned = [] if layer.rule.has_factor else [state]
        if any(groups.get(p) is not group for p in [*weights, *learned]):
            return "W and B are in different parameter groups: match_feedback_groups"
        if any(optimizer.state.get(p) for p in learned):
            return "the optimiser has begun"
    return ""


def _layers(model: nn.Module) -> Iterator[AsymmetricLayer]:
    for module in model.modules():
        if isinstance(module, AsymmetricLayer) and type(module.rule) in _RULES:
            yield module


def _weights(layer: AsymmetricLayer) -> list[nn.Parameter]:
    return [layer.get_parameter(name) for name in layer.weight_names(layer)]


def _groups(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {p: group for group in optimizer.param_groups for p in group["params"]}


class _Entry(NamedTuple):
    factor: Tensor
    zero: Tensor
    weights: list[nn.Parameter]
    layers: list[AsymmetricLayer]
    """Those that share the weights."""


def _before_update(entries: list[_Entry], suspended: dict[AsymmetricLayer, Tensor]) -> None:
    """
    Give c a gradient of zero where B would receive one. Where only W does, by passes within
    backpropagation(model), keep W.
    """
    for factor, zero, weights, layers in entries:
        stands = False
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for gradient in gradients:
            stands = stands or gradient.__dict__.pop("suspends_feedback", False)
        offsets = {}
        for layer in layers:
            # Not through the module, whose ways of attributes cost a small network a per cent.
            kept = layer.__dict__["_buffers"]
            if (own := kept.get("feedback_factor")) is None:  # the rule is another now
                continue
            if own is not factor:
                raise RuntimeError(
                    "the model was moved or converted after fold_kolen_pollack, whose optimiser no "
                    "longer has its feedback: build the optimiser, and fold, when it is where it "
                    "stays"
                )
            stands = stands or layer.bypass_feedback
            layer.__dict__["_backward_passes"] = 0
            offsets[kept["feedback_offset"]] = layer
        factor.grad = zero if gradients and offsets and not stands else None
        if stands:
            suspended.update((layer, layer.weight.detach().clone()) for layer in offsets.values())


def _after_step(entries: list[_Entry], suspended: dict[AsymmetricLayer, Tensor]) -> None:
    for entry in entries:
        entry.factor.grad = None  # nobody is to add to it
    while suspended:
        layer, before = suspended.popitem()
        layer.keep_feedback(before)


def _insert(group: dict[str, Any], layer: AsymmetricLayer) -> None:
    """Put c where B would stand, after the parameters of its layer."""
    own = {*layer.parameters(recurse=False)}
    place = 1 + max(i for i, p in enumerate(group["params"]) if p in own)
    group["params"].insert(place, layer.feedback_factor)
    if "param_names" in group:
        group["param_names"].insert(place, f"{group['param_names'][place - 1]}.feedback_factor")


def _drop_others(optimizer: torch.optim.Optimizer, factors: Iterable[Tensor]) -> None:
    """After loading: what a checkpoint without folding has of B in the place of c."""
    dropped = 0
    for factor in factors:
        state = optimizer.state.get(factor, {})
        if any(isinstance(value, Tensor) and value.numel() > 1 for value in state.values()):
            del optimizer.state[factor]
            dropped += 1
    if dropped:
        logger.warning(
            "The checkpoint has the feedback of Kolen-Pollack as parameters. It is folded now "
            "(B = W + c (B_0 - W_0)), without what the optimiser kept of %d of them: the run goes "
            "on, but not bit for bit.",
            dropped,
        )
