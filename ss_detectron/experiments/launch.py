"""The runs of a comparison in processes of their own, spread over the machine."""

import asyncio
import json
import logging
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import detectron2
import torch

from .plan import PlannedRun

__all__ = ["LOG", "environments", "hardware", "read_launches", "run_all"]

logger = logging.getLogger(__name__)

# In a run's folder: what the runs printed, and how they were started, one JSON object a line.
LOG, LAUNCHES = "train.log", "launches.json"


def run_all(
    runs: Sequence[PlannedRun], train_net: Path, *, jobs: int = 1, gpus_per_run: int = 1
) -> list[PlannedRun]:
    """
    Runs the training tool for each, in the order given, or resumes it. What a run prints goes to
    ``train.log`` in its folder.

    Args:
        runs: that are not finished.
        train_net: the path of tools/train_net.py.
        jobs: how many run at a time.
        gpus_per_run: GPUs of each, or processes where there are no GPUs.

    Returns:
        those that failed, which are reported with the end of their log. Whatever ends this
        function, be it Ctrl-C, ends all that it started.

    Raises:
        ValueError: more GPUs per run than there are.
    """
    return asyncio.run(_run_all(runs, train_net, jobs, gpus_per_run))


async def _run_all(
    runs: Sequence[PlannedRun], train_net: Path, jobs: int, gpus_per_run: int
) -> list[PlannedRun]:
    # One thread waits for each process.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(jobs))
    free: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    for environment in environments(jobs, gpus_per_run):
        free.put_nowait(environment)
    failed = []

    async def run_one(number: int, run: PlannedRun) -> None:
        environment = await free.get()
        try:
            place, resume = f"{number} of {len(runs)}", run.has_checkpoint()
            logger.info("%s %s (%s)", run.name, "goes on" if resume else "starts", place)
            words = ["--config-file", run.config_file, "--num-gpus", str(gpus_per_run)]
            words += ["--resume"] * resume
            command = [sys.executable, str(train_net), *words, *run.options]
            code = await _execute(command, run.folder, environment, jobs)
        finally:
            free.put_nowait(environment)
        if code == 0 and run.is_finished():
            logger.info("%s is finished (%s)", run.name, place)
            return
        failed.append(run)
        how = f"failed with exit code {code}" if code else "ended without a last evaluation"
        log = run.folder / LOG
        logger.error("%s %s; the end of %s:\n%s", run.name, how, log, _tail(log))

    await asyncio.gather(*(run_one(number, run) for number, run in enumerate(runs, 1)))
    return failed


async def _execute(
    command: Sequence[str], folder: Path, environment: dict[str, str], jobs: int
) -> int:
    """The exit code. The process, and all that it starts, ends with this coroutine."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LAUNCHES).open("a") as file:
        launch = {"command": shlex.join(command[1:]), "hardware": hardware(), "jobs": jobs}
        file.write(json.dumps(launch | environment) + "\n")
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return await asyncio.to_thread(process.wait)
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends a process, unless it has ended by itself, and whatever it has started."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        os.killpg(process.pid, signal.SIGKILL)


def environments(jobs: int, gpus_per_run: int) -> list[dict[str, str]]:
    """
    The environment variables of each of the runs at a time. GPUs are dealt out in turns; where
    there are none, the runs share the cores, unless OMP_NUM_THREADS says how many each takes.

    Raises:
        ValueError: more GPUs per run than there are.
    """
    count = torch.cuda.device_count()
    if count == 0:
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // jobs)))
        return [{"OMP_NUM_THREADS": threads}] * jobs
    if gpus_per_run > count:
        raise ValueError(f"{gpus_per_run} GPUs per run are wanted, but there are {count} here")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(visible) < count:
        visible = [str(i) for i in range(count)]
    dealt = [
        [visible[(job * gpus_per_run + i) % count] for i in range(gpus_per_run)]
        for job in range(jobs)
    ]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus)} for gpus in dealt]


def hardware() -> str:
    """This machine and its software, as a result should name them."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)) or "no GPU"
    return (
        f"{cpu}, {_cores()} cores, {kinds}; torch {torch.__version__}, "
        f"Detectron2 {detectron2.__version__}, Python {platform.python_version()}"
    )


def read_launches(folder: Path) -> list[dict[str, Any]]:
    """How a run was started, each time: command, hardware, jobs and environment variables."""
    path = folder / LAUNCHES
    launches = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            launches.append(json.loads(line))
    return launches


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tail(path: Path, lines: int = 15) -> str:
    text = path.read_text(errors="replace") if path.is_file() else ""
    return "\n".join(text.splitlines()[-lines:])
