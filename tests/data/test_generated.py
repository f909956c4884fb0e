"""What the generated data sets share: stamps, folders that are whole, one process that writes."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ss_detectron.data import (
    ensure_shapes,
    ensure_shapes_cls,
    generate_shapes,
    generate_shapes_cls,
    register_shapes,
    register_shapes_cls,
    shapes,
    shapes_cls,
)
from ss_detectron.data.generated import GeneratedDataset


@dataclass
class Case:
    """A generated data set, its functions, settings for a few pictures, where its stamps are."""

    dataset: GeneratedDataset
    generate: Callable[..., Path]
    ensure: Callable[..., Path]
    few: dict[str, int]
    stamps: list[str]


CASES = [
    Case(
        shapes.SHAPES,
        generate_shapes,
        ensure_shapes,
        {"train": 3, "val": 2},
        ["annotations/instances_train.json", "annotations/instances_val.json"],
    ),
    Case(
        shapes_cls.SHAPES_CLS,
        generate_shapes_cls,
        ensure_shapes_cls,
        {"train": 20, "val": 10},
        ["generated.json"],
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.dataset.name)
def case(request):
    return request.param


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of data sets, and catalogs that forget what was loaded from it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield tmp_path
    for case in CASES:
        for split in ("train", "val"):
            DatasetCatalog.remove(f"{case.dataset.name}_{split}")
            MetadataCatalog.remove(f"{case.dataset.name}_{split}")
    register_shapes()
    register_shapes_cls()


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def generator(root: Path, wanted: dict[str, dict[str, int]]) -> subprocess.Popen:
    """A process that calls functions with settings as soon as the file ``root/go`` is there."""
    code = f"""
import logging, os, time
from ss_detectron import data
logging.basicConfig(level="INFO")
open({str(root / "ready")!r}, "w").close()
while not os.path.exists({str(root / "go")!r}):
    time.sleep(0.005)
for function, settings in {wanted}.items():
    getattr(data, function)({str(root)!r}, **settings)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_same_seed_same_bytes(case, tmp_path):
    first = case.generate(tmp_path / "first", **case.few)
    np.random.seed(1)  # the global generator has no part in it
    again = case.generate(tmp_path / "again", **case.few)
    assert digests(again) == digests(first)
    pictures = case.few["train"] + case.few["val"]
    assert len(digests(first)) == pictures + len(case.stamps)


def test_a_picture_depends_on_seed_split_and_index_only(case, tmp_path):
    def pictures(folder):
        return {k: v for k, v in digests(folder).items() if k.endswith("png")}

    few = case.few
    more = pictures(case.generate(tmp_path / "more", **{**few, "train": 4 * few["train"]}))
    fewer = pictures(case.generate(tmp_path / "fewer", **few))
    other = pictures(case.generate(tmp_path / "other", **few, seed=1))
    assert fewer.items() < more.items()
    # No picture of one split is in the other.
    assert len(set(more.values())) == 4 * few["train"] + few["val"]
    assert not set(more.values()) & set(other.values())


def test_killed_generation_is_not_taken_for_complete(root):
    case = CASES[0]
    partial = root / ".shapes.partial"
    (root / "go").touch()
    process = generator(root, {"generate_shapes": {"train": 2000, "val": 20}})
    wait_for(lambda: len(list(partial.glob("train/*.png"))) > 20, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert partial.is_dir()
    assert not (root / "shapes").exists()

    case.generate(**case.few)
    assert digests(root / "shapes") == digests(case.generate(root / "again", **case.few))
    assert not partial.exists()


@pytest.mark.slow
def test_one_of_two_processes_generates(root, caplog):
    caplog.set_level("INFO")
    more = [{split: 10 * number for split, number in case.few.items()} for case in CASES]
    names = [case.generate.__name__ for case in CASES]
    process = generator(root, dict(zip(names, more, strict=True)))
    wait_for((root / "ready").exists, process)
    (root / "go").touch()
    folders = [case.generate(**few) for case, few in zip(CASES, more, strict=True)]
    theirs = process.communicate(timeout=60)[1]
    assert process.returncode == 0, theirs
    assert (theirs + caplog.text).count("Generating") == len(CASES)
    for case, few, folder in zip(CASES, more, folders, strict=True):
        assert len(digests(folder)) == sum(few.values()) + len(case.stamps)


def test_complete_folder_is_left_alone(case, root):
    folder = case.generate(**case.few)
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert case.generate(**case.few) == case.ensure() == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == times


def test_foreign_folder_is_refused(case, root):
    name = case.dataset.name
    photo = root / name / "train" / "holiday.png"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"not ours")
    for call in (case.generate, case.ensure, lambda: DatasetCatalog.get(f"{name}_train")):
        with pytest.raises(FileExistsError, match=f"'{root}/{name}' is not a complete folder"):
            call()
    assert photo.read_bytes() == b"not ours"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"info": {"generator": "another"}}'])
def test_folder_with_somebody_elses_files_is_refused(case, root, content):
    for stamp in case.stamps:
        file = root / case.dataset.name / stamp
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    with pytest.raises(FileExistsError, match="left as it is"):
        case.ensure()


def test_splits_of_different_runs_are_refused(root):
    folder = generate_shapes(**CASES[0].few)
    other = generate_shapes(root / "other", **CASES[0].few, seed=1)
    (other / CASES[0].stamps[0]).replace(folder / CASES[0].stamps[0])
    with pytest.raises(FileExistsError, match="left as it is"):
        ensure_shapes()


def test_one_data_set_is_not_taken_for_another(root):
    """A stamp names its data set, wherever it lies."""
    folder = generate_shapes_cls(**CASES[1].few)
    stamp = folder / "generated.json"
    stamp.write_text(stamp.read_text().replace("shapes_cls", "shapes"))
    with pytest.raises(FileExistsError, match="left as it is"):
        ensure_shapes_cls()


def test_other_settings_are_refused_but_used_as_they_are(case, root):
    folder = case.generate(**case.few, size=80)
    before = digests(folder)
    with pytest.raises(FileExistsError, match=r"'size': 80.*wanted.*'size': (96|48)"):
        case.generate(**case.few)
    assert case.ensure() == folder
    assert len(DatasetCatalog.get(f"{case.dataset.name}_train")) == case.few["train"]
    assert digests(folder) == before


def test_another_version_of_the_generator_is_refused(case, root, monkeypatch):
    case.generate(**case.few)
    version = case.dataset.version
    monkeypatch.setattr(case.dataset, "version", version + 1)
    with pytest.raises(FileExistsError, match=f"version {version} .* delete"):
        case.ensure()


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"size": 31}, {"seed": -1}])
def test_impossible_settings_are_refused(case, root, wrong):
    with pytest.raises(ValueError, match="{}={}".format(*next(iter(wrong.items())))):
        case.generate(**wrong)
    assert not list(root.iterdir())
