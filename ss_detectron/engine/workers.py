"""The worker processes of data loaders, which a rank forks from itself."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import cache
from pathlib import Path

__all__ = ["prepare_workers"]

_PATIENCE = 1  # seconds


@cache
def prepare_workers() -> None:
    """
    Has this process, a rank, fork its loaders' workers, once its other threads sleep, and keeps
    requests to stop from them.
    """
    if sys.platform != "linux":
        return
    # In a spawned process, the default is to spawn its workers. Each would import everything
    # anew, which takes seconds, and any signal would end it while it does.
    multiprocessing.set_start_method("fork", force=True)
    os.register_at_fork(before=_await_threads, after_in_child=_shield_worker)


def _await_threads() -> None:
    """
    Waits until the other threads of this process sleep, for a second at most: what one of them
    locks during a fork stays locked in the child. A thread of gloo's, on its way back from a
    collective, locks Python's list of threads as it releases a tensor, and a worker forked then
    hangs before its first line, with all ranks behind it (seen in 1 of 2,000 forks after a
    collective, on Python 3.11).
    """
    own = threading.get_native_id()
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        time.sleep(0.001)  # lets go of Python's own lock, for which threads may wait
        if not any(_runs(thread) for thread in os.listdir("/proc/self/task") if int(thread) != own):
            return


def _runs(thread: str) -> bool:
    try:
        state = Path(f"/proc/self/task/{thread}/stat").read_text()
    except OSError:  # it has ended
        return False
    return state.rpartition(")")[2].split()[0] in "RD"


def _shield_worker() -> None:
    """
    In a worker, SIGTERM and SIGINT are ignored, which a scheduler or a terminal sends to all
    processes of a run: without its workers a rank could not finish its step. The rank itself ends
    its workers by SIGTERM, and by its death, for they hold its connections open.
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
