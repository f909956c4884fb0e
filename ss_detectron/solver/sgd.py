"""SGD with the options of Xiao et al. (2019): batch Manhattan and no-sign-change."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .hooks import check_state_shapes

__all__ = ["SGD"]

_SETTINGS = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")


class SGD(torch.optim.SGD):
    """
    Take the steps of :class:`torch.optim.SGD`, by its fused kernel, with the options of Xiao et
    al. (2019), arXiv:1811.03567, as settings of parameter groups. A step is:

    1. batch Manhattan (Liao, Leibo and Poggio 2016, arXiv:1510.05067): the gradient's sign stands
       for the gradient (a zero stays zero);
    2. weight decay, momentum and the update, as torch has them;
    3. no-sign-change (Dale's law): a weight that the update carries to zero or across it becomes
       1e-10 with the sign it had (float16, which has no 1e-10: its smallest normal number). A
       weight at exactly zero counts as positive: an update that does not raise it makes it 1e-10.
       (The authors' code makes it 1e-10 whatever the update.)

    ``param.grad`` is left as it is. State and state dict are torch's own SGD's, and each loads the
    other's; a checkpoint without the two options leaves them as they are.

    >>> weight = torch.nn.Parameter(torch.tensor([0.1, -0.1]))
    >>> weight.grad = torch.tensor([5.0, 5.0])
    >>> SGD([weight], lr=0.5, batch_manhattan=True, no_sign_change=True).step()
    >>> weight.tolist()
    [1.000000013351432e-10, -0.6000000238418579]

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in
            ``torch.optim.SGD``.
        batch_manhattan, no_sign_change: the options of the groups that do not set them.
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
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self.register_load_state_dict_post_hook(check_state_shapes)
        options = {"batch_manhattan": batch_manhattan, "no_sign_change": no_sign_change}
        self.defaults.update(options)
        for group in self.param_groups:
            group.update(options | group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also called when a state dict is loaded, then with groups that may be torch's own SGD's.
        own = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group, before in zip(self.param_groups, own, strict=False):
            for option in ("batch_manhattan", "no_sign_change"):
                group.setdefault(option, before[option])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        Take one step on the gradients as they are, or those of ``closure``, and return what it
        returns. A sparse gradient raises RuntimeError.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # torch's kernel takes no mixture of parameters with and without momentum so far.
            started: list[Tensor] = []
            starting: list[Tensor] = []
            for p in group["params"]:
                if p.grad is not None:
                    begun = self.state.get(p, {}).get("momentum_buffer") is not None
                    (started if begun else starting).append(p)
            for params in (started, starting):
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params]
        if group["batch_manhattan"]:
            grads = [g.sign() for g in grads]
        if group["no_sign_change"]:
            negative = [p < 0 for p in params]
        buffers = [self.state.get(p, {}).get("momentum_buffer") for p in params]
        settings = {key: group[key] for key in _SETTINGS}
        sparse = any(g.is_sparse for g in grads)
        # torch 2.4's fused kernel errs in 16 bits on the CPU.
        fused = all(p.element_size() >= 4 or p.is_cuda for p in params)
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=sparse,
            fused=fused,
            foreach=not fused,
            **settings,
        )
        if group["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer
        if group["no_sign_change"]:
            for p, was_negative in zip(params, negative, strict=True):
                least = max(1e-10, torch.finfo(p.dtype).tiny)
                p.masked_fill_(was_negative & (p >= 0), -least)
                p.masked_fill_(~was_negative & (p <= 0), least)
