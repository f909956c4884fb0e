"""
Starts the processes of a run: one here, several here and on other machines, or those that torchrun
has started. Passes on requests to stop (see :mod:`.preemption`), and says which process has failed.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from detectron2.engine.launch import DEFAULT_TIMEOUT, _distributed_worker
from torch.distributed import is_torchelastic_launched
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import start_processes

from ss_detectron.utils.comm import leave_group, limit_waiting

from .preemption import EXIT_CODE, Preempted, StopSignals, listen, say, without_interrupts

__all__ = ["add_launch_options", "complete_launch_options", "launch"]

_YEAR = 525600  # minutes
_GRACE = 20  # seconds for the other processes to end, once one has
_SIGNALS = {number.value: number.name for number in signal.Signals}
# Exit codes of a process that was asked to stop, in training and before.
_STOPPED = (EXIT_CODE, -signal.SIGTERM, -signal.SIGINT)


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """
    Adds what :func:`launch` takes beside Detectron2's own options. Those of them that are not given
    are None until :func:`complete_launch_options`.
    """
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT.total_seconds() / 60,
        metavar="MINUTES",
        help="how long processes wait for each other before the run fails (default: %(default)g)",
    )
    parser.set_defaults(num_gpus=None, num_machines=None, machine_rank=None, dist_url="auto")


def complete_launch_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """
    Fills in the options that were not given, from torchrun's environment where that has started
    this process. Ends the program with a message on options that cannot work.
    """
    if not 0 < args.timeout <= _YEAR:
        parser.error(f"--timeout {args.timeout:g}: give minutes, above 0 and up to {_YEAR}")
    if is_torchelastic_launched():
        started = {
            "num_gpus": _environment("LOCAL_WORLD_SIZE"),
            "num_machines": _environment("GROUP_WORLD_SIZE"),
            "machine_rank": _environment("GROUP_RANK"),
        }
        for name, value in started.items():
            if getattr(args, name) not in (None, value):
                option = "--" + name.replace("_", "-")
                parser.error(
                    f"{option} {getattr(args, name)}: torchrun has started this process, where it "
                    f"is {value}; leave {option} out, torchrun has options of its own"
                )
            setattr(args, name, value)
        if args.dist_url != "auto":
            parser.error(f"--dist-url {args.dist_url}: torchrun has set one; leave it out")
        if args.num_gpus * args.num_machines != _environment("WORLD_SIZE"):
            parser.error("torchrun has to start the same number of processes on every machine")
    args.num_gpus = 1 if args.num_gpus is None else args.num_gpus
    args.num_machines = 1 if args.num_machines is None else args.num_machines
    args.machine_rank = args.machine_rank or 0
    if args.num_gpus < (args.num_machines > 1) or args.num_machines < 1:
        parser.error(f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: too few")
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(
            f"--machine-rank {args.machine_rank}: the machines are numbered from 0 to "
            f"{args.num_machines - 1}, for --num-machines is {args.num_machines}"
        )
    if args.num_machines > 1 and args.dist_url == "auto" and not is_torchelastic_launched():
        parser.error("several machines need --dist-url tcp://HOST:PORT, a port of machine 0")
    if 0 < torch.cuda.device_count() < args.num_gpus:
        parser.error(f"--num-gpus {args.num_gpus}: there are {torch.cuda.device_count()} here")


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """
    Runs ``main(args)`` in every process of the run, each with SIGTERM and SIGINT as requests to
    stop, and returns when all have ended.

    Args:
        main: a function of a module's top level.
        args: after :func:`complete_launch_options`.

    Raises:
        Preempted: the processes were asked to stop, and did.
        SystemExit: a process has failed; the message says which and how.
        KeyboardInterrupt: a second Ctrl-C. The other processes are killed.
    """
    timeout = timedelta(minutes=args.timeout)
    with _undisturbed_end():
        if is_torchelastic_launched():
            listen(spokesman=_environment("RANK") == 0)
            # Leaves the traceback to torchrun, which prints that of the first process to fail.
            record(_join_torchrun)(main, args, timeout)
        elif args.num_gpus * args.num_machines > 1:
            _launch_processes(main, args, timeout)
        else:
            listen()
            main(args)


@contextmanager
def _undisturbed_end() -> Iterator[None]:
    """Ignores SIGTERM afterwards: it would end Python on its way out, and change the exit code."""
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _environment(name: str) -> int:
    return int(os.environ[name])


def _join_torchrun(
    main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, timeout: timedelta
) -> None:
    if _environment("WORLD_SIZE") == 1:
        return main(args)
    rank = _environment("LOCAL_RANK")
    _take_part(rank, main, args, _environment("WORLD_SIZE"), "env://", timeout)


def _take_part(
    rank: int,
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    size: int,
    url: str,
    timeout: timedelta,
) -> None:
    """One of a run's ``size`` processes, this machine's number ``rank``."""
    stopped = None
    try:
        own = (main, args, timeout)
        words = (rank, _main, size, args.num_gpus, args.machine_rank, url, own, timeout)
        _distributed_worker(*words)
    except Preempted as request:
        stopped = request.with_traceback(None)  # whose frames refer to the group
    # After a failure, the others may not answer, and the exit code says it anyway.
    leave_group()
    if stopped is not None:
        raise stopped


def _main(
    main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, timeout: timedelta
) -> None:
    limit_waiting(timeout)
    main(args)


# Processes of our own ----------------------------------------------------------------------------


def _launch_processes(
    main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, timeout: timedelta
) -> None:
    """The parent of this machine's processes."""
    if args.dist_url == "auto":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            args.dist_url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    # What was printed before stands before what the processes print.
    sys.stdout.flush()
    processes: list[BaseProcess] = []

    def forward(number: signal.Signals) -> None:
        if processes:
            say(f"{number.name}: all {len(processes)} processes are asked to save and stop.")
        for process in processes:
            process.terminate()

    stop = StopSignals(forward)
    stop.install()
    with tempfile.TemporaryDirectory() as folder:
        try:
            # Python 3.11 unblocks signals when it starts this.
            resource_tracker.ensure_running()
            with without_interrupts():
                words = (main, args, timeout, os.getpid(), Path(folder))
                context = start_processes(_process, words, nprocs=args.num_gpus, join=False)
            processes += context.processes
            if stop.first:
                forward(stop.first)
            _wait(processes, args.machine_rank * args.num_gpus, Path(folder))
        finally:
            for process in processes:
                process.kill()


