"""Finds the converted layers whose rule cannot act, because a module around them bypasses them.

A module may use the weight of a layer that it holds without calling the layer, as torchvision's
Swin does: ``F.linear(x, self.qkv.weight, self.qkv.bias)``. The error then flows back through the
weight. Conversion cannot see that. So it has the modules around converted layers watched, each in
its first forward pass with gradients, by a function mode that sees every operation with a layer's
weight in it; after that pass nothing of it is left.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from . import functional
from .asymmetric import AsymmetricLayer
from .names import grouped

__all__ = ["unwatch", "watch"]

logger = logging.getLogger(__name__)

# The operations that send an error back through a weight.
_PRODUCTS = frozenset(
    [f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)]
    + ["linear", "bilinear", "multi_head_attention_forward", "einsum", "tensordot"]
    + ["matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "baddbmm"]
)
_NEVER_CALLED = (AsymmetricLayer, nn.ModuleList, nn.ModuleDict)  # or not as a parent
_HANDLES = "feedback_watch"  # on a watched module


def watch(model: nn.Module) -> None:
    """Have each module around converted layers watched in its next forward pass with gradients."""
    for module in model.modules():
        if not isinstance(module, _NEVER_CALLED) and any(_layers(module)):
            module.__dict__[_HANDLES] = (
                module.register_forward_pre_hook(_enter),
                module.register_forward_hook(_leave, always_call=True),
            )


def unwatch(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`watch`."""
    for module in modules:
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()


def _layers(module: nn.Module) -> Iterable[AsymmetricLayer]:
    return (m for m in module.modules() if isinstance(m, AsymmetricLayer))


def _weights(layer: AsymmetricLayer) -> Iterator[Any]:
    for name in layer.weight_names(layer):
        # Not by getattr, which torch.fx would record.
        yield layer._parameters.get(name, layer.__dict__.get(name))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Active(threading.local):
    watch: "_Watch | None" = None


_active = _Active()


def _enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or functional.is_recording() or not torch.is_grad_enabled():
        return
    if _active.watch is not None and _active.watch.module is module:
        _active.watch.end()  # its pass was interrupted
    if _active.watch is None:
        if any(map(_is_compiled, module.modules())):
            # The compiler would see the mode, and compile again without it.
            return unwatch([module])
        _active.watch = _Watch(module)
        _active.watch.__enter__()  # type: ignore[no-untyped-call]
    _active.watch.look_into(module)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    active = _active.watch
    if torch.compiler.is_compiling() or active is None or active.module is not module:
        return
    active.end()
    if output is not None:  # otherwise it raised
        active.conclude()


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


class _Watch(TorchFunctionMode):
    """Notes which layers of a module are called, and whose weights others multiply by."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seen: list[nn.Module] = []
        self.called: set[AsymmetricLayer] = set()
        self.used: set[AsymmetricLayer] = set()
        self._layers: dict[int, set[AsymmetricLayer]] = {}  # by the id of their weight
        self._made: dict[int, tuple[Tensor, set[AsymmetricLayer]]] = {}  # of weights alone

    def look_into(self, module: nn.Module) -> None:
        """Learn the weights as they are now: sharding exchanges them before a module's forward."""
        self.seen.append(module)
        for layer in _layers(module):
            for weight in _weights(layer):
                self._layers.setdefault(id(weight), set()).add(layer)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._note(func, _tensors((args, kwargs)), _tensors(result))
        return result

    def _note(self, func: Callable[..., Any], tensors: list[Tensor], results: list[Tensor]) -> None:
        owners = [self._owners(t) for t in tensors]
        layers = set().union(*owners)
        if not layers:
            return
        if getattr(func, "__module__", "") == functional.__name__:
            self.called |= layers
            return
        others = [
            t
            for t, own in zip(tensors, owners, strict=True)
            if not own and not isinstance(t, nn.Parameter)
        ]
        if others and getattr(func, "__name__", "") in _PRODUCTS:
            if any(t.requires_grad for t in results):
                self.used |= layers
        elif all(t.is_floating_point() and not t.requires_grad for t in others):
            # A part, a cast, a normalised or pruned form; not what an embedding looks up.
            self._made.update((id(t), (t, layers)) for t in results)

    def _owners(self, tensor: Tensor) -> set[AsymmetricLayer]:
        if id(tensor) in self._made:
            return self._made[id(tensor)][1]
        layers = self._layers.get(id(tensor), ())
        return {m for m in layers if any(weight is tensor for weight in _weights(m))}

    def end(self) -> None:
        """Stop watching."""
        _active.watch = None
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def conclude(self) -> None:
        """Mark the layers that were bypassed, and say so once."""
        if not (self.called or self.used):
            return  # a pass without weights, as when a program is traced
        unwatch(self.seen)
        names = []
        bypassed = self.used - self.called
        modules = dict(self.module.named_modules())
        for path, layer in modules.items():
            if layer in bypassed:
                parent = path
                while modules[parent] not in self.seen:
                    parent = parent.rpartition(".")[0]
                layer.feedback_reason = (
                    f"bypassed by its parent {type(modules[parent]).__name__}; it uses the weight "
                    "without calling the layer"
                )
                names.append(layer.rule.layer_name or path)
        if names:
            logger.warning(
                "%d converted layers learn by backpropagation, because their parents use their "
                "weights without calling them: %s",
                len(names),
                ", ".join(grouped(names)),
            )
