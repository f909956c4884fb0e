"""Optimisers: SGD with the options of Xiao et al. (2019), and which parameter has which settings.

Batch Manhattan (Liao, Leibo and Poggio 2016, arXiv:1510.05067) and no-sign-change, as in the code
of Xiao et al. (2019, arXiv:1811.03567), are settings of parameter groups, like the learning rate.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)
from torch import Tensor, nn
from torch.optim.sgd import sgd

from .layers import AsymmetricLayer
from .values import check_values

__all__ = ["SGD", "build_optimizer", "check_solver", "match_feedback_groups"]

logger = logging.getLogger(__name__)

_OPTIONS = ("batch_manhattan", "no_sign_change")
_SETTINGS = ("weight_decay", "momentum", "dampening", "nesterov", "maximize", *_OPTIONS)


class SGD(torch.optim.SGD):
    """
    :class:`torch.optim.SGD` (foreach) with the options of Xiao et al. (2019), arXiv:1811.03567, as
    settings of parameter groups. A step is:

    1. batch Manhattan: the gradient's sign stands for the gradient (a zero stays zero);
    2. weight decay, momentum and the update, as torch has them;
    3. no-sign-change (Dale's law): a weight that the update carries to zero or across it becomes
       1e-10 with the sign it had (float16, which has no 1e-10: its smallest normal number). A
       weight at exactly zero counts as positive: an update that does not raise it makes it 1e-10.
       (The authors' code makes it 1e-10 whatever the update.)

    ``param.grad`` is left as it is. State and state dict are torch's own SGD's, and each loads the
    other's; a checkpoint without the two options leaves them as they are.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in
            ``torch.optim.SGD``.
        batch_manhattan, no_sign_change: the options of the groups that do not set them.
        compiled: whether steps run under :func:`torch.compile`, which makes them one pass over the
            memory. The learning rate may change at every step; a change of another setting, or of
            which parameters have a gradient, compiles anew (torch warns when that has happened
            too often, and goes on uncompiled). Uncompiled are also the steps in which a
            parameter's momentum begins, and those with a parameter of less than 32 bits: compiled
            code leaves out roundings in between, which a sign can depend on.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        batch_manhattan: bool = False,
        no_sign_change: bool = False,
        maximize: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=True
        )
        self.compiled = compiled
        options = {"batch_manhattan": batch_manhattan, "no_sign_change": no_sign_change}
        self.defaults.update(options)
        for group in self.param_groups:
            group.update(options | group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": self.compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also called when a state dict is loaded, then with groups that may be torch's own SGD's.
        own = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group, before in zip(self.param_groups, own, strict=False):
            for option in _OPTIONS:
                group.setdefault(option, before[option])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        One step on the gradients as they are.

        Args:
            closure: computes the loss again, and the gradients.

        Returns:
            what ``closure`` returns, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [update for group in self.param_groups for update in self._updates(group)]
        if self.compiled and all(map(_compilable, updates)):
            for update in updates:
                # A number would be a constant to the compiler.
                update["lr"] = torch.as_tensor(update["lr"], dtype=torch.float64)
            _compiled_apply()(updates)
        else:
            _apply(updates)
        for update in updates:
            for param, buffer in zip(update["params"], update["buffers"], strict=False):
                self.state[param]["momentum_buffer"] = buffer
        return loss

    def _updates(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What :func:`_update` takes, for the parameters of each type that have a gradient."""
        with_gradient = [p for p in group["params"] if p.grad is not None]
        for dtype in dict.fromkeys(p.dtype for p in with_gradient):
            params = [p for p in with_gradient if p.dtype == dtype]
            if any(p.grad.layout != torch.strided for p in params):
                raise RuntimeError("ss_detectron's SGD takes no sparse gradients")
            has_momentum = group["momentum"] != 0
            yield {
                "params": params,
                "grads": [p.grad for p in params],
                "buffers": [self.state[p].get("momentum_buffer") for p in params if has_momentum],
                **{key: group[key] for key in ("lr", *_SETTINGS)},
            }


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    batch_manhattan: bool,
    no_sign_change: bool,
    **settings: Any,
) -> None:
    """Steps 1 to 3 of :class:`SGD` on parameters of one type; fills in momentum buffers."""
    if batch_manhattan:
        grads = torch._foreach_sign(grads)
    if no_sign_change:
        signs = _signs(params)
    sgd(params, grads, buffers, foreach=True, **settings)
    if no_sign_change:
        _keep_signs(params, signs)


def _signs(weights: list[Tensor]) -> list[Tensor]:
    """1 or -1, 1 for zero."""
    signs = torch._foreach_sign(weights)
    torch._foreach_add_(signs, 0.5)
    torch._foreach_sign_(signs)
    return signs


def _keep_signs(weights: list[Tensor], signs: list[Tensor]) -> None:
    """Sets those of the ``weights``, all of one type, that have lost their sign."""
    # Exact, one operation over all the weights at a time: those that kept their sign stay as they
    # are, the others become 0, and then the bound.
    torch._foreach_mul_(weights, signs)
    torch._foreach_clamp_min_(weights, 0)
    lost = torch._foreach_sign(weights)
    torch._foreach_sub_(lost, 1)
    torch._foreach_add_(weights, lost, alpha=-_smallest_weight(weights[0].dtype))
    torch._foreach_mul_(weights, signs)


def _smallest_weight(dtype: torch.dtype) -> float:
    return max(1e-10, torch.finfo(dtype).tiny)


def _apply(updates: list[dict[str, Any]]) -> None:
    for update in updates:
        _update(**update)


@functools.cache
def _compiled_apply() -> Callable[[list[dict[str, Any]]], None]:
    # Not before it is needed: importing the compiler takes seconds.
    return torch.compile(_apply, dynamic=False)


def _compilable(update: dict[str, Any]) -> bool:
    starts_momentum = any(buffer is None for buffer in update["buffers"])
    return not starts_momentum and update["params"][0].element_size() >= 4


def check_solver(cfg: CfgNode) -> None:
    """
    Refuses values of cfg.SOLVER that do not fit, before anything is built.

    Raises:
        ValueError: names the key.
    """
    check_values(cfg)
    solver = cfg.SOLVER
    if solver.OPTIMIZER != "SGD":
        options = {
            "BATCH_MANHATTAN": solver.BATCH_MANHATTAN,
            "NO_SIGN_CHANGE": solver.NO_SIGN_CHANGE,
            "LAST_LAYER.BATCH_MANHATTAN": solver.LAST_LAYER.BATCH_MANHATTAN,
            "LAST_LAYER.NO_SIGN_CHANGE": solver.LAST_LAYER.NO_SIGN_CHANGE,
            "COMPILED": solver.COMPILED,
        }
        for key, value in options.items():
            if value:
                raise ValueError(
                    f"SOLVER.{key} is an option of SGD, and SOLVER.OPTIMIZER is "
                    f"{solver.OPTIMIZER!r}: set SOLVER.OPTIMIZER 'SGD' or SOLVER.{key} False"
                )


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """
    SOLVER.OPTIMIZER over Detectron2's parameter groups, with the options of cfg.SOLVER, for the
    last layers those of SOLVER.LAST_LAYER, and gradient clipping as SOLVER.CLIP_GRADIENTS has it.
    Without any option, it is what Detectron2 builds, in torch's fused form, which takes a third of
    the time on a CPU. Learned feedback weights have the settings of
    their weights (:func:`match_feedback_groups`).

    Args:
        cfg: with this package's keys.
        model: whose ``last_layers``, if it has them, are the names of its last layers' modules.

    Raises:
        ValueError: a value that does not fit, or one for last layers that ``model`` does not name.
    """
    check_solver(cfg)
    solver = cfg.SOLVER
    groups = match_feedback_groups(_parameter_groups(cfg, model), model)
    if solver.OPTIMIZER == "AdamW":
        optimizer = torch.optim.AdamW(
            groups, solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, fused=True
        )
    else:
        settings = {
            "lr": solver.BASE_LR,
            "momentum": solver.MOMENTUM,
            "nesterov": solver.NESTEROV,
            "weight_decay": solver.WEIGHT_DECAY,
        }
        if solver.COMPILED or any(option in group for group in groups for option in _OPTIONS):
            optimizer = SGD(groups, compiled=solver.COMPILED, **settings)
        else:
            optimizer = torch.optim.SGD(groups, fused=True, **settings)
            optimizer.register_step_pre_hook(_start_momentum)
    return maybe_add_gradient_clipping(cfg, optimizer)


def _start_momentum(optimizer: torch.optim.SGD, args: tuple, kwargs: dict) -> None:
    """
    Begins the momentum of each parameter at 0, which is what torch has for a first step. Its fused
    kernel takes no mixture of parameters with and without momentum (one that was frozen until
    now), and leaves the momentum of a first step that a gradient scaler skips uninitialised.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Detectron2's groups, with the learning rate of the last layers and the options of SGD."""
    solver = cfg.SOLVER

    def with_base_lr(base_lr: float) -> list[dict[str, Any]]:
        return get_default_optimizer_params(
            model,
            base_lr=base_lr,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )

    groups = with_base_lr(solver.BASE_LR)
    last_parameters = _last_parameters(cfg, model)
    if solver.LAST_LAYER.BASE_LR:
        groups += [
            {**group, "params": [p for p in group["params"] if p in last_parameters]}
            for group in with_base_lr(solver.LAST_LAYER.BASE_LR)
        ]
    nodes = solver, solver.LAST_LAYER
    if any(node.BATCH_MANHATTAN or node.NO_SIGN_CHANGE for node in nodes):
        names = {p: name for name, p in model.named_parameters()}
        for parameter in [p for group in groups for p in group["params"]]:
            options = solver.LAST_LAYER if parameter in last_parameters else solver
            is_bias = names[parameter].endswith("bias")
            groups.append(
                {
                    "params": [parameter],
                    "batch_manhattan": options.BATCH_MANHATTAN,
                    "no_sign_change": options.NO_SIGN_CHANGE and not is_bias,
                }
            )
    # Of what is said of a parameter more than once, the last holds.
    return reduce_param_groups(groups)


def _last_parameters(cfg: CfgNode, model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the model's last layers; none where no key asks for them."""
    solver = cfg.SOLVER
    names = getattr(model, "last_layers", ())
    general = [key for key in ("BATCH_MANHATTAN", "NO_SIGN_CHANGE") if solver[key]]
    special = [f"LAST_LAYER.{key}" for key, value in solver.LAST_LAYER.items() if value]
    if special and not names:
        raise ValueError(
            f"SOLVER.{special[0]} is set, but {type(model).__name__} does not say which its last "
            "layers are: give it last_layers, a tuple of the names of its modules, or set the key "
            "back to its default"
        )
    if general and not names:
        logger.warning(
            "SOLVER.%s holds for all layers: %s names no last layers.",
            " and SOLVER.".join(general),
            type(model).__name__,
        )
    if not general and not special:
        return set()
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(
            f"{type(model).__name__}.last_layers names {missing[0]!r}, and it has no such module"
        )
    return {p for name in names for p in modules[name].parameters()}


def match_feedback_groups(groups: Iterable[dict[str, Any]], model: nn.Module) -> list[dict]:
    """
    Parameter groups in which each learned feedback weight (Kolen-Pollack) is in the group of its
    weight: with one learning rate and weight decay for both, the two converge (Akrout et al.
    2019, arXiv:1904.05391). For any optimiser::

        groups = match_feedback_groups(my_parameter_groups(model), model)
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4)

    Args:
        groups: as optimisers take them, dicts of "params" and settings; they are left as they are.
        model: whose layers they are of.

    Returns:
        new groups, in the same order. One that held nothing but feedback weights is empty.

    Raises:
        ValueError: of a weight and its feedback weight, only one is in ``groups``.
    """
    groups = [{**group, "params": _as_list(group["params"])} for group in groups]
    members = [(member, i) for i, group in enumerate(groups) for member in group["params"]]
    group_of = {_parameter(member): i for member, i in members}
    for name, layer in model.named_modules():
        if not (isinstance(layer, AsymmetricLayer) and layer.rule.learned):
            continue
        pair = {layer.rule.state_name: layer.feedback_state, "weight": layer.weight}
        found = [key for key, parameter in pair.items() if parameter in group_of]
        if len(found) == 1:
            (missing,) = pair.keys() - found
            raise ValueError(
                f"{name}.{found[0]} is in a parameter group and {name}.{missing} is in none: the "
                "two learn together. Put both in a group, or none; frozen ones are often left out: "
                "see their requires_grad"
            )
        if found:
            group_of[layer.feedback_state] = group_of[layer.weight]
    for i, group in enumerate(groups):
        stay = [m for m, before in members if before == i == group_of[_parameter(m)]]
        come = [m for m, before in members if before != i == group_of[_parameter(m)]]
        group["params"] = stay + come
    return groups


def _as_list(params: Any) -> list:
    return [params] if isinstance(params, Tensor) else list(params)


def _parameter(member: Tensor | tuple[str, Tensor]) -> Tensor:
    """Of a group's member, which may come with its name."""
    return member[1] if isinstance(member, tuple) else member