def _process(
    index: int,
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    timeout: timedelta,
    parent: int,
    failures: Path,
) -> None:
    """
    One of this machine's processes. If it fails, it leaves the parent a file: the error in a line,
    and its traceback.
    """
    listen(parent=parent, spokesman=index == 0)
    size = args.num_gpus * args.num_machines
    with _undisturbed_end():
        try:
            _take_part(index, main, args, size, args.dist_url, timeout)
        except Exception as error:
            summary = f"{type(error).__name__}: {error}".splitlines()[0]
            text = f"{summary}\n{traceback.format_exc()}"
            (failures / str(index)).write_text(text, "utf-8", errors="backslashreplace")
            sys.exit(1)


def _wait(processes: Sequence[BaseProcess], first_rank: int, failures: Path) -> None:
    """
    Returns when all processes have ended well. Once one has failed, the others are ended.

    Raises:
        Preempted, SystemExit: see :func:`launch`.
    """
    while True:
        codes = [process.exitcode for process in processes]
        failed = [process for process, code in zip(processes, codes, strict=True) if code]
        running = [process.sentinel for process in processes if process.exitcode is None]
        if failed or codes == [0] * len(codes):
            break
        # Looks after them each second: worker processes can keep the sentinel of a dead one open.
        wait(running, timeout=1)
    if not failed:
        return
    deadline = time.monotonic() + _GRACE
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    stopped = [process for process in failed if process.exitcode in _STOPPED]
    killed = [process for process in failed if process.exitcode < 0 and process not in stopped]
    if not stopped or killed:
        raise SystemExit(_report(processes, killed or failed, hung, first_rank, failures))
    if stopped[0].exitcode != EXIT_CODE:
        say(f"Stopped outside training: there was nothing to save. Exit code {EXIT_CODE}.")
    raise Preempted


def _report(
    processes: Sequence[BaseProcess],
    failed: Sequence[BaseProcess],
    hung: Sequence[BaseProcess],
    first_rank: int,
    failures: Path,
) -> str:
    """
    What has ended the run, with its traceback, and how the other processes ended then.

    Args:
        processes: all of this machine, ended.
        failed: those that were first to end.
        hung: those that had to be killed.
        first_rank: the first process's rank.
        failures: of each process that an exception has ended, the file that it left.
    """
    files = sorted(failures.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    errors = {processes[int(file.name)]: file.read_text("utf-8") for file in files}
    # An exception takes others down before its own process has ended: the first in time counts.
    culprit = next((process for process in failed if process not in errors), None)
    culprit = culprit or next(iter(errors))

    def ending(process: BaseProcess) -> str:
        name = f"Rank {first_rank + processes.index(process)} (process {process.pid})"
        if process in hung:
            return f"{name} did not end within {_GRACE} seconds and was killed"
        if process in errors:
            return f"{name} failed with {errors[process].splitlines()[0]}"
        if process.exitcode < 0:
            return f"{name} was killed by {_SIGNALS.get(-process.exitcode, -process.exitcode)}"
        return f"{name} ended with exit code {process.exitcode}"

    lines = []
    if errors:  # the culprit's, or what may have led to its end
        lines.append(errors.get(culprit, next(iter(errors.values()))).partition("\n")[2])
    lines += [f"After that: {ending(process)}." for process in processes if process is not culprit]
    if culprit.exitcode == -signal.SIGKILL:
        lines.append("SIGKILL is also what the kernel sends where memory has run out (see dmesg).")
    lines.append(
        f"{ending(culprit)}, which ended the run here. Nothing was saved for it: with --resume, it "
        "goes on from the last checkpoint in OUTPUT_DIR."
    )
    return "\n".join(lines)
