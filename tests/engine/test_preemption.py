"""Runs that are asked to stop: real processes, real signals."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_utils import SECONDS, end, start

from ss_detectron.engine import preemption
from ss_detectron.engine.preemption import EXIT_CODE, Preempted, PreemptionHook, StopSignals
from ss_detectron.engine.train_loop import StepTrainer

RUN = Path(__file__).parents[1] / "stopped_run.py"


def run(folder: Path, *words, **options) -> subprocess.Popen:
    return start("--config-file", folder, *words, cwd=folder, script=RUN, **options)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and output, when all processes of a run have ended."""
    with process:
        try:
            # Returns once nobody holds the other end of the pipe.
            output, _ = process.communicate(timeout=SECONDS)
        finally:
            end(process)
    return process.returncode, output


def numbers(folder: Path, name: str) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob(f"{name}*"))]


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sigint_stays_ignored_where_it_is(number):
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        signals = StopSignals(lambda number: None)
        signals.install()
        os.kill(os.getpid(), number)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert signals.first == (signal.SIGTERM if number == signal.SIGTERM else None)


# The hook ----------------------------------------------------------------------------------------


@pytest.fixture
def rank(monkeypatch):
    """As if this process listened; its handlers are not installed."""
    rank = preemption._Rank(parent=None, spokesman=False)
    monkeypatch.setattr(preemption, "_rank", rank)
    return rank


@pytest.fixture
def hook() -> PreemptionHook:
    hook, saved = PreemptionHook(), []
    hook.trainer = SimpleNamespace(
        iter=7,
        max_iter=9,
        stop_agreed=False,
        saved=saved,
        save_checkpoint=lambda: saved.append(hook.trainer.iter),
        checkpointer=SimpleNamespace(get_checkpoint_file=lambda: "out/model_0000007.pth"),
    )
    return hook


def test_the_hook_saves_and_stops_once_the_ranks_agree(rank, hook):
    hook.before_train()
    hook.after_step()
    assert rank.training and hook.trainer.saved == []
    hook.trainer.stop_agreed = True
    with pytest.raises(SystemExit) as exit_:
        hook.after_step()
    assert (exit_.value.code, EXIT_CODE) == (75, 75)
    assert hook.trainer.saved == [7]


def test_training_that_is_over_ends_as_ever(rank, hook):
    hook.trainer.stop_agreed, hook.trainer.iter = True, 8
    hook.after_step()
    assert hook.trainer.saved == []


def test_before_training_a_request_ends_the_process(rank):
    with pytest.raises(Preempted):
        rank.stop.receive(signal.SIGTERM)
    assert preemption.stop_requested()


class Loss(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).sum()


@pytest.mark.parametrize("listens", [True, False])
def test_a_step_tells_whether_a_rank_was_asked_to_stop(rank, listens, monkeypatch):
    model = Loss(2, 1)
    trainer = StepTrainer(model, [torch.ones(1, 2)] * 3, torch.optim.SGD(model.parameters(), 0.1))
    monkeypatch.setattr(trainer, "_write_metrics", lambda *_: None)
    trainer.run_step()
    assert trainer.stop_agreed is False
    rank.training, rank.stop.first = True, signal.SIGTERM
    if not listens:
        monkeypatch.setattr(preemption, "_rank", None)
    trainer.run_step()
    assert trainer.stop_agreed is listens


# Whole runs --------------------------------------------------------------------------------------


def test_a_run_saves_the_step_in_which_all_its_processes_were_terminated(tmp_path):
    code, output = ended(run(tmp_path, "--at", 0, 7, "terminate_all"))
    assert code == EXIT_CODE, output
    assert numbers(tmp_path, "saved") == numbers(tmp_path, "ended") == [7]
    assert output.count("SIGTERM: the run stops when this step is finished") == 1
    assert "Traceback" not in output


