"""A run finds a whole checkpoint: after kill -9, on a full disk, and where files are damaged."""

import errno
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fvcore.common.checkpoint import PeriodicCheckpointer
from run_utils import TOOL, end, finish, model_of, start
from torch import nn

from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.checkpoint.files import (
    archive_previous_run,
    find_checkpoints,
    has_checkpoint,
    read_checkpoint,
)
from ss_detectron.engine import BestCheckpointer
from ss_detectron.utils.comm import leave_group

# A process that imports the package once, and of which the others are copies.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["ss_detectron.engine"])


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


def save_for_ever(folder, first, ready):
    saver = checkpointer(folder, size=1000)
    for iteration in range(first, first + 10000):
        with torch.no_grad():
            saver.model.weight.fill_(iteration % 1000)
            saver.model.bias.fill_(iteration % 1000)
        saver.checkpointables["state"].number = iteration
        saver.save(f"model_{iteration % 3:07d}", iteration=iteration)
        ready.set()


def test_a_run_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    chance = random.Random(0)
    interrupted = last = 0
    for _ in range(10):
        ready = processes.Event()
        run = processes.Process(target=save_for_ever, args=(tmp_path, last + 1, ready))
        run.start()
        assert ready.wait(timeout=60)
        run.join(timeout=chance.uniform(0, 0.05))
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        interrupted += bool(list(tmp_path.glob("*.pth.new")))
        path = tmp_path / (tmp_path / "last_checkpoint").read_text()
        saved = read_checkpoint(str(path))
        assert saved["iteration"] == saved["state"]["number"] > last
        last = saved["iteration"]
        for tensor in saved["model"].values():
            assert (tensor == last % 1000).all()
        for other in tmp_path.glob("*.pth"):
            read_checkpoint(str(other))
    assert interrupted
    (tmp_path / "model_0009999.pth.new").touch()
    save(tmp_path, last + 1)
    assert not list(tmp_path.glob("*.new"))


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        place = Path(f"/proc/self/fd/{descriptor}").resolve()
        done.append(("fsync", place.name, place.is_dir() or place.stat().st_size > 0))
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
        expected += [("fsync", tmp_path.name, True)]
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
    with pytest.raises(OSError) as error:
        save(tmp_path, 19)
    assert error.value.errno == errno.ENOSPC
    free = shutil.disk_usage(tmp_path).free
    message = str(error.value)
    for part in (
        f"{tmp_path}/model_0000019.pth could not be written: No space left on device, ",
        f"The checkpoint before it, {tmp_path}/model_0000009.pth, is intact, and --resume goes on",
    ):
        assert part in message
    said = message.partition("device, ")[2].partition(f" bytes are free in {tmp_path}. ")[0]
    assert abs(int(said.replace(",", "")) - free) < 2**30
    kept = ["model_0000019.pth"] * (full == "last_checkpoint")
    assert_only(tmp_path, "last_checkpoint", "model_0000009.pth", *kept)
    assert resume(tmp_path) == 9
    save(tmp_path, 19)
    assert resume(tmp_path) == 19


