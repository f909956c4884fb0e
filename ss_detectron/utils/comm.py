"""What the processes of a run (ranks) have to agree on."""

import gc
from datetime import timedelta
from functools import lru_cache

import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn

__all__ = ["any_rank", "leave_group", "reduce_flags", "set_collective_timeout", "share_buffers"]


def any_rank(flag: bool) -> bool:
    """Return whether ``flag`` is true on any rank. Every rank has to call it."""
    return any(comm.all_gather(flag))


def reduce_flags(flags: Tensor) -> list[bool]:
    """
    Return which of several flags are set on any rank. Every rank has to call it.

    Args:
        flags: of shape (N,), on the model's device.
    """
    if comm.get_world_size() > 1:
        flags = flags.int()
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def set_collective_timeout(timeout: timedelta) -> None:
    """
    Set how long ranks wait for each other's objects, as in :func:`any_rank`: beside NCCL,
    Detectron2 exchanges them in a group of gloo's that knows nothing of the NCCL group's timeout.
    Every rank has to call it, before any exchange.
    """

    @lru_cache
    def group() -> dist.ProcessGroup:
        if dist.get_backend() == "nccl":
            return dist.new_group(backend="gloo", timeout=timeout)
        return dist.group.WORLD

    comm._get_global_gloo_group = group


def share_buffers(model: nn.Module) -> None:
    """
    Give every rank the main one's buffers, such as the statistics of batch norm, which each rank
    gathers from its own images. Every rank has to call it.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def leave_group() -> None:
    """
    End this process's part in a run of several: torch's process group, its threads included. A
    thread of gloo's that outlives Python and then releases a tensor aborts the process ("terminate
    called without an active exception"). The threads end with the last reference to the group.
    """
    if not dist.is_initialized():
        return
    comm._LOCAL_PROCESS_GROUP = None
    comm.create_local_process_group.cache_clear()
    comm._get_global_gloo_group.cache_clear()
    gc.collect()  # trainers and DistributedDataParallel, which refer to it, are in cycles
    dist.destroy_process_group()
