"""Thousands of steps leave memory, files and processes as they were."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
from modeling_utils import resnet
from run_utils import SECONDS, end, start

STEPS, EVALUATION = 2000, 500
# Each begins with an evaluation and a checkpoint, and ends before the next.
EARLY, LATE = range(500, 900), range(1500, 1900)
GROWTH = 1.02
DIGITS = re.compile(r"\d+")

COMMON = [
    *("OUTPUT_DIR", "out", "DATALOADER.NUM_WORKERS", 1, "SOLVER.MAX_ITER", STEPS),
    *("SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", EVALUATION // 2, "SOLVER.BASE_LR", 1e-4),
    *("TEST.EVAL_PERIOD", EVALUATION),
]
DETECTION = [
    *resnet(50, res2=8, stem=8, width=4),
    *("MODEL.RESNETS.OUT_FEATURES", "['res5']", "MODEL.FPN.IN_FEATURES", "['res5']"),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RETINANET.IN_FEATURES", "['p5']"),
    *("MODEL.RETINANET.NUM_CONVS", 1, "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2),
]
CLASSIFICATION = [
    *("MODEL.RESNETS.OUT_FEATURES", "['res2']"),
    *("INPUT.CLASSIFICATION.SIZE", 32, "SOLVER.IMS_PER_BATCH", 4),
]


def processes_of(session: int) -> set[int]:
    """The processes of a session, but for those that have ended."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended just now
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.add(int(folder.name))
    return found


def memory_of(pid: int) -> int:
    """
    In bytes: a process's own memory, and what it shares as batches. Not what belongs to files,
    which the kernel drops as it likes, and not the proportional size (PSS), which leaps when a
    worker first writes to a page that it has in common with its parent since the fork.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(sizes[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


def iteration_of(folder: Path) -> int:
    """The last iteration that a run has logged, which it does every 20; -1 before the first."""
    try:
        lines = (folder / "metrics.json").read_text().splitlines()
        return json.loads(lines[-1])["iteration"]
    except (OSError, IndexError, ValueError):  # a line may be half written
        return -1


class Samples:
    """What the processes of a run hold, looked at many times."""

    def __init__(self) -> None:
        self.memory: dict[int, list[int]] = defaultdict(list)
        """Process -> bytes each time."""
        self.files: dict[int, list[int]] = defaultdict(list)
        """Process -> open files each time."""
        self.processes = sys.maxsize
        """The fewest there were at a time: evaluation has loader workers of its own."""

    def take(self, processes: set[int]) -> None:
        for pid in processes:
            with suppress(OSError):  # it has ended just now
                memory, files = memory_of(pid), len(os.listdir(f"/proc/{pid}/fd"))
                self.memory[pid].append(memory)
                self.files[pid].append(files)
        self.processes = min(self.processes, len(processes))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("config", "keys", "ranks"),
    [
        ("shapes_retinanet_ss.yaml", DETECTION, 1),
        ("shapes_resnet18_ss.yaml", CLASSIFICATION, 2),
    ],
    ids=["detection, one process", "classification, two processes"],
)
def test_memory_files_and_processes_stay_as_they_are(config, keys, ranks, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    words = ["--config-file", f"quick/{config}", "--num-gpus", ranks, *COMMON, *keys]
    process = start(*words, cwd=tmp_path)
    early, late, seen = Samples(), Samples(), set()
    with process:
        try:
            deadline = time.monotonic() + 3 * SECONDS
            while process.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=0.2)  # between two samples
                iteration = iteration_of(tmp_path / "out")
                running = processes_of(process.pid)
                seen |= running
                for samples, window in ((early, EARLY), (late, LATE)):
                    if iteration in window:
                        samples.take(running)
                assert time.monotonic() < deadline
        finally:
            end(process)
    assert process.returncode == 0, output[-5000:]
    assert output.count(" in csv format:") == STEPS // EVALUATION

    # A worker or rank that was replaced has another number.
    lasting = early.memory.keys() & late.memory.keys()
    assert len(lasting) == early.processes == late.processes
    assert len(lasting) >= 2 * ranks  # each with a loader worker
    for pid in lasting:
        before, after = (statistics.median(samples.memory[pid]) for samples in (early, late))
        assert after < GROWTH * before, f"{before} -> {after} bytes in one of {lasting}"
        # Batches on their way from a worker are open files, now one more, now one fewer. What each
        # evaluation left open would be two by now.
        before, after = (statistics.median(samples.files[pid]) for samples in (early, late))
        assert after < before + 2, f"{before} -> {after} open files in one of {lasting}"

    while processes_of(process.pid) and time.monotonic() < deadline:
        pass  # the last may be about to end
    assert not processes_of(process.pid)
    # torch makes itself a cache, whatever it is used for.
    left = [p for p in (tmp_path / "tmp").iterdir() if not p.name.startswith("torchinductor_")]
    assert not left
    shared = [name for name in os.listdir("/dev/shm") if seen & set(map(int, DIGITS.findall(name)))]
    assert not shared
