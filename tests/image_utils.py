"""What the tests of classification data share: small folders of images, and configs for them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils import logger as d2_logger
from PIL import Image

from ss_detectron import add_ss_config
from ss_detectron.data import register_shapes, register_shapes_cls
from ss_detectron.data.generated import SPLITS


def image_config(*folders, train=(), test=(), classes=2, **options) -> CfgNode:
    """A config of a classifier, with keys of INPUT.CLASSIFICATION by name."""
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES = classes
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.IMAGE_FOLDERS = list(folders)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    for key, value in options.items():
        cfg.INPUT.CLASSIFICATION[key] = value
    return cfg


def write_images(folder: Path, size=(8, 8), **classes: int) -> list[Path]:
    """One folder per class with so many PNGs, the n-th image of them all of the grey n."""
    files = []
    for name, images in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(images):
            files.append(folder / name / f"{i:04d}.png")
            Image.new("RGB", size, (len(files) - 1,) * 3).save(files[-1])
    return files


def pretend_processes(monkeypatch: pytest.MonkeyPatch, processes: int) -> Iterator[int]:
    """Every rank in turn, while Detectron2 believes that this process has it."""
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        yield rank


@contextmanager
def datasets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of data sets, an empty current folder; catalogs are put right after."""
    (tmp_path / "sets").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(d2_logger, "_LOG_COUNTER", Counter())  # of what is logged but once
    before = set(DatasetCatalog.list())
    yield tmp_path / "sets"
    generated = {f"{kind}_{split}" for kind in ("shapes", "shapes_cls") for split in SPLITS}
    for name in set(DatasetCatalog.list()) - before | generated:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
    register_shapes()  # loading them adds to their metadata
    register_shapes_cls()