def test_ctrl_c_is_one_request_to_all_processes(tmp_path):
    code, output = ended(run(tmp_path, "--num-gpus", 2, "--at", 1, 7, "interrupt_all"))
    assert code == EXIT_CODE, output
    # The parent's request may arrive a step or more later.
    assert numbers(tmp_path, "saved") == numbers(tmp_path, "ended")
    assert len(set(numbers(tmp_path, "saved"))) == 1
    assert numbers(tmp_path, "saved")[0] >= 7
    assert output.count("SIGINT: all 2 processes are asked to save and stop") == 1
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_scheduler_may_go_on_sending_signals(processes, tmp_path):
    words = ["--num-gpus", processes, "--at", processes - 1, 7, "terminate_all_for_long"]
    code, output = ended(run(tmp_path, *words))
    assert code == EXIT_CODE, output
    assert len(numbers(tmp_path, "saved")) == processes
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("event", ["terminate_parent", "terminate"])
def test_all_ranks_stop_at_the_same_step(event, tmp_path):
    code, output = ended(run(tmp_path, "--num-gpus", 2, "--at", 1, 7, event))
    assert code == EXIT_CODE, output
    saved = numbers(tmp_path, "saved")
    assert len(saved) == 2
    assert len(set(saved)) == 1
    assert saved[0] == 7 if event != "terminate_parent" else saved[0] >= 7
    assert numbers(tmp_path, "ended") == saved
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "event"), [(1, "interrupt_all"), (2, "terminate_all")])
def test_a_request_in_the_last_step_lets_the_run_finish(processes, event, tmp_path):
    words = ["--num-gpus", processes, "--steps", 8, "--at", 0, 7, event]
    code, output = ended(run(tmp_path, *words))
    assert code == 0, output
    assert numbers(tmp_path, "saved") == []
    assert numbers(tmp_path, "ended") == [8] * processes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_signals_to_worker_processes_change_nothing(processes, tmp_path):
    words = ["--num-gpus", processes, "--steps", 250]
    for step in (5, 19, 21, 150):  # a new worker starts every twenty steps
        words += ["--at", processes - 1, step, "disturb_workers"]
    code, output = ended(run(tmp_path, *words))
    assert code == 0, output
    assert numbers(tmp_path, "ended") == [250] * processes


@pytest.mark.slow
def test_an_interrupt_to_one_rank_alone_changes_nothing(tmp_path):
    words = ["--num-gpus", 2, "--steps", 100, "--at", 1, 7, "interrupt"]
    code, output = ended(run(tmp_path, *words))
    assert code == 0, output
    assert numbers(tmp_path, "ended") == [100, 100]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_ctrl_c_stops_a_run_that_hangs(processes, tmp_path):
    code, output = ended(run(tmp_path, "--num-gpus", processes, "--at", 0, 7, "interrupt_twice"))
    assert code == -signal.SIGINT, output
    assert numbers(tmp_path, "saved") == []
    assert output.count("\nKeyboardInterrupt\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "event"), [(1, "terminate_all"), (2, "interrupt_all")])
def test_before_training_a_request_ends_the_run_at_once(processes, event, tmp_path):
    words = ["--num-gpus", processes, "--at", 0, "setup", event, "--at", 0, "setup", "hang"]
    code, output = ended(run(tmp_path, *words))
    assert code == EXIT_CODE, output
    assert numbers(tmp_path, "saved") == []
    assert "outside training: there" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["importing", "waiting for another machine"])
def test_processes_that_cannot_answer_end_at_once(moment, number, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--num-gpus", 2, "--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{port}"]
    process = run(tmp_path, *words)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def has_come() -> bool:
        if moment == "importing":
            maps = [Path(f"/proc/{pid}/maps") for pid in children.read_text().split()]
            return any("libtorch" in file.read_text() for file in maps)
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    deadline = time.monotonic() + SECONDS
    while not has_come():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    before = time.monotonic()
    code, output = ended(process)
    assert code == EXIT_CODE, output
    assert time.monotonic() - before < 60
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, "setup"])
def test_a_parent_that_is_killed_takes_all_processes_with_it(step, tmp_path):
    words = ["--num-gpus", 2, "--at", 1, step, "kill_parent", "--at", 1, step, "hang"]
    code, output = ended(run(tmp_path, *words))
    assert code == -signal.SIGKILL, output
    assert numbers(tmp_path, "saved") == []


@pytest.mark.slow
def test_a_run_that_ignores_sigint_still_answers_sigterm(tmp_path):
    words = ["--at", 0, 7, "interrupt_all", "--at", 0, 9, "terminate_all"]
    process = run(tmp_path, *words, interrupts=signal.SIG_IGN)  # as shell scripts do
    code, output = ended(process)
    assert code == EXIT_CODE, output
    assert numbers(tmp_path, "saved") == [9]