@pytest.mark.parametrize("size", [300, 100_000, 4_000_000])
def test_a_file_cut_off_anywhere_is_not_left(size, tmp_path):
    big = checkpointer(tmp_path, size=1000)
    with (
        files_of_at_most(size),
        pytest.raises(OSError, match="File too large.*There is no checkpoint before it") as error,
    ):
        big.save("model_0000009")
    assert error.value.errno == errno.EFBIG
    assert_only(tmp_path)
    save(tmp_path, 9)
    with files_of_at_most(size), pytest.raises(OSError, match="model_0000009.pth, is intact"):
        big.save("model_0000009")
    assert resume(tmp_path) == 9


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    save(tmp_path, 9)
    with pytest.raises(AttributeError, match="local"):
        checkpointer(tmp_path).save("model_0000019", function=lambda: None)
    assert_only(tmp_path, "last_checkpoint", "model_0000009.pth")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_is_kept_until_the_next_is_complete(keep, tmp_path):
    saver = checkpointer(tmp_path, size=1000)
    periodic = PeriodicCheckpointer(saver, 10, max_to_keep=keep)
    for iteration in (9, 19):
        periodic.step(iteration)
    kept = ["model_0000009.pth", "model_0000019.pth"][-keep:]
    assert_only(tmp_path, "last_checkpoint", *kept)
    with files_of_at_most(100_000), pytest.raises(OSError, match="model_0000019.pth, is intact"):
        periodic.step(29)
    assert_only(tmp_path, "last_checkpoint", *kept)
    periodic.step(29)
    assert_only(tmp_path, "last_checkpoint", *kept[1:], *kept[2 - keep : 0], "model_0000029.pth")


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
    "is not there": Path.unlink,
    "is empty": lambda path: path.write_bytes(b""),
    "is truncated": truncate,
    "is damaged: the checksum": change_a_weight,
    "cannot be read as a checkpoint": lambda path: path.write_bytes(b"hello"),
    "has to be unpickled": lambda path: path.write_bytes(bytes(range(256))),
    "holds a Tensor": lambda path: torch.save(torch.ones(1), path),
    "Is a directory": lambda path: (path.unlink(), path.mkdir()),
}


