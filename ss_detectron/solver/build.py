"""Optimisers from a config: which parameter has which settings."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)
from torch import nn

from ss_detectron.values import check_values

from .groups import match_feedback_groups
from .sgd import OPTIONS, SGD

__all__ = ["build_optimizer", "check_solver"]

logger = logging.getLogger(__name__)


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
        if solver.COMPILED or any(option in group for group in groups for option in OPTIONS):
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
