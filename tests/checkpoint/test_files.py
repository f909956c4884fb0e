"""A run finds a whole checkpoint after kill -9, on a full disk, and where files are damaged."""

import errno
import logging
import multiprocessing
import os
import random
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from group_utils import run_ranks
from run_utils import end, finish, start
from torch import nn

from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.checkpoint.files import (
    archive_previous_run,
    find_checkpoints,
    has_checkpoint,
    read_checkpoint,
)


class State:
    """A number, as the state of a trainer."""

    def __init__(self, number=-1):
        self.number = number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def checkpointer(folder, value=0.0, size=1):
    model = nn.Linear(size, size)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return FeedbackCheckpointer(model, str(folder), state=State(value))


def save(folder, *iterations, final=False):
    """The checkpoints of a run, in which everything is the iteration."""
    folder.mkdir(exist_ok=True)
    for iteration in iterations:
        checkpointer(folder, iteration).save(f"model_{iteration:07d}", iteration=iteration)
    if final:
        checkpointer(folder, iterations[-1]).save("model_final", iteration=iterations[-1])


def resume(folder):
    """The iteration that a resumed run goes on from."""
    resumed = checkpointer(folder, -1)
    rest = resumed.resume_or_load("", resume=True)
    if not rest:
        return None
    number = resumed.checkpointables["state"].number
    assert rest["iteration"] == resumed.model.weight.item() == number
    return number


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)

    def messages():
        return [
            r.getMessage()
            for r in caplog.records
            if r.name == "ss_detectron.checkpoint.checkpointer" and r.levelno >= logging.WARNING
        ]

    return messages


# kill -9 -----------------------------------------------------------------------------------------


def save_for_ever(folder, ready):
    saver = checkpointer(folder, size=1000)
    for iteration in range(1, 100_000):
        with torch.no_grad():
            saver.model.weight.fill_(iteration % 1000)
            saver.model.bias.fill_(iteration % 1000)
        saver.checkpointables["state"].number = iteration
        saver.save(f"model_{iteration % 3:07d}", iteration=iteration)
        ready.set()


