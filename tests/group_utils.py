"""Tests in several processes, which gloo joins on the CPU."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from ss_detectron.utils.comm import leave_group


def run_ranks(
    work: Callable, folder: Path, *args: Any, world: int = 2, start_method: str = "spawn"
) -> None:
    """
    Calls ``work(rank, folder, *args)`` in each of several processes, and raises what one raises.

    Args:
        work: a function of a module's top level.
        folder: empty of an earlier call's files.
        start_method: "fork" imports nothing anew, for what neither trains nor has threads.
    """
    arguments = work, world, str(folder), args
    mp.start_processes(_run, arguments, nprocs=world, start_method=start_method)


def _run(rank: int, work: Callable, world: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = {"rank": rank, "world_size": world, "timeout": timedelta(minutes=2)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", **options)
    comm.create_local_process_group(world)
    work(rank, folder, *args)
    leave_group()  # all that refers to it has gone with that call
