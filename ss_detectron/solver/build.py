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

from .groups import match_feedback_groups
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
    weights (:func:`match_feedback_groups`).

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
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; choose 'SGD' or 'AdamW'")
    return maybe_add_gradient_clipping(cfg, optimizer)


def _parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Detectron2's groups, with the learning rate of the last layers and the options of SGD."""
    solver, last = cfg.SOLVER, cfg.SOLVER.LAST_LAYER
    last_parameters = _last_parameters(cfg, model)

    def with_base_lr(base_lr: float) -> list[dict[str, Any]]:
        return get_default_optimizer_params(
            model,
            base_lr=base_lr,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )

    # Of what is said of a parameter more than once, the last holds.
    groups = with_base_lr(solver.BASE_LR)
    if last.BASE_LR < 0:  # torch looks at one learning rate alone
        raise ValueError(f"SOLVER.LAST_LAYER.BASE_LR is {last.BASE_LR}; choose 0 or more")
    if last.BASE_LR:
        groups += [
            {**group, "params": [p for p in group["params"] if p in last_parameters]}
            for group in with_base_lr(last.BASE_LR)
        ]
    wanted = [f"SOLVER.{key}" for key in _OPTION_KEYS if solver[key]]
    wanted += [f"SOLVER.LAST_LAYER.{key}" for key in _OPTION_KEYS if last[key]]
    if solver.OPTIMIZER == "SGD":
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                node = last if parameter in last_parameters else solver
                no_sign_change = node.NO_SIGN_CHANGE and not name.endswith("bias")
                options = {
                    "batch_manhattan": node.BATCH_MANHATTAN,
                    "no_sign_change": no_sign_change,
                }
                groups.append({"params": [parameter], **options})
    elif wanted:
        raise ValueError(
            f"{wanted[0]} is an option of SGD, and SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: set "
            f"SOLVER.OPTIMIZER 'SGD' or {wanted[0]} False"
        )
    return reduce_param_groups(groups)


def _last_parameters(cfg: CfgNode, model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the model's last layers."""
    names = getattr(model, "last_layers", ())
    if not names:
        special = [key for key, value in cfg.SOLVER.LAST_LAYER.items() if value]
        if special:
            raise ValueError(
                f"SOLVER.LAST_LAYER.{special[0]} is set, but {type(model).__name__} does not say "
                "which its last layers are: give it last_layers, a tuple of the names of its "
                "modules, or set the key back to its default"
            )
        general = [key for key in _OPTION_KEYS if cfg.SOLVER[key]]
        if general:
            logger.warning(
                "SOLVER.%s holds for all layers: %s names no last layers.",
                " and SOLVER.".join(general),
                type(model).__name__,
            )
    return {p for name in names for p in model.get_submodule(name).parameters()}
