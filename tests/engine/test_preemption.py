"""Runs that are asked to stop, or in which a rank fails: real processes, real signals."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_utils import SECONDS, output_after, start

from ss_detectron.engine import preemption
from ss_detectron.engine.launch import launch
from ss_detectron.engine.preemption import EXIT_CODE, Preempted, PreemptionHook, StopSignals
from ss_detectron.engine.train_loop import StepTrainer
from ss_detectron.learners import Backpropagation

# The signals of one process ----------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


def test_only_the_first_signal_is_answered(clock):
    answered = []
    signals = StopSignals(answered.append)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        signals.receive(number)
        clock.seconds += 10
    assert answered == [signal.SIGTERM]
    assert signals.first is signal.SIGTERM


def test_a_second_ctrl_c_interrupts_but_one_that_comes_twice_does_not(clock):
    signals = StopSignals(lambda number: None)
    signals.receive(signal.SIGINT)
    clock.seconds += 0.5
    signals.receive(signal.SIGINT)
    clock.seconds += 1
    with pytest.raises(KeyboardInterrupt):
        signals.receive(signal.SIGINT)


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN])
@pytest.mark.parametrize("asked", [False, True])
def test_launch_leaves_the_handlers_that_were_there(asked, interrupts, monkeypatch):
    def main(args):
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert ignored == (interrupts == signal.SIG_IGN)  # as in shell scripts
        os.kill(os.getpid(), signal.SIGTERM if asked else 0)

    monkeypatch.setattr(preemption, "prepare_workers", lambda: None)
    first = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    before = first | {signal.SIGINT: interrupts}
    signal.signal(signal.SIGINT, interrupts)
    try:
        with pytest.raises(Preempted) if asked else nullcontext():
            launch(main, SimpleNamespace(num_gpus=1, num_machines=1))
        if asked:  # another would change the exit code
            before[signal.SIGTERM] = signal.SIG_IGN
        assert {n: signal.getsignal(n) for n in before} == before
    finally:
        for number, handler in first.items():
            signal.signal(number, handler)


@pytest.fixture
def rank(monkeypatch) -> Iterator[StopSignals]:
    """Those of a rank."""
    monkeypatch.setattr(preemption, "prepare_workers", lambda: None)
    with preemption.rank_signals():
        yield preemption._rank


def test_before_training_a_request_ends_the_process(rank):
    with pytest.raises(Preempted):
        rank.receive(signal.SIGTERM)
    assert preemption.stop_requested()


class Loss(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).sum()


def test_a_step_tells_whether_a_rank_was_asked_to_stop(rank, monkeypatch):
    learner = Backpropagation(Loss(2, 1))
    sgd = torch.optim.SGD(learner.parameters(), 0.1)
    trainer = StepTrainer(learner, [torch.ones(1, 2)] * 2, sgd)
    monkeypatch.setattr(trainer, "_write_metrics", lambda *_: None)
    PreemptionHook().before_train()  # from now on, a request is only noted
    for asked in (False, True):
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        trainer.run_step()
        assert trainer.stop_agreed is asked


# Whole runs --------------------------------------------------------------------------------------

RUN = Path(__file__).parents[1] / "stopped_run.py"
slow = pytest.mark.slow


@dataclass
class Ended:
    """A run all of whose processes have ended."""

    code: int
    output: str
    folder: Path
    seconds: float

    def numbers(self, name: str) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.folder.glob(f"{name}*"))]


def begin(folder: Path, words: str) -> subprocess.Popen:
    return start("--config-file", folder, *words.split(), cwd=folder, script=RUN)


def ended(process: subprocess.Popen, folder: Path, after: str = "") -> Ended:
    """Waits for the end of a run; ``seconds`` and ``output`` begin after that line."""
    began = []
    output = output_after(process, after, lambda: began.append(time.monotonic()))
    return Ended(process.returncode, output, folder, time.monotonic() - began[0])


def run(folder: Path, words: str) -> Ended:
    return ended(begin(folder, words), folder)


@pytest.mark.parametrize(
    ("words", "processes", "exact"),
    [
        ("--at 0 7 TERM-all", 1, True),
        # The parent's request may arrive a step or more later.
        ("--num-gpus 2 --at 1 7 INT-all", 2, False),
        pytest.param("--num-gpus 2 --at 1 7 TERM-self", 2, True, marks=slow),
        pytest.param("--num-gpus 2 --at 1 7 terminate_all_for_long", 2, False, marks=slow),
    ],
)
def test_all_ranks_save_the_same_step_once_asked_to_stop(words, processes, exact, tmp_path):
    result = run(tmp_path, words)
    assert result.code == EXIT_CODE, result.output
    saved = result.numbers("saved")
    assert len(saved) == processes and len(set(saved)) == 1
    assert result.numbers("ended") == saved
    assert saved[0] == 7 if exact else saved[0] >= 7
    told = [line for line in result.output.splitlines() if line.startswith("SIG")]
    assert len(told) <= 1
    assert "Traceback" not in result.output


WORKERS = [f"--at 0 {step} {name}-workers" for step in (5, 19, 21) for name in ("TERM", "INT")]


@slow
@pytest.mark.parametrize(
    ("words", "processes", "steps"),
    [
        ("--at 0 7 INT-all", 1, 8),  # the last step
        ("--num-gpus 2 --at 0 7 TERM-all", 2, 8),
        ("--num-gpus 2 --at 1 7 INT-self", 2, 100),  # the parent passes requests on
        (" ".join(WORKERS), 1, 150),  # a new worker starts every twenty steps
        ("--num-gpus 2 " + " ".join(WORKERS), 2, 150),
    ],
)
def test_signals_that_change_nothing(words, processes, steps, tmp_path):
    result = run(tmp_path, f"{words} --steps {steps}")
    assert result.code == 0, result.output
    assert result.numbers("saved") == []
    assert result.numbers("ended") == [steps] * processes


@slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--num-gpus 2 --at 0 7 interrupt_twice", -signal.SIGINT),
        ("--at 0 setup TERM-all --at 0 setup hang", EXIT_CODE),  # before training
        ("--num-gpus 2 --at 0 setup INT-all --at 0 setup hang", EXIT_CODE),
        ("--num-gpus 2 --at 1 setup KILL-parent --at 1 setup hang", -signal.SIGKILL),
    ],
)
def test_runs_that_stop_at_once_and_save_nothing(words, code, tmp_path):
    result = run(tmp_path, words)
    assert result.code == code, result.output
    assert result.numbers("saved") == []
    assert result.output.count("\nKeyboardInterrupt\n") == (code == -signal.SIGINT)
    if code == EXIT_CODE:
        assert "outside training" in result.output and "Traceback" not in result.output


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["importing", "waiting for another machine"])
def test_processes_that_cannot_answer_end_at_once(moment, number, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"--num-gpus 2 --num-machines 2 --dist-url tcp://127.0.0.1:{port}"
    process = begin(tmp_path, words)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def has_come() -> bool:
        if moment == "importing":
            ranks = [Path(f"/proc/{pid}") for pid in children.read_text().split()]
            ranks = [rank for rank in ranks if "spawn_main" in (rank / "cmdline").read_text()]
            return any("libtorch" in (rank / "maps").read_text() for rank in ranks)
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    deadline = time.monotonic() + SECONDS
    while not has_come():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    result = ended(process, tmp_path)
    assert result.code == EXIT_CODE, result.output
    assert result.seconds < 60
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "culprit", "how"),
    [
        ("--at 1 100 fail", 1, "failed with ValueError: a step that fails"),
        pytest.param("--at 1 100 KILL-self", 1, "was killed by SIGKILL", marks=slow),
        pytest.param("--at 0 100 exit_with_3", 0, "ended with exit code 3", marks=slow),
        pytest.param("--at 0 100 TERM-self --at 1 100 KILL-self", 1, "SIGKILL", marks=slow),
        pytest.param("--timeout 0.1 --at 1 100 hang", 0, "imed out", marks=slow),
    ],
)
def test_a_rank_that_fails_ends_the_run_and_is_named_last(words, culprit, how, tmp_path):
    result = ended(begin(tmp_path, f"--num-gpus 2 {words}"), tmp_path, after="is process")
    assert result.code == 1, result.output
    assert result.seconds < 60
    *others, last = result.output.strip().splitlines()
    assert last.startswith(f"Rank {culprit} (process ")
    assert how in last and "--resume" in last
    (other,) = (line for line in others if line.startswith("After that: "))
    assert f"Rank {1 - culprit} (process " in other
    assert ("did not end within 20 seconds" in other) == ("hang" in words)
    assert result.numbers("saved") == []
    if "fail" in words:
        assert 'raise ValueError("a step that fails")' in result.output
