"""
Starts the processes of a run: one here, several here and on other machines, or those that torchrun
has started. Passes on requests to stop (see :mod:`.preemption`), and says which process has failed.

torch's elastic launcher would lose exit code 75, and kill what still saves 30 s after SIGTERM.
"""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.distributed import is_torchelastic_launched

from ss_detectron.utils.comm import leave_group, set_collective_timeout

from .preemption import EXIT_CODE, Preempted, StopSignals, print_safely, rank_signals

__all__ = ["add_launch_options", "complete_launch_options", "launch"]

logger = logging.getLogger(__name__)

Main = Callable[[argparse.Namespace], Any]

_GRACE = 20  # seconds for the other processes to end, once one has
_HOST = "127.0.0.1"
_SIGNALS = {number.value: number.name for number in signal.Signals}
_STOPPED = {EXIT_CODE, -signal.SIGTERM}  # asked to stop, in training and before


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add --timeout to Detectron2's options, which are None where they are not given."""
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
    Fill in the options that were not given, from torchrun's environment where that has started
    this process. End the program with a message on options that cannot work.
    """
    if not args.timeout > 0:
        parser.error(f"--timeout {args.timeout:g}: give minutes, above 0")
    torchrun = is_torchelastic_launched()
    for name, variable, value in (
        ("num_gpus", "LOCAL_WORLD_SIZE", 1),
        ("num_machines", "GROUP_WORLD_SIZE", 1),
        ("machine_rank", "GROUP_RANK", 0),
    ):
        given, option = getattr(args, name), "--" + name.replace("_", "-")
        value = int(os.environ[variable]) if torchrun else value
        if torchrun and given not in (None, value):
            parser.error(f"{option} {given}: torchrun has set it to {value}; leave {option} out")
        setattr(args, name, value if given is None else given)
    size = args.num_gpus * args.num_machines
    if torchrun and args.dist_url != "auto":
        parser.error(f"--dist-url {args.dist_url}: torchrun has set one; leave it out")
    if torchrun and size != int(os.environ["WORLD_SIZE"]):
        parser.error("torchrun has to start the same number of processes on every machine")
    if args.num_gpus < (args.num_machines > 1) or args.num_machines < 1:
        parser.error(f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: too few")
    if not 0 <= args.machine_rank < args.num_machines:
        last = args.num_machines - 1
        parser.error(f"--machine-rank {args.machine_rank}: the machines are numbered 0 to {last}")
    if args.num_machines > 1 and args.dist_url == "auto" and not torchrun:
        parser.error("several machines need --dist-url tcp://HOST:PORT, a port of machine 0")
    if 0 < torch.cuda.device_count() < args.num_gpus:
        parser.error(f"--num-gpus {args.num_gpus}: there are {torch.cuda.device_count()} here")


def launch(main: Main, args: argparse.Namespace) -> None:
    """
    Run ``main(args)`` in every process of the run, each with SIGTERM and SIGINT as requests to
    stop. Return when all have ended, with the signal handlers that there were before.

    Args:
        main: a function of a module's top level.
        args: after :func:`complete_launch_options`.

    Raises:
        Preempted: the processes were asked to stop, and did. SIGTERM is ignored from then on.
        SystemExit: a process has failed; the message says which and how.
        KeyboardInterrupt: a second Ctrl-C. The other processes are killed.
    """
    if is_torchelastic_launched():
        from torch.distributed.elastic.multiprocessing.errors import record  # slow, and torchrun's

        with rank_signals():
            # Leaves the traceback to torchrun, which prints that of the first process to fail.
            record(_run)(main, args, int(os.environ["LOCAL_RANK"]), init_method="env://")
    elif args.num_gpus * args.num_machines > 1:
        _launch_processes(main, args)
    else:
        with rank_signals():
            main(args)


def _run(main: Main, args: argparse.Namespace, local_rank: int, **rendezvous: Any) -> None:
    """Runs this machine's process number ``local_rank``; ``rendezvous`` is how they all meet."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    timeout = timedelta(minutes=args.timeout)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        rank=args.machine_rank * args.num_gpus + local_rank,
        world_size=args.num_gpus * args.num_machines,
        timeout=timeout,
        **rendezvous,
    )
    comm.create_local_process_group(args.num_gpus)
    set_collective_timeout(timeout)
    comm.synchronize()
    stopped = False
    try:
        main(args)
    except Preempted:
        stopped = True  # raised anew below, as the frames of this one refer to the group
    leave_group()  # not after a failure, when the others may not answer
    if stopped:
        raise Preempted


# Processes of our own ----------------------------------------------------------------------------


