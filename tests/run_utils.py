"""Whole runs of the tools, as their users start them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from time_limit import within

from ss_detectron.data import generate_shapes

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "train_net.py"
SECONDS = 240  # a machine may be busy


def tiny_detection(folder: Path) -> list[str]:
    """KEY VALUE ... of the smallest training there is, on data sets that config keys alone give."""
    shapes = generate_shapes(folder, train=8, val=3, size=64)
    keys = {
        "DATASETS.COCO_INSTANCES": [
            [f"tiny_{s}", f"{shapes}/annotations/instances_{s}.json", f"{shapes}/{s}"]
            for s in ("train", "val")
        ],
        "DATASETS.TRAIN": ("tiny_train",),
        "DATASETS.TEST": (),
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.001,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 3,
        "SOLVER.STEPS": (),
        "SOLVER.CHECKPOINT_PERIOD": 1000,
    }
    return [str(word) for pair in keys.items() for word in pair]


def start(
    *words,
    cwd: Path,
    script: Path = TOOL,
    interpreter: str = sys.executable,
    **environment: str,
) -> subprocess.Popen:
    """Starts the tool, or another script, with variables, where no GPU is to be seen."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return subprocess.Popen(
        [interpreter, script, *map(str, words)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell has what it starts in the background ignore it, these tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def end(process: subprocess.Popen) -> None:
    """Kills what is left of a run, its children included."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def output_after(process: subprocess.Popen, text: str, act: Callable[[], None]) -> str:
    """
    Acts when a run has printed a line with that text, or at once without one. Returns what it
    prints after it, once nobody holds the other end of the pipe.
    """
    with process:
        try:
            with within(SECONDS):
                assert not text or any(text in line for line in process.stdout)
                act()
                return process.communicate()[0]
        finally:
            end(process)


def finish(process: subprocess.Popen) -> str:
    """What a run that succeeds has printed."""
    output = output_after(process, "", lambda: None)
    assert process.returncode == 0, output[-5000:]
    return output


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def model_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / name)["model"]


def assert_equal(a, b, where=""):
    """Of nested dicts, lists, tensors and numbers, to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{number}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where
