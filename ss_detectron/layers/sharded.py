"""Tensors that are spread over processes (torch.distributed.fsdp.fully_shard).

They are known by what they have: importing what they come from would take seconds.
"""

from typing import Any

from torch import Tensor, nn

__all__ = ["gather", "is_sharded", "shard_as"]

_SHARDING = {"FSDPModule", "FullyShardedDataParallel"}


def is_sharded(model: nn.Module) -> bool:
    """Return whether the parameters of ``model``, or of a part of it, are not all here."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters()) or any(
        kind.__name__ in _SHARDING for module in model.modules() for kind in type(module).__mro__
    )


def gather(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; every process has to ask for it."""
    sharded: Any = tensor
    whole: Tensor = sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def shard_as(tensor: Tensor, whole: Tensor) -> Tensor:
    """Return ``whole``, which is the same on every process, sharded as ``tensor`` is, if it is."""
    sharded: Any = tensor
    if hasattr(tensor, "full_tensor"):
        everywhere: Any = type(tensor).from_local(whole, sharded.device_mesh)  # type: ignore[attr-defined]
        whole = everywhere.redistribute(placements=sharded.placements)
    return whole
