"""How runs are started, and what is said when a process of one fails."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from run_utils import ROOT, SECONDS, TOOL, end, finish, rows, start
from time_limit import within

from ss_detectron.data import generate_shapes
from ss_detectron.engine import argument_parser
from ss_detectron.engine.launch import _report, add_launch_options, complete_launch_options
from ss_detectron.engine.preemption import EXIT_CODE

STOPPED_RUN = Path(__file__).parents[1] / "stopped_run.py"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # of python -m

# The command line --------------------------------------------------------------------------------


@pytest.fixture
def torchrun(monkeypatch):
    """As if torchrun had started this: the second of two machines with four processes each."""
    started = {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}
    started |= {"GROUP_RANK": 1, "GROUP_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "none"}
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))


def options(*words: str) -> argparse.Namespace:
    parser = argument_parser()
    add_launch_options(parser)
    args = parser.parse_args(words)
    complete_launch_options(parser, args)
    return args


def test_options_that_are_not_given_are_one_process_here():
    args = options()
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (1, 1, 0)
    assert (args.dist_url, args.timeout) == ("auto", 30)
    assert options("--num-gpus", "0").num_gpus == 0  # Detectron2's word for the CPU


def test_torchrun_says_how_many_processes_there_are(torchrun):
    args = options("--timeout", "2.5")
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (4, 2, 1)
    assert args.timeout == 2.5
    assert options("--num-gpus", "4", "--num-machines", "2").num_gpus == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-gpus 1", "--num-gpus 1: torchrun has started this process, where it is 4"),
        ("--num-gpus 8", "leave --num-gpus out"),
        ("--num-machines 1", "--num-machines 1: torchrun has started"),
        ("--machine-rank 0", "--machine-rank 0: torchrun has started"),
        ("--dist-url tcp://a:1", "--dist-url tcp://a:1: torchrun has set one"),
    ],
)
def test_options_that_contradict_torchrun_are_refused(torchrun, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        options(*words.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_machines_with_different_numbers_of_processes_are_refused(torchrun, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(SystemExit):
        options()
    assert "the same number of processes on every machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--timeout 0", "--timeout 0: give minutes, above 0 and up to 525600"),
        ("--timeout nan", "--timeout nan"),
        ("--timeout 1e12", "--timeout 1e+12"),
        ("--num-gpus -1", "--num-gpus -1"),
        ("--num-machines 0", "--num-machines 0"),
        ("--machine-rank 1", "--machine-rank 1: the machines are numbered from 0 to 0"),
        ("--num-machines 2 --machine-rank 2", "numbered from 0 to 1"),
    ],
)
def test_options_that_cannot_work_are_refused(capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        options(*words.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# What is said of a failure -----------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    pid: int
    exitcode: int


def report(folder: Path, codes: list[int], errors: dict[int, str], failed: list[int], hung=()):
    """Of processes 100, 101 ..., whose tracebacks were written in the order of ``errors``."""
    for second, (index, text) in enumerate(errors.items()):
        file = folder / str(index)
        file.write_text(f"{text}\nTraceback (most recent call last):\n  ...\n{text}\n")
        os.utime(file, (1000 + second, 1000 + second))
    processes = [Ended(100 + i, code) for i, code in enumerate(codes)]
    named = ([processes[i] for i in indices] for indices in (failed, hung))
    return _report(processes, *named, first_rank=8, failures=folder)


def test_the_first_exception_in_time_has_ended_the_run(tmp_path):
    errors = {1: "ValueError: a step that fails", 0: "RuntimeError: Connection closed by peer"}
    lines = report(tmp_path, [1, 1], errors, failed=[0]).splitlines()
    assert lines[:3] == ["Traceback (most recent call last):", "  ...", errors[1]]
    assert lines[-2] == f"After that: Rank 8 (process 100) failed with {errors[0]}."
    assert lines[-1].startswith(
        f"Rank 9 (process 101) failed with {errors[1]}, which ended the run"
    )
    assert "--resume" in lines[-1]


def test_a_process_that_was_killed_has_ended_the_run_before_any_exception(tmp_path):
    errors = {0: "RuntimeError: Connection closed by peer"}
    lines = report(tmp_path, [1, -9], errors, failed=[1]).splitlines()
    assert lines[-1].startswith("Rank 9 (process 101) was killed by SIGKILL, which ended the run")
    assert lines[:3] == ["Traceback (most recent call last):", "  ...", errors[0]]
    assert "memory has run out" in lines[-2]


def test_processes_that_ended_otherwise_are_named_so(tmp_path):
    lines = report(tmp_path, [-9, 3, -11, -40], {}, failed=[1], hung=[0]).splitlines()
    assert lines[0] == (
        "After that: Rank 8 (process 100) did not end within 20 seconds and was killed."
    )
    assert lines[1] == "After that: Rank 10 (process 102) was killed by SIGSEGV."
    assert lines[2] == "After that: Rank 11 (process 103) was killed by 40."
    assert lines[3].startswith("Rank 9 (process 101) ended with exit code 3, which ended the run")


# Runs of empty steps -----------------------------------------------------------------------------


def failing(folder: Path, *words) -> tuple[int, str, float]:
    """Exit code, output and seconds of a run of two processes to which something happens."""
    words = ["--config-file", folder, "--num-gpus", 2, *words]
    with start(*words, cwd=folder, script=STOPPED_RUN) as process:
        try:
            assert any("is process" in line for line in process.stdout)
            began = time.monotonic()
            output, _ = process.communicate(timeout=SECONDS)
        finally:
            end(process)
    return process.returncode, output, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "event", "how"),
    [
        (1, "die", "was killed by SIGKILL"),
        (1, "fail", "failed with ValueError: a step that fails"),
        (0, "exit_with_3", "ended with exit code 3"),
    ],
)
def test_a_rank_that_fails_ends_the_run_and_is_named_last(rank, event, how, tmp_path):
    code, output, seconds = failing(tmp_path, "--at", rank, 100, event)
    assert code == 1, output
    assert seconds < 60
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"Rank {rank} (process ")
    assert how in last
    assert "--resume" in last
    assert f"After that: Rank {1 - rank} (process " in output
    assert not list(tmp_path.glob("saved*"))
    if event == "fail":
        assert 'raise ValueError("a step that fails")' in output


@pytest.mark.slow
def test_a_rank_that_dies_after_a_request_to_stop_leaves_nothing_saved(tmp_path):
    events = ["--at", 0, 100, "terminate", "--at", 1, 100, "die"]
    code, output, _ = failing(tmp_path, *events)
    assert code == 1, output
    assert "was killed by SIGKILL, which ended the run" in output.strip().splitlines()[-1]
    assert not list(tmp_path.glob("saved*"))


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(tmp_path):
    code, output, seconds = failing(tmp_path, "--timeout", 0.1, "--at", 1, 100, "hang")
    assert code == 1, output
    assert seconds < 60
    last = output.strip().splitlines()[-1]
    assert last.startswith("Rank 0 (process ")
    assert "imed out" in last
    assert "Rank 1 (process" in output
    assert "did not end within 20 seconds" in output


@pytest.mark.slow
def test_torchruns_processes_stop_at_the_same_step(tmp_path):
    words = [*TORCHRUN, STOPPED_RUN, "--config-file", tmp_path, "--at", 1, 7, "terminate"]
    with start(*words, cwd=tmp_path, script="-m") as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        finally:
            end(process)
    assert process.returncode == 1, output  # torchrun's own
    saved = [int((tmp_path / f"saved{rank}").read_text()) for rank in (0, 1)]
    assert saved == [7, 7]
    assert f"exitcode  : {EXIT_CODE}" in output


# Runs of the tool --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """KEY VALUE ... of the smallest training there is, with a worker process."""
    shapes = generate_shapes(tmp_path_factory.mktemp("sets"), train=8, val=3, size=64)
    sets = [["tiny", f"{shapes}/annotations/instances_train.json", f"{shapes}/train"]]
    changes = {
        "DATASETS.COCO_INSTANCES": sets,
        "DATASETS.TRAIN": ("tiny",),
        "DATASETS.TEST": (),
        "DATALOADER.NUM_WORKERS": 1,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "MODEL.RETINANET.NUM_CONVS": 1,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.STEPS": (),
        "SOLVER.CHECKPOINT_PERIOD": 10000,
        "OUTPUT_DIR": "out",
    }
    words = ["--config-file", "quick/shapes_retinanet_ss.yaml"]
    return words + [str(word) for pair in changes.items() for word in pair]


def output_after(process: subprocess.Popen, text: str, act: Callable[[], None]) -> str:
    """Acts when a run has printed a line with that text; returns what it prints after it."""
    with process:
        try:
            with within(SECONDS):
                assert any(text in line for line in process.stdout)
                act()
                return process.communicate()[0]
        finally:
            end(process)


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
    words = {
        "one process": [],
        "two processes": ["--num-gpus", 2],
        "torchrun": [*TORCHRUN, TOOL],
    }[launcher]

    def training(*more) -> subprocess.Popen:
        script = "-m" if launcher == "torchrun" else TOOL
        return start(*words, *more, cwd=tmp_path, script=script)

    process = training(*tiny, "SOLVER.MAX_ITER", 100000)
    output = output_after(process, "  iter: 19  ", lambda: os.killpg(process.pid, signal.SIGTERM))
    assert process.returncode == (1 if launcher == "torchrun" else EXIT_CODE), output
    iteration = last_iteration(folder)
    assert f"iteration {iteration} is finished, saving it" in output
    assert f"Saved out/model_{iteration:07d}.pth" in output

    output = finish(training("--resume", *tiny, "SOLVER.MAX_ITER", iteration + 3))
    assert f"Starting training from iteration {iteration + 1}" in output
    assert rows(folder)[-1]["iteration"] == iteration + 2


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The process ids of a run's ranks, children of its parent or of torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, line in lines.items() if b"spawn_main" in line or b"train_net" in line]


@pytest.mark.slow
def test_a_training_of_which_a_rank_is_killed_ends_and_saves_nothing(tiny, tmp_path):
    words = ["--num-gpus", 2, *tiny, "SOLVER.MAX_ITER", 100000]
    process, killed = start(*words, cwd=tmp_path), []

    def kill() -> None:
        killed.extend((ranks_of(process)[1], time.monotonic()))
        os.kill(killed[0], signal.SIGKILL)

    output = output_after(process, "  iter: 19  ", kill)
    assert process.returncode == 1, output
    rank, when = killed
    assert time.monotonic() - when < 60
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"Rank 1 (process {rank}) was killed by SIGKILL")
    assert not list((tmp_path / "out").glob("*.pth"))


@pytest.mark.slow
def test_torchrun_starts_a_training_again_that_goes_on(tiny, tmp_path, monkeypatch):
    # Without it, torch's new processes may read the addresses of the old ones.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    folder = tmp_path / "out"
    words = [*TORCHRUN, "--max-restarts", 1, TOOL, "--resume", *tiny]
    words += ["SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.MAX_ITER", 20]
    process = start(*words, cwd=tmp_path, script="-m")
    saved = "Saving checkpoint to out/model_0000005.pth"
    output = output_after(process, saved, lambda: os.kill(ranks_of(process)[1], signal.SIGKILL))
    assert process.returncode == 0, output
    assert "Loading from out/model_" in output
    assert torch.load(folder / "model_final.pth")["iteration"] == 19


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
def test_a_job_whose_time_is_up_on_one_node_is_requeued_and_goes_on(slurm, tiny, tmp_path):
    process, task = submit(tmp_path, *tiny, "SOLVER.MAX_ITER", 100000), tmp_path / "task"
    output = output_after(
        process, "  iter: 19  ", lambda: os.kill(int(task.read_text()), signal.SIGTERM)
    )
    assert process.returncode == EXIT_CODE, output
    assert (tmp_path / "requeued").read_text().split() == [slurm]
    iteration = last_iteration(tmp_path / "out")

    output = finish(submit(tmp_path, *tiny, "SOLVER.MAX_ITER", iteration + 3))
    assert f"Starting training from iteration {iteration + 1}" in output
    assert (tmp_path / "requeued").read_text().split() == [slurm]


@pytest.mark.slow
def test_a_job_that_slurm_ends_as_a_whole_is_left_to_slurm(slurm, tiny, tmp_path):
    process = submit(tmp_path, *tiny, "SOLVER.MAX_ITER", 100000)
    output = output_after(process, "  iter: 19  ", lambda: os.killpg(process.pid, signal.SIGTERM))
    assert process.returncode == EXIT_CODE, output
    last_iteration(tmp_path / "out")
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_a_job_that_fails_is_not_requeued(slurm, tiny, tmp_path):
    with submit(tmp_path, *tiny, "NO.SUCH_KEY", 1) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        finally:
            end(process)
    assert process.returncode == 1, output
    assert "NO.SUCH_KEY" in output
    assert not (tmp_path / "requeued").exists()