def test_torch_alone_does_not_see_a_changed_weight(tmp_path):
    save(tmp_path, 9)
    change_a_weight(tmp_path / "model_0000009.pth")
    assert torch.load(tmp_path / "model_0000009.pth")["model"]["weight"].item() != 9
    with pytest.raises(ValueError, match="model_0000009.pth is damaged: the checksum of .*data/0"):
        checkpointer(tmp_path).load(str(tmp_path / "model_0000009.pth"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("last", ["model_0000029.pth", "model_final.pth"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(last, damage, tmp_path, said):
    save(tmp_path, 9, 19, 29, final=last == "model_final.pth")
    DAMAGES[damage](tmp_path / last)
    before = 29 if last == "model_final.pth" else 19
    assert resume(tmp_path) == before
    (message,) = said()
    assert message.count(str(tmp_path / last)) >= 1 and damage in message
    assert message.endswith(f"Going on from {tmp_path}/model_{before:07d}.pth.")
    # And the next one.
    DAMAGES[damage](tmp_path / f"model_{before:07d}.pth")
    assert resume(tmp_path) == before - 10
    assert said()[1].count(damage) == (1 if damage == "is not there" else 2)
    # Going on, it is written over.
    if damage != "Is a directory":
        save(tmp_path, before)
        assert resume(tmp_path) == before
        assert len(said()) == 2


def test_without_any_that_can_be_read_nothing_starts_from_scratch(tmp_path):
    save(tmp_path, 9, 19)
    truncate(tmp_path / "model_0000009.pth")
    (tmp_path / "model_0000019.pth").write_bytes(b"")
    with pytest.raises(OSError, match="nothing to resume from.*start without --resume") as error:
        resume(tmp_path)
    assert "model_0000019.pth is empty (0 bytes); " in str(error.value)
    assert "model_0000009.pth is truncated, at " in str(error.value)
    assert checkpointer(tmp_path).has_checkpoint()


def test_without_any_checkpoint_a_run_begins(tmp_path):
    assert resume(tmp_path) is None
    assert resume(tmp_path / "not there") is None
    assert not checkpointer(tmp_path).has_checkpoint()
    assert checkpointer(tmp_path).get_checkpoint_file() == ""


TAGS = {
    "empty": b"",
    "zeros": bytes(20),
    "noise": bytes(range(128, 256)),
    "two lines": b"model_0000009.pth\nmodel_0000019.pth",
    "elsewhere": b"../other/model_0000039.pth",
    "absolute": b"/model_0000039.pth",
    "folder": b".",
    "long": b"x" * 1000 + b".pth",
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
    assert checkpointer(folder).get_checkpoint_file() == ""
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


def test_the_latest_is_the_final_one_unless_the_run_was_made_longer(tmp_path):
    save(tmp_path, 9, 19, final=True)
    (tmp_path / "last_checkpoint").unlink()
    assert Path(find_checkpoints(str(tmp_path))[0]).name == "model_final.pth"
    save(tmp_path, 29)
    (tmp_path / "last_checkpoint").unlink()
    assert resume(tmp_path) == 29


def test_the_files_of_an_earlier_run_are_archived(tmp_path):
    for number in (1, 2):
        save(tmp_path, 14, final=True)
        (tmp_path / "model_best.pth").write_bytes(b"")
        (tmp_path / "pretrained.pth").write_bytes(b"")
        aside = tmp_path / f"earlier_run_{number}"
        assert archive_previous_run(str(tmp_path)) == str(aside)
        names = ["last_checkpoint", "model_0000014.pth", "model_best.pth", "model_final.pth"]
        assert sorted(path.name for path in aside.iterdir()) == names
    assert archive_previous_run(str(tmp_path)) is None
    assert not has_checkpoint(str(tmp_path))
    assert (tmp_path / "pretrained.pth").is_file()


def test_files_may_be_copied_in_any_order(tmp_path):
    save(tmp_path, 2, 5, 8)
    truncate(tmp_path / "model_0000008.pth")
    for time, iteration in enumerate((5, 8, 2)):
        os.utime(tmp_path / f"model_{iteration:07d}.pth", (time, time))
    assert resume(tmp_path) == 5


def test_iterations_beyond_seven_digits(tmp_path):
    save(tmp_path, 9999999, 10000009)
    (tmp_path / "model_10000019.pth.new").write_bytes(b"")
    (tmp_path / "model_best.pth").write_bytes(b"")
    found = find_checkpoints(str(tmp_path))
    assert [Path(p).name for p in found] == ["model_10000009.pth", "model_9999999.pth"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_best_checkpoint_is_named_and_written_anew(damage, tmp_path, caplog):
    saver = checkpointer(tmp_path, 9)
    saver.save("model_best", tag=False, iteration=9, metric={"bbox/AP": 3.0})
    DAMAGES[damage](tmp_path / "model_best.pth")

    class Trainer:
        start_iter = 10

    hook = BestCheckpointer(10, saver, "bbox/AP")
    hook.trainer = Trainer()
    hook.before_train()
    assert hook.best_metric is None or damage == "is damaged: the checksum"
    if damage not in ("is not there", "Is a directory"):
        assert "model_best.pth" in caplog.text and "The best metric is found anew." in caplog.text


# Several processes -------------------------------------------------------------------------------


def resume_rank(rank, place, rendezvous, results):
    """As on a machine of its own, which sees what is in ``place``."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.chdir(place)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        results.put((rank, resume(Path("run"))))
    except OSError as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    finally:
        leave_group()


def resume_both(tmp_path, *places):
    """What the two ranks go on from, or the error of each."""
    results = processes.Queue()
    rendezvous = tmp_path / f"rendezvous{len(list(tmp_path.iterdir()))}"
    ranks = [
        processes.Process(target=resume_rank, args=(rank, place, rendezvous, results))
        for rank, place in enumerate(places)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    return [found[0], found[1]]


def test_all_processes_go_on_from_the_main_ones_choice(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    save(here / "run", 9, 19, 29)
    # What the second sees is not damaged, and not tagged yet.
    shutil.copytree(here, there)
    (there / "run" / "last_checkpoint").unlink()
    truncate(here / "run" / "model_0000029.pth")
    assert resume_both(tmp_path, here, here) == [19, 19]
    assert resume_both(tmp_path, here, there) == [19, 19]


def test_all_processes_fail_where_one_cannot_resume(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    save(here / "run", 9)
    first, second = resume_both(tmp_path, here, there)
    assert first == second
    assert "run/model_0000009.pth, which the main process resumes from, is not there for" in first
    assert "OUTPUT_DIR has to be a folder that all machines share" in first
    truncate(here / "run" / "model_0000009.pth")
    first, second = resume_both(tmp_path, here, here)
    assert first == second and first.startswith("OSError: there is nothing to resume from in run")


# Whole runs --------------------------------------------------------------------------------------

TINY = (
    *("--config-file", "quick/shapes_resnet18_ss.yaml"),
    *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 2),
    *("SOLVER.MAX_ITER", 6, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", "()", "OUTPUT_DIR", "out"),
)


@pytest.mark.slow
def test_a_run_whose_last_checkpoints_are_damaged_ends_as_if_they_were_not(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    finish(start(*TINY, cwd=straight))
    shutil.copytree(straight, broken)
    change_a_weight(broken / "out" / "model_final.pth")
    truncate(broken / "out" / "model_0000005.pth")
    output = finish(start("--resume", *TINY, cwd=broken))
    for part in (
        "out/model_final.pth is damaged: the checksum",
        "out/model_0000005.pth is truncated",
        "Going on from out/model_0000003.pth.",
        "Starting training from iteration 4",
    ):
        assert part in output
    expected = model_of(straight / "out", "model_final.pth")
    for name, value in model_of(broken / "out", "model_final.pth").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model_0000003.pth.new", "metrics.json"])
def test_a_run_that_meets_a_full_disk_fails_and_goes_on_where_there_is_room(file, tmp_path):
    finish(start(*TINY, "SOLVER.MAX_ITER", 2, cwd=tmp_path))
    path = tmp_path / "out" / file
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")
    run = start("--resume", *TINY, cwd=tmp_path)
    output, _ = run.communicate()
    end(run)
    assert run.returncode != 0
    message = output.splitlines()[-1]
    what = "out/model_0000003.pth" if "model" in file else "a file of the run in out"
    assert f"{what} could not be written: No space left on device, " in message
    assert "out/model_final.pth, is intact, and --resume goes on from it" in message
    path.unlink(missing_ok=True)
    finish(start("--resume", *TINY, cwd=tmp_path))
    assert read_checkpoint(str(tmp_path / "out" / "model_final.pth"))["iteration"] == 5


# A file system of its own, in memory, with room for two checkpoints of TINY and a half.
SMALL_DISK = """
mount -t tmpfs -o size=340m tmpfs out || exit
"$@"
echo exit code $?
echo in the folder: $(ls out)
mount -o remount,size=1g out
exec "$@"
"""


@pytest.mark.slow
def test_a_run_on_a_disk_that_is_too_small(tmp_path):
    (tmp_path / "out").mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = [*namespace, "mount", "-t", "tmpfs", "tmpfs", "out"]
    if not shutil.which("unshare") or subprocess.run(mount, cwd=tmp_path).returncode:
        pytest.skip("not everybody may mount a file system here")
    words = [sys.executable, TOOL, "--resume", *TINY]
    run = subprocess.run(
        [*namespace, "sh", "-c", SMALL_DISK, "sh", *map(str, words)],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    small, _, large = run.stdout.partition("exit code 1\n")
    assert large and run.returncode == 0, run.stdout[-5000:]
    message = small.splitlines()[-1]
    assert "out/model_0000005.pth could not be written: No space left on device, " in message
    assert "The checkpoint before it, out/model_0000003.pth, is intact, and --resume" in message
    (folder,) = [line for line in large.splitlines() if line.startswith("in the folder:")]
    assert "model_0000001.pth model_0000003.pth" in folder and "model_0000005" not in folder
    assert "Starting training from iteration 4" in large
    assert "Saving checkpoint to out/model_final.pth" in large
