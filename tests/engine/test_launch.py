"""How runs are started, and what is said when a process of one fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from run_utils import ROOT, TOOL, finish, output_after, rows, start, tiny_detection

from ss_detectron.engine import argument_parser
from ss_detectron.engine.launch import _report, add_launch_options, complete_launch_options
from ss_detectron.engine.preemption import EXIT_CODE

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # of python -m

# The command line --------------------------------------------------------------------------------


# As of the second of two machines with four processes each.
BY_TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
BY_TORCHRUN |= {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


def options(words: str, environment: dict[str, str]) -> tuple[int, int, int]:
    """Processes per machine, machines and this machine's rank."""
    parser = argument_parser()
    add_launch_options(parser)
    args = parser.parse_args(words.split())
    with patch.dict(os.environ, environment):
        complete_launch_options(parser, args)
    return args.num_gpus, args.num_machines, args.machine_rank


def test_options_that_are_not_given_are_one_process_here_or_as_torchrun_says():
    assert options("", {}) == (1, 1, 0)
    assert options("--num-gpus 0", {}) == (0, 1, 0)  # Detectron2's word for the CPU
    assert options("", BY_TORCHRUN) == (4, 2, 1)
    assert options("--num-gpus 4 --num-machines 2", BY_TORCHRUN) == (4, 2, 1)


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ("--timeout 0", {}, "--timeout 0: give minutes, above 0"),
        ("--timeout nan", {}, "--timeout nan"),
        ("--num-gpus -1", {}, "--num-gpus -1"),
        ("--machine-rank 1", {}, "--machine-rank 1: the machines are numbered 0 to 0"),
        ("--num-machines 2", {}, "several machines need --dist-url tcp://HOST:PORT"),
        ("--num-gpus 1", BY_TORCHRUN, "--num-gpus 1: torchrun has set it to 4; leave --num-gpus"),
        ("--num-machines 1", BY_TORCHRUN, "--num-machines 1: torchrun has set"),
        ("--machine-rank 0", BY_TORCHRUN, "--machine-rank 0: torchrun has set"),
        ("--dist-url tcp://a:1", BY_TORCHRUN, "--dist-url tcp://a:1: torchrun has set one"),
        ("", BY_TORCHRUN | {"WORLD_SIZE": "6"}, "the same number of processes on every machine"),
    ],
)
def test_options_that_cannot_work_are_refused(capsys, words, environment, message):
    with pytest.raises(SystemExit) as exit_:
        options(words, environment)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# What is said of a failure; whole runs that fail are in test_preemption.py -----------------------

CLOSED, FAILS = "RuntimeError: Connection closed by peer", "ValueError: a step that fails"


@pytest.mark.parametrize(
    ("codes", "failed", "errors", "last", "before"),
    [
        # The first exception in time has ended the run,
        ((1, 1), (0,), {1: FAILS, 0: CLOSED}, f"1 failed with {FAILS}", f"0 failed with {CLOSED}"),
        # but before any exception what nobody could catch.
        ((1, -9), (1,), {0: CLOSED}, "1 was killed by SIGKILL", f"0 failed with {CLOSED}"),
        ((1, 1), (0, 1), {0: CLOSED}, "1 ended with exit code 1", f"0 failed with {CLOSED}"),
        # A process that leaves no word of its exception, as on a full disk, has an exit code.
        ((None, 1), (1,), {}, "1 ended with exit code 1", "0 did not end within 20 seconds"),
        ((-40, -11), (1,), {}, "1 was killed by SIGSEGV", "0 was killed by 40"),
    ],
)
def test_the_process_that_ended_the_run_is_named_last(codes, failed, errors, last, before):
    processes = [SimpleNamespace(name=str(i), pid=7, exitcode=c) for i, c in enumerate(codes)]
    texts = {str(i): (error, f"Traceback:\n  {error}") for i, error in errors.items()}
    *lines, said = _report(processes, [processes[i] for i in failed], texts).splitlines()
    assert said.replace(" (process 7)", "").startswith(last) and "--resume" in said
    assert lines[-1].replace(" (process 7)", "").startswith(f"After that: {before}")
    assert lines[:-1] == (["Traceback:", f"  {next(iter(errors.values()))}"] if errors else [])


def test_of_an_error_of_usage_its_line_alone_is_said():
    processes = [SimpleNamespace(name=str(i), pid=7, exitcode=1) for i in (0, 1)]
    errors = {"1": ("a.py: error: no", ""), "0": (CLOSED, "Traceback")}
    assert _report(processes, processes, errors) == "a.py: error: no"


