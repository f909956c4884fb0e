"""What the generated data sets share: stamps, folders that are whole, one process that writes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ss_detectron.data import register_shapes, register_shapes_cls
from ss_detectron.data.shapes import SHAPES
from ss_detectron.data.shapes_cls import SHAPES_CLS

FEW = {"shapes": {"train": 3, "val": 2}, "shapes_cls": {"train": 20, "val": 10}}


@pytest.fixture(params=[SHAPES, SHAPES_CLS], ids=lambda dataset: dataset.name)
def dataset(request, monkeypatch):
    for key, value in FEW[request.param.name].items():
        monkeypatch.setitem(request.param.defaults, key, value)
    return request.param


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of data sets, and catalogs that forget what was loaded from it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield tmp_path
    for name in FEW:
        for split in ("train", "val"):
            DatasetCatalog.remove(f"{name}_{split}")
            MetadataCatalog.remove(f"{name}_{split}")
    register_shapes()
    register_shapes_cls()


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def generator(root: Path, settings: dict[str, int]) -> subprocess.Popen:
    """A process that generates shapes."""
    code = (
        "import logging; logging.basicConfig(level='INFO'); from ss_detectron.data import "
        f"generate_shapes; generate_shapes({str(root)!r}, **{settings})"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True
    )


def test_same_seed_same_bytes(dataset, tmp_path):
    first = dataset.generate(tmp_path / "first")
    np.random.seed(1)  # the global generator has no part in it
    again = dataset.generate(tmp_path / "again", **FEW[dataset.name])
    assert digests(again) == digests(first)


def test_a_picture_depends_on_seed_split_and_index_only(dataset, tmp_path):
    def pictures(folder):
        return {k: v for k, v in digests(folder).items() if k.endswith("png")}

    few = FEW[dataset.name]
    more = pictures(dataset.generate(tmp_path / "more", train=2 * few["train"]))
    fewer = pictures(dataset.generate(tmp_path / "fewer"))
    other = pictures(dataset.generate(tmp_path / "other", seed=1))
    assert fewer.items() < more.items()
    assert len(fewer) == sum(few.values())
    # No picture of one split is in the other.
    assert len(set(more.values())) == 2 * few["train"] + few["val"]
    assert not set(more.values()) & set(other.values())


def test_interrupted_generation_is_not_taken_for_complete(dataset, root, monkeypatch):
    def stop(folder: Path, stamp: dict) -> None:
        (folder / "half.png").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset, "write", stop)
        dataset.generate()
    assert not (root / dataset.name).exists()
    assert digests(dataset.generate()) == digests(dataset.generate(root / "again"))
    assert not list(root.glob(".*.partial"))


@pytest.mark.slow
def test_of_several_processes_one_generates_and_its_end_is_made_good(root):
    """Of two, whichever writes is killed: the other one does what is left."""
    partial = root / ".shapes.partial"
    settings = {"train": 200, "val": 20}
    processes = [generator(root, settings) for _ in range(2)]
    deadline = time.monotonic() + 60
    while len(list(partial.glob("train/*.png"))) < 5:
        assert time.monotonic() < deadline and not (root / "shapes").exists()
        time.sleep(0.002)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    said = processes[1].communicate(timeout=60)[1]
    processes[0].stderr.close()
    assert processes[1].returncode == 0, said
    assert said.count("Generating") == 1 and not partial.exists()
    assert len(digests(root / "shapes")) == 222
    assert SHAPES.generate(root, **settings) == root / "shapes"


def test_folder_that_is_there_is_left_alone(dataset, root):
    folder = dataset.generate(size=80)
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert dataset.generate(size=80) == dataset.ensure() == folder
    assert len(DatasetCatalog.get(f"{dataset.name}_train")) == FEW[dataset.name]["train"]
    with pytest.raises(FileExistsError, match=r"'size': 80.*wanted.*'size': (96|48)"):
        dataset.generate()
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == times


@pytest.mark.parametrize("content", [None, "", "[]", '{"info": {"generator": "another"}}'])
def test_foreign_folder_is_refused(dataset, root, content):
    file = root / dataset.name / (dataset.stamp_file if content is not None else "holiday.png")
    file.parent.mkdir(parents=True)
    file.write_text(content or "not ours")
    for call in (
        dataset.generate,
        dataset.ensure,
        lambda: DatasetCatalog.get(f"{dataset.name}_train"),
    ):
        with pytest.raises(FileExistsError, match=f"'{root}/{dataset.name}' was not generated by"):
            call()
    assert list(file.parent.iterdir()) == [file]


def test_another_version_of_the_generator_is_refused(dataset, root):
    stamp = dataset.generate() / dataset.stamp_file
    assert json.loads(stamp.read_text())
    stamp.write_text(stamp.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(FileExistsError, match="not generated by version 1 .* left as it is"):
        dataset.ensure()
