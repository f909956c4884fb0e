"""What happens between the gradients and the update."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["before_update", "check_state_shapes"]


def before_update(
    optimizer: torch.optim.Optimizer, function: Callable[[], None]
) -> RemovableHandle:
    """Have ``function`` run in each step when the gradients are there: after a closure."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            function()
            return None

        def first() -> Any:
            with torch.enable_grad():
                result = closure()
            function()
            return result

        return args[:1], {**kwargs, "closure": first}

    return optimizer.register_step_pre_hook(hook)


def check_state_shapes(optimizer: torch.optim.Optimizer) -> None:
    """
    Refuse a state that was loaded and does not fit: torch's fused kernels would write beyond it.

    Raises:
        ValueError: a tensor of it has another shape than its parameter, and is no number.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimiser's {name} that was loaded has shape {tuple(value.shape)}, its "
                    f"parameter {tuple(parameter.shape)}: it is of another model, or of one whose "
                    "feedback was folded where this one's is not (fold_kolen_pollack)"
                )