# Runs of the tool --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """The words of the smallest training there is, with a worker process."""
    keys = ["DATALOADER.NUM_WORKERS", 1, "SOLVER.CHECKPOINT_PERIOD", 10000, "OUTPUT_DIR", "out"]
    config = ["--config-file", "quick/shapes_retinanet_ss.yaml"]
    return [*config, *tiny_detection(tmp_path_factory.mktemp("sets")), *map(str, keys)]


def last_iteration(folder: Path) -> int:
    """That of the last checkpoint, after checking that the log goes as far."""
    name = (folder / "last_checkpoint").read_text()
    iteration = torch.load(folder / name)["iteration"]
    assert name == f"model_{iteration:07d}.pth"
    assert [path.name for path in folder.glob("*.pth")] == [name]
    assert rows(folder)[-1]["iteration"] == iteration
    return iteration


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["one process", "two processes", "torchrun"])
def test_a_training_that_was_terminated_saves_its_last_step_and_goes_on(launcher, tiny, tmp_path):
    folder = tmp_path / "out"
    words = {"one process": [], "two processes": ["--num-gpus", 2], "torchrun": [*TORCHRUN, TOOL]}

    def training(*more) -> subprocess.Popen:
        script = "-m" if launcher == "torchrun" else TOOL
        return start(*words[launcher], *more, cwd=tmp_path, script=script)

    process = training(*tiny, "SOLVER.MAX_ITER", 100000)
    output = output_after(process, "  iter: 19  ", lambda: os.killpg(process.pid, signal.SIGTERM))
    assert process.returncode == (1 if launcher == "torchrun" else EXIT_CODE), output
    iteration = last_iteration(folder)
    assert f"Saved out/model_{iteration:07d}.pth" in output

    output = finish(training("--resume", *tiny, "SOLVER.MAX_ITER", iteration + 3))
    assert f"Starting training from iteration {iteration + 1}" in output
    assert rows(folder)[-1]["iteration"] == iteration + 2


# Slurm -------------------------------------------------------------------------------------------

SRUN = """#!{python}
# A task on each of two nodes. Exits with the highest code, as srun does.
import os, signal, subprocess, sys

signal.signal(signal.SIGTERM, lambda number, frame: None)
command = [word for word in sys.argv[1:] if not word.startswith("--wait")]
tasks = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(i)}}) for i in (0, 1)]
open("task", "w").write(str(tasks[1].pid))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """#!/bin/bash
case $1 in
  show) echo 127.0.0.1; echo another ;;
  requeue) echo "$2" >> requeued ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> str:
    """The id of a job on two nodes, in whose folder the file `requeued` lists those put back."""
    commands = {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": SCONTROL,
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": 10000 + os.getpid() % 10000,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": 2,
        "SLURM_GPUS_ON_NODE": 1,
        "SLURM_SUBMIT_DIR": ROOT,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return os.environ["SLURM_JOB_ID"]


def submit(folder: Path, *words) -> subprocess.Popen:
    script = ROOT / "docs" / "slurm" / "train.sbatch"
    return start(*words, cwd=folder, script=script, interpreter="bash")


@pytest.mark.slow
def test_a_job_whose_time_is_up_on_one_node_is_requeued_and_one_that_fails_is_not(
    slurm, tiny, tmp_path
):
    process, task = submit(tmp_path, *tiny, "SOLVER.MAX_ITER", 100000), tmp_path / "task"
    output = output_after(
        process, "  iter: 19  ", lambda: os.kill(int(task.read_text()), signal.SIGTERM)
    )
    assert process.returncode == EXIT_CODE, output
    assert (tmp_path / "requeued").read_text().split() == [slurm]
    iteration = last_iteration(tmp_path / "out")
    (tmp_path / "requeued").unlink()

    process = submit(tmp_path, *tiny, "SOLVER.MAX_ITER", 100000)
    resumed = f"Starting training from iteration {iteration + 1}"
    output = output_after(process, resumed, lambda: os.killpg(process.pid, signal.SIGTERM))
    assert process.returncode == EXIT_CODE, output  # Slurm has ended it

    process = submit(tmp_path, *tiny, "NO.SUCH_KEY", 1)
    output = output_after(process, "NO.SUCH_KEY", lambda: None)
    assert process.returncode == 1, output
    assert not (tmp_path / "requeued").exists()