def stop(process):
    """Stops a process where it is, which leaves on the disk what kill -9 would."""
    os.kill(process.pid, signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
        time.sleep(0.001)


def test_a_run_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    chance, interrupted, last = random.Random(0), 0, 0
    processes = multiprocessing.get_context("fork")
    ready = processes.Event()
    run = processes.Process(target=save_for_ever, args=(tmp_path, ready))
    run.start()
    try:
        assert ready.wait(timeout=120)
        for _ in range(20):
            time.sleep(chance.uniform(0.01, 0.05))
            stop(run)
            interrupted += bool(list(tmp_path.glob("*.pth.new")))
            saved = read_checkpoint(tmp_path / (tmp_path / "last_checkpoint").read_text())
            assert saved["iteration"] == saved["state"]["number"] >= last
            last = saved["iteration"]
            assert all((tensor == last % 1000).all() for tensor in saved["model"].values())
            for other in tmp_path.glob("*.pth"):
                read_checkpoint(other)
            os.kill(run.pid, signal.SIGCONT)
    finally:
        run.kill()
        run.join()
    assert interrupted and last > 3
    (tmp_path / "model_0009999.pth.new").touch()
    save(tmp_path, last + 1)
    assert not list(tmp_path.glob("*.new"))


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        place = Path(f"/proc/self/fd/{descriptor}").resolve()
        done.append(("fsync", place.name, place.stat().st_size > 0))
        fsync(descriptor)

    def record_replace(source, target):
        done.append(("replace", Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    save(tmp_path, 9)
    expected = []
    for name in ("model_0000009.pth", "last_checkpoint"):
        expected += [("fsync", f"{name}.new", True), ("replace", f"{name}.new", name)]
    assert done == expected


# A full disk -------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size):
    """The kernel refuses to write more; beyond it, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_only(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("full", ["model_0000019.pth", "last_checkpoint"])
def test_a_full_disk_is_an_error_that_names_what_is_left(full, tmp_path):
    save(tmp_path, 9)
    (tmp_path / f"{full}.new").symlink_to("/dev/full")
    message = "model_0000019.pth could not be written: No space left on device, .* bytes are free "
    message += f"in {tmp_path}; --resume goes on from {tmp_path}/model_0000009"
    with pytest.raises(OSError, match=message) as error:
        save(tmp_path, 19)
    assert error.value.errno == errno.ENOSPC
    kept = ["model_0000019.pth"] * (full == "last_checkpoint")
    assert_only(tmp_path, "last_checkpoint", "model_0000009.pth", *kept)
    assert resume(tmp_path) == 9
    save(tmp_path, 19)
    assert resume(tmp_path) == 19


@pytest.mark.parametrize("size", [300, 4_000_000])
def test_a_file_cut_off_anywhere_is_not_left(size, tmp_path):
    big = checkpointer(tmp_path, size=1000)
    with files_of_at_most(size), pytest.raises(OSError, match="too large.*no checkpoint") as error:
        big.save("model_0000009")
    assert error.value.errno == errno.EFBIG
    assert_only(tmp_path)
    save(tmp_path, 9)
    with files_of_at_most(size), pytest.raises(OSError, match="goes on from .*model_0000009.pth"):
        big.save("model_0000009")
    assert resume(tmp_path) == 9


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    save(tmp_path, 9)
    with pytest.raises(AttributeError, match="local"):
        checkpointer(tmp_path).save("model_0000019", function=lambda: None)
    assert_only(tmp_path, "last_checkpoint", "model_0000009.pth")


# Damaged files -----------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def change_a_weight(path):
    content = bytearray(path.read_bytes())
    weight = next(iter(torch.load(path)["model"].values()))
    value = weight.contiguous().numpy().tobytes()
    content[content.index(value) + 3] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "No such file": Path.unlink,
    "(0 bytes) is truncated": lambda path: path.write_bytes(b""),
    "bytes) is truncated": truncate,
    "the checksum of its part": change_a_weight,
    "or no checkpoint": lambda path: path.write_bytes(b"hello"),
    "has to be unpickled": lambda path: path.write_bytes(bytes(range(256))),
    "holds a Tensor": lambda path: torch.save(torch.ones(1), path),
    "Is a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, tmp_path, said):
    save(tmp_path, 9, 19, 29, final=True)
    for number, (last, before) in enumerate((("final", 29), ("0000029", 19)), start=1):
        DAMAGES[damage](tmp_path / f"model_{last}.pth")
        assert resume(tmp_path) == before
        assert len(said()) == number
        assert damage in said()[-1]
        assert said()[-1].endswith(f"Going on from {tmp_path}/model_{before:07d}.pth.")
    # Going on, it is written over.
    if damage != "Is a directory":
        save(tmp_path, 29)
        assert resume(tmp_path) == 29
        assert len(said()) == 2


def test_without_any_that_can_be_read_nothing_starts_from_scratch(tmp_path):
    save(tmp_path, 9, 19)
    truncate(tmp_path / "model_0000009.pth")
    (tmp_path / "model_0000019.pth").write_bytes(b"")
    with pytest.raises(OSError, match="nothing to resume from.*start without --resume") as error:
        resume(tmp_path)
    assert "model_0000019.pth (0 bytes) is truncated" in str(error.value)
    assert "; " in str(error.value) and "model_0000009.pth (" in str(error.value)
    assert checkpointer(tmp_path).has_checkpoint()


def test_without_any_checkpoint_a_run_begins(tmp_path):
    assert resume(tmp_path) is None
    assert resume(tmp_path / "not there") is None
    assert not checkpointer(tmp_path).has_checkpoint()


TAGS = {
    "empty": b"",
    "zeros": bytes(20),
    "elsewhere": b"../other/model_0000039.pth",
    "missing": None,
}


@pytest.mark.parametrize("tag", TAGS)
def test_a_last_checkpoint_file_that_names_none_gives_way_to_the_latest(tag, tmp_path, said):
    save(tmp_path / "other", 39)
    folder = tmp_path / "run"
    save(folder, 9, 19)
    if TAGS[tag] is None:
        (folder / "last_checkpoint").unlink()
    else:
        (folder / "last_checkpoint").write_bytes(TAGS[tag])
    assert checkpointer(folder).has_checkpoint()
    assert resume(folder) == 19
    expected = f"{folder}/last_checkpoint names no checkpoint. Going on from {folder}/model_0000019"
    assert said() == [f"{expected}.pth."]
    for path in folder.glob("*.pth"):
        path.unlink()
    if TAGS[tag] is None:
        assert resume(folder) is None
    else:
        with pytest.raises(OSError, match="last_checkpoint names no checkpoint"):
            resume(folder)


def test_without_a_tag_a_final_checkpoint_is_found(tmp_path):
    save(tmp_path, 9, final=True)
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "model_0000009.pth").unlink()
    assert resume(tmp_path) == 9


def test_the_files_of_an_earlier_run_are_archived(tmp_path):
    metrics = tmp_path / "metrics.json"
    for number in (1, 2):
        save(tmp_path, 14, final=True)
        for name in ("model_best.pth", "pretrained.pth", "config.yaml"):
            (tmp_path / name).write_bytes(b"")
        (tmp_path / "inference").mkdir()
        (tmp_path / "inference" / "results.json").write_text(f"[{number}]")
        metrics.write_text(f"{number}\n")
        with metrics.open("a") as writer:  # the new run's
            archive = tmp_path / f"earlier_run_{number}"
            assert archive_previous_run(str(tmp_path)) == str(archive)
            writer.write("new\n")
        assert metrics.read_text() == "new\n"
        assert (archive / "metrics.json").read_text() == f"{number}\n"
        assert (archive / "inference" / "results.json").read_text() == f"[{number}]"
        names = ["last_checkpoint", "model_0000014.pth", "model_best.pth", "model_final.pth"]
        assert_only(archive, *names, "config.yaml", "inference", "metrics.json")
    assert_only(tmp_path, "earlier_run_1", "earlier_run_2", "metrics.json", "pretrained.pth")
    metrics.write_text("")  # as the new run's writer makes it
    assert archive_previous_run(str(tmp_path)) is None
    assert not has_checkpoint(str(tmp_path))


def test_iterations_beyond_seven_digits(tmp_path):
    save(tmp_path, 9999999, 10000009)
    (tmp_path / "model_10000019.pth.new").write_bytes(b"")
    (tmp_path / "model_best.pth").write_bytes(b"")
    found = find_checkpoints(str(tmp_path))
    assert [Path(p).name for p in found] == ["model_10000009.pth", "model_9999999.pth"]


# Several processes -------------------------------------------------------------------------------


def resume_everywhere(rank, folder):
    """Two ranks, each of which may see a folder of its own, as on machines of their own."""
    for case, others, expected in (
        ("damaged", "damaged", 19),
        ("damaged", "not tagged", 19),
        ("damaged", "empty", "is not there for every process: OUTPUT_DIR has to be a folder that"),
        ("all damaged", "all damaged", "there is nothing to resume from in run"),
    ):
        os.chdir(Path(folder, (case, others)[rank]))
        try:
            assert resume(Path("run")) == expected
        except OSError as error:
            assert isinstance(expected, str) and expected in str(error), error


def test_all_processes_go_on_from_the_main_ones_choice_or_fail_together(tmp_path):
    for name in ("damaged", "not tagged", "all damaged", "empty"):
        (tmp_path / name).mkdir()
        if name != "empty":
            save(tmp_path / name / "run", 9, 19, 29)
    (tmp_path / "not tagged" / "run" / "last_checkpoint").unlink()
    truncate(tmp_path / "damaged" / "run" / "model_0000029.pth")
    for path in (tmp_path / "all damaged").rglob("*.pth"):
        truncate(path)
    run_ranks(resume_everywhere, tmp_path, start_method="fork")


# Whole runs --------------------------------------------------------------------------------------

TINY = (
    *("--config-file", "quick/shapes_resnet18_ss.yaml"),
    *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 2),
    *("SOLVER.MAX_ITER", 6, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", "()", "OUTPUT_DIR", "out"),
)


@pytest.mark.slow
def test_a_run_that_meets_a_full_disk_fails_and_goes_on_where_there_is_room(tmp_path):
    finish(start(*TINY, "SOLVER.MAX_ITER", 2, cwd=tmp_path))
    path = tmp_path / "out" / "metrics.json"
    path.unlink()
    path.symlink_to("/dev/full")
    run = start("--resume", *TINY, cwd=tmp_path)
    output, _ = run.communicate()
    end(run)
    assert run.returncode != 0
    message = output.splitlines()[-1]
    assert "a file of the run could not be written: No space left on device, " in message
    assert "--resume goes on from out/model_final.pth" in message
    path.unlink()
    finish(start("--resume", *TINY, cwd=tmp_path))
    assert read_checkpoint(str(tmp_path / "out" / "model_final.pth"))["iteration"] == 5
