"""SGD with the options of Xiao et al. (2019).

Batch Manhattan (Liao, Leibo and Poggio 2016, arXiv:1510.05067) and no-sign-change, as in the code
of Xiao et al. (2019, arXiv:1811.03567), are settings of parameter groups, like the learning rate.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

__all__ = ["OPTIONS", "SGD"]

OPTIONS = ("batch_manhattan", "no_sign_change")
"""The settings of parameter groups that torch's SGD does not have."""

_SETTINGS = ("weight_decay", "momentum", "dampening", "nesterov", "maximize", *OPTIONS)


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
            for option in OPTIONS:
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
