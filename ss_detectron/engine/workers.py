"""The worker processes of data loaders, which a rank forks from itself."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import cache

import torch.distributed as dist

__all__ = ["prepare_workers"]


@cache
def prepare_workers() -> None:
    """Have this process, a rank, fork its loaders' workers, and keep stop requests from them."""
    if sys.platform != "linux":
        return
    # In a spawned process, the default is to spawn its workers. Each would import everything
    # anew, which takes seconds, and any signal would end it while it does.
    multiprocessing.set_start_method("fork", force=True)
    os.register_at_fork(before=_rest, after_in_child=_shield_worker)


def _rest() -> None:
    """Lets gloo's threads come to rest before a fork."""
    # What one of them locks then stays locked in the child: on its way back from a collective,
    # Python's list of threads, and the worker hangs before its first line. Right after a
    # collective, 12 of 16,000 forks hung without a rest, and none with one of 0.01 s (two busy
    # cores, Python 3.11).
    if dist.is_initialized():
        time.sleep(0.03)  # lets go of Python's own lock, for which threads may wait


def _shield_worker() -> None:
    """
    Ignores in a worker SIGTERM and SIGINT, which a scheduler or a terminal sends to all processes
    of a run: without its workers a rank could not finish its step. The rank itself ends its workers
    by SIGTERM, and by its death, for they hold its connections open.
    """
    rank = os.getppid()

    def wait_for_rank() -> None:
        while os.getppid() == rank:
            received = signal.sigtimedwait({signal.SIGTERM}, 1)
            if received is not None and received.si_pid == rank:
                break
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked rather than handled: torch gives its workers a handler of its own after this.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait_for_rank, name="SIGTERM", daemon=True).start()