def _launch_processes(main: Main, args: argparse.Namespace) -> None:
    """Starts this machine's processes, and ends them all once one has failed."""
    # The store is the parent's own, so that nobody else can take its port.
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    processes: list[BaseProcess] = []

    def terminate() -> None:
        for process in processes:
            process.terminate()

    def pass_on(number: signal.Signals) -> None:
        print_safely(f"{number.name}: all {args.num_gpus} processes are asked to save and stop.")
        terminate()

    sys.stdout.flush()  # before what the processes print
    stop = StopSignals(pass_on)
    try:
        with stop.installed():
            # They inherit that SIGINT is ignored: the parent passes a terminal's Ctrl-C on.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            for i in range(args.num_gpus):
                name = f"Rank {args.machine_rank * args.num_gpus + i}"
                words = (main, args, i, store.port, failures)
                process = context.Process(target=_run_process, name=name, args=words)
                process.start()
                processes.append(process)
            signal.signal(signal.SIGINT, handler)
            if stop.first:
                terminate()  # those that came after it
            while running := [process.sentinel for process in processes if process.is_alive()]:
                if any(process.exitcode for process in processes):
                    break
                # Each second, too: workers of a dead process can keep its sentinel open.
                wait(running, timeout=1)
            failed = [process for process in processes if process.exitcode]
            if not failed:
                return
            terminate()
            deadline = time.monotonic() + _GRACE
            for process in processes:
                process.join(max(0, deadline - time.monotonic()))
            codes = {process.exitcode for process in failed}
            # Those that a stopped one has left alone may fail for it, but nothing kills them.
            if codes & _STOPPED and min(codes - _STOPPED, default=0) >= 0:
                if EXIT_CODE not in codes:
                    logger.warning("Stopped outside training: there was nothing to save.")
                raise Preempted
            errors = {}
            while not failures.empty():
                name, *said = failures.get()
                errors[name] = said
            raise SystemExit(_report(processes, failed, errors))
    finally:
        for process in processes:
            process.kill()


def _run_process(
    main: Main, args: argparse.Namespace, local_rank: int, port: int, failures: SimpleQueue
) -> None:
    """Is one of this machine's processes. Puts its name, error and traceback into ``failures``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with rank_signals(spawned=True):
            rendezvous = {"init_method": args.dist_url}
            if args.dist_url == "auto":
                timeout = timedelta(minutes=args.timeout)
                rendezvous = {"store": dist.TCPStore(_HOST, port, timeout=timeout)}
            _run(main, args, local_rank, **rendezvous)
    except SystemExit as exit_:
        if not isinstance(exit_.code, str):
            raise
        failures.put((multiprocessing.current_process().name, exit_.code[:4000], ""))
        sys.exit(1)
    except Exception as error:
        summary = f"{type(error).__name__}: {error}".splitlines()[0]
        # Cut, so that a pipe holds those of all processes.
        texts = summary[:500], traceback.format_exc()[-4000:]
        failures.put((multiprocessing.current_process().name, *texts))
        sys.exit(1)
    finally:
        # It would end Python on its way out, and change the exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # not an exception: what it would run on its way out may wait for other ranks


def _report(
    processes: Sequence[BaseProcess],
    failed: Sequence[BaseProcess],
    errors: dict[str, Sequence[str]],
) -> str:
    """
    Says what has ended the run, with its traceback, and how the other processes ended then.
    ``failed`` were the first to end; ``errors`` has errors and tracebacks by name, first in time;
    of one that has no traceback, its error alone is said.
    """

    def ending(process: BaseProcess) -> str:
        code = process.exitcode
        how = f"ended with exit code {code}"
        if process.name in errors:
            how = f"failed with {errors[process.name][0]}"
        elif code is None:
            how = f"did not end within {_GRACE} seconds and was killed"
        elif code == -signal.SIGKILL:
            how = "was killed by SIGKILL (as by the kernel where memory has run out, see dmesg)"
        elif code < 0:
            how = f"was killed by {_SIGNALS.get(-code, -code)}"
        return f"{process.name} (process {process.pid}) {how}"

    # An exception takes others down before its own process has ended: the first in time counts.
    names = [process.name for process in failed if process.name not in errors] + list(errors)
    said, trace = errors.get(names[0], ("", None))
    if trace == "":  # it ended by a message, of an error of usage
        return said
    culprit = next(process for process in processes if process.name == names[0])
    # Where the culprit has left no traceback, another's may be of what led to its end.
    lines = [errors.get(names[0], first)[1] for first in [*errors.values()][:1]]
    lines += [f"After that: {ending(process)}." for process in processes if process is not culprit]
    lines.append(
        f"{ending(culprit)}, which ended the run here. Nothing was saved for it: with --resume, it "
        "goes on from the last checkpoint in OUTPUT_DIR, if there is one."
    )
    return "\n".join(lines)
