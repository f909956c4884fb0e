"""Optimisers from a config: which parameter has which settings."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import (
    _create_gradient_clipper,
    get_default_optimizer_params,
    reduce_param_groups,
)
from torch import Tensor, nn

from .groups import match_feedback_groups
from .hooks import before_update, check_state_shapes
from .kolen_pollack import fold_kolen_pollack, why_not_folded
from .sgd import SGD

__all__ = ["build_optimizer"]

logger = logging.getLogger(__name__)

_OPTION_KEYS = ("BATCH_MANHATTAN", "NO_SIGN_CHANGE")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """
    Build SOLVER.OPTIMIZER over Detectron2's parameter groups, with the options of cfg.SOLVER, for
    the last layers those of SOLVER.LAST_LAYER, and gradient clipping as SOLVER.CLIP_GRADIENTS has
    it. Without any option, its steps are those of Detectron2's optimiser, by torch's fused kernel,
    which takes a third of the time on a CPU. Learned feedback weights have the settings of their
    weights (:func:`match_feedback_groups`), and are folded where they can be
    (:func:`fold_kolen_pollack`).

    Args:
        cfg: with this package's keys.
        model: whose ``last_layers``, if it has them, are the names of its last layers' modules.

    Raises:
        ValueError: a value that does not fit, or one for last layers that ``model`` does not name.
    """
    solver = cfg.SOLVER
    groups = match_feedback_groups(_parameter_groups(cfg, model), model)
    settings = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER == "SGD":
        optimizer = SGD(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **settings)
    elif solver.OPTIMIZER == "AdamW":
        optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        optimizer.register_load_state_dict_post_hook(check_state_shapes)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; choose 'SGD' or 'AdamW'")
    if reason := why_not_folded(model, optimizer):
        logger.info("Kolen-Pollack's feedback is a parameter in this run: %s.", reason)
    else:
        fold_kolen_pollack(model, optimizer)
    if solver.CLIP_GRADIENTS.ENABLED:
        clip = _create_gradient_clipper(solver.CLIP_GRADIENTS)
        before_update(optimizer, lambda: _clip_gradients(optimizer, clip))
    return optimizer


def _clip_gradients(optimizer: torch.optim.Optimizer, clip: Callable[[Tensor], None]) -> None:
    # Detectron2's optimisers clip a parameter without a gradient as well, and torch refuses that
    # of values.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                clip(parameter)


def _parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Detectron2's groups, with the learning rate of the last layers and the options of SGD."""
    solver, last = cfg.SOLVER, cfg.SOLVER.LAST_LAYER
    if last.BASE_LR < 0:  # torch looks at one learning rate alone
        raise ValueError(f"SOLVER.LAST_LAYER.BASE_LR is {last.BASE_LR}; choose 0 or more")
    wanted = [f"SOLVER.{key}" for key in _OPTION_KEYS if solver[key]]
    wanted += [f"SOLVER.LAST_LAYER.{key}" for key in _OPTION_KEYS if last[key]]
    if wanted and solver.OPTIMIZER != "SGD":
        raise ValueError(
            f"{wanted[0]} is an option of SGD, and SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: set "
            f"SOLVER.OPTIMIZER 'SGD' or {wanted[0]} False"
        )
    last_parameters = _last_parameters(cfg, model)
    settings = {
        "weight_decay_norm": solver.WEIGHT_DECAY_NORM,
        "bias_lr_factor": solver.BIAS_LR_FACTOR,
        "weight_decay_bias": solver.WEIGHT_DECAY_BIAS,
    }
    # Of what is said of a parameter more than once, the last holds.
    groups = get_default_optimizer_params(model, base_lr=solver.BASE_LR, **settings)
    if last.BASE_LR:
        for group in get_default_optimizer_params(model, base_lr=last.BASE_LR, **settings):
            group["params"] = [p for p in group["params"] if p in last_parameters]
            groups.append(group)
    if solver.OPTIMIZER == "SGD":
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                node = last if parameter in last_parameters else solver
                group = {"params": [parameter], "batch_manhattan": node.BATCH_MANHATTAN}
                group["no_sign_change"] = node.NO_SIGN_CHANGE and not name.endswith("bias")
                groups.append(group)
    return reduce_param_groups(groups)


def _last_parameters(cfg: CfgNode, model: nn.Module) -> set[nn.Parameter]:
    names, kind = getattr(model, "last_layers", ()), type(model).__name__
    special = [key for key, value in cfg.SOLVER.LAST_LAYER.items() if value]
    general = [f"SOLVER.{key}" for key in _OPTION_KEYS if cfg.SOLVER[key]]
    if special and not names:
        raise ValueError(
            f"SOLVER.LAST_LAYER.{special[0]} is set, but {kind} does not say which its last layers "
            "are: give it last_layers, a tuple of their modules' names, or leave the key out"
        )
    if general and not names:
        logger.warning("%s: for all layers; %s has no last_layers.", " and ".join(general), kind)
    return {p for name in names for p in model.get_submodule(name).parameters()}
