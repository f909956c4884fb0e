"""The end of a process's part in a run of several."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from group_utils import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ss_detectron.utils.comm import any_rank, leave_group, reduce_flags, set_collective_timeout

TASKS = Path("/proc/self/task")


def gloo_threads() -> int:
    names = [(task / "comm").read_text() for task in TASKS.iterdir()]
    return sum("gloo" in name for name in names)


class Trainer:
    """In a cycle, as trainers are with their hooks."""

    def __init__(self) -> None:
        self.model = DistributedDataParallel(nn.Linear(2, 1))
        self.hook = self


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.skipif(not TASKS.is_dir(), reason="needs Linux's list of threads")
def test_no_thread_outlives_the_group(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    leave_group()  # of none
    others = (
        gloo_threads()
    )  # of groups that torch keeps in caches: FSDP2's, and that of a first DDP
    for attempt in range(2):  # another group can follow
        dist.init_process_group("gloo", f"file://{tmp_path}/{attempt}", rank=0, world_size=1)
        comm.create_local_process_group(1)
        assert comm.get_local_size() == 1
        assert comm.all_gather("x") == ["x"] and comm._get_global_gloo_group() is not None
        trainer = Trainer()
        trainer.model(torch.ones(1, 2)).sum().backward()
        comm.synchronize()
        assert gloo_threads() > others
        del trainer
        leave_group()
        assert gloo_threads() == others
        assert comm.get_world_size() == 1 and not dist.is_initialized()


def _agree_and_wait(rank, folder):
    flags = torch.tensor([[True, False, False], [False, False, True]][rank])
    assert reduce_flags(flags) == [True, False, True]
    dist.get_backend = lambda *_: "nccl"  # beside which there is a group of gloo's
    set_collective_timeout(timedelta(seconds=1))
    assert any_rank(rank == 1)
    failed = Path(folder, "failed")
    if rank == 0:
        with pytest.raises(RuntimeError, match="[Tt]imed out"):
            any_rank(True)
        failed.touch()
    while not failed.exists():
        time.sleep(0.01)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_ranks_agree_and_do_not_wait_for_each_other_for_ever(tmp_path):
    run_ranks(_agree_and_wait, tmp_path, start_method="fork")
    assert reduce_flags(torch.tensor([False, True])) == [False, True]  # alone
