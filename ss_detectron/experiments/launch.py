"""The runs of a comparison in processes of their own, spread over the machine."""

import itertools
import json
import logging
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import detectron2
import torch

from .plan import PlannedRun

logger = logging.getLogger(__name__)

# In a run's folder: what the runs printed, and how they were started, one JSON object a line.
LOG, LAUNCHES = "train.log", "launches.json"
# Seconds for runs that are asked to stop: the rest of a step and a checkpoint.
GRACE = 300.0


def run_all(
    runs: Sequence[PlannedRun], train_net: Path, *, jobs: int = 1, gpus_per_run: int = 1
) -> list[PlannedRun]:
    """
    Runs the training tool for each, in the order given, or resumes it. What a run prints goes to
    ``train.log`` in its folder.

    Whatever ends this function, be it Ctrl-C, asks all runs at once to save and stop, and kills
    what is left of them after 5 minutes, or on another Ctrl-C.

    Args:
        runs: that are not finished.
        train_net: the path of tools/train_net.py.
        jobs: how many run at a time.
        gpus_per_run: GPUs of each, or processes where there are no GPUs.

    Returns:
        those that failed, which are reported with the end of their log.
    """
    free = environments(jobs, gpus_per_run)
    waiting = [(run, f"{number} of {len(runs)}") for number, run in enumerate(runs, 1)]
    running: dict[subprocess.Popen, tuple[PlannedRun, str, dict[str, str]]] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and free:
                (run, place), environment = waiting.pop(0), free.pop(0)
                how = "goes on" if run.has_checkpoint() else "starts"
                logger.info("%s %s (%s)", run.name, how, place)
                process = _start(run, train_net, gpus_per_run, environment, jobs)
                running[process] = run, place, environment
            time.sleep(0.05)
            for process in [process for process in running if process.poll() is not None]:
                run, place, environment = running.pop(process)
                free.append(environment)
                if process.returncode == 0 and run.is_finished():
                    logger.info("%s is finished (%s)", run.name, place)
                else:
                    failed.append(run)
                    code, log = process.returncode, run.folder / LOG
                    how = f"failed with exit code {code}" if code else "has no last evaluation"
                    end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                    logger.error("%s %s; the end of %s:\n%s", run.name, how, log, end)
    finally:
        _end(list(running))
    return failed


def _start(
    run: PlannedRun, train_net: Path, gpus: int, environment: dict[str, str], jobs: int
) -> subprocess.Popen:
    words = ["--config-file", run.config_file, "--num-gpus", str(gpus)]
    words += ["--resume"] * run.has_checkpoint()
    command = [sys.executable, str(train_net), *words, *run.options]
    run.folder.mkdir(parents=True, exist_ok=True)
    launch = {"command": shlex.join(command[1:]), "hardware": hardware(), "jobs": jobs}
    with (run.folder / LAUNCHES).open("a") as file:
        file.write(json.dumps(launch | environment) + "\n")
    with (run.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through this process alone
        )


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Ends processes, and whatever they have started."""
    deadline = time.monotonic() + GRACE
    try:
        for process in processes:
            process.terminate()
        if processes:
            logger.info("Waiting for %d runs to save and stop; Ctrl-C kills them", len(processes))
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environments(jobs: int, gpus_per_run: int) -> list[dict[str, str]]:
    """
    Makes the environment variables of each of the runs at a time. GPUs are dealt out in turns;
    where there are none, the runs share the cores, unless OMP_NUM_THREADS says how many each takes.
    """
    count = torch.cuda.device_count()
    if count == 0:
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // jobs)))
        return [{"OMP_NUM_THREADS": threads}] * jobs
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = itertools.cycle(named.split(",") if named else map(str, range(count)))
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(itertools.islice(gpus, gpus_per_run))}
        for _ in range(jobs)
    ]


def hardware() -> str:
    """Names this machine and its software, as a result should."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        cpu = re.search(r"model name\s*: (.+)|$", Path("/proc/cpuinfo").read_text())[1] or cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)) or "no GPU"
    return (
        f"{cpu}, {_cores()} cores, {kinds}; torch {torch.__version__}, "
        f"Detectron2 {detectron2.__version__}, Python {platform.python_version()}"
    )


def read_launches(folder: Path) -> list[dict[str, Any]]:
    """Reads how a run was started, each time: command, hardware, jobs, environment variables."""
    path = folder / LAUNCHES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
