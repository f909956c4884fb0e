import hashlib

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from image_utils import image_config
from PIL import Image

from ss_detectron.data import SHAPES_CLS_CLASSES, check_datasets, draw_shape, shapes_cls

DEFAULTS = {"train": 2000, "val": 500, "size": 48, "seed": 0}


def rng(index: int, split: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([0, split, index]))


def test_pictures_are_those_of_version_1():
    """A change of any pixel needs another version, as results no longer compare."""
    pixels = hashlib.sha256()
    for index in range(20):
        pixels.update(draw_shape(rng(index), 48, index % 10)[0].tobytes())
    assert shapes_cls.SHAPES_CLS.version == 1 and shapes_cls.SHAPES_CLS.defaults == DEFAULTS
    assert pixels.hexdigest() == (
        "6021005922513a8a14d1b5816b55c7f75fdc86a0c3f49920a26e6b37fe73eb44"
    )


def test_it_is_there_from_an_empty_folder(root, monkeypatch):
    monkeypatch.setattr(shapes_cls.SHAPES_CLS, "defaults", {**DEFAULTS, "train": 20, "val": 10})
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"shapes_cls_{split}")
        assert metadata.evaluator_type == "classification"
        assert metadata.thing_classes == list(SHAPES_CLS_CLASSES) == sorted(SHAPES_CLS_CLASSES)
    assert not list(root.iterdir())  # registered, but not generated
    sets = {"train": ("shapes_cls_train",), "test": ("shapes_cls_val",)}
    check_datasets(image_config(**sets, classes=10))
    for split, number in (("train", 2), ("val", 1)):
        records = DatasetCatalog.get(f"shapes_cls_{split}")
        assert np.bincount([r["label"] for r in records]).tolist() == [number] * 10
    for record in records:  # the first of each class
        label = record["label"]
        expected, _ = draw_shape(rng(label, split=1), 48, label)
        np.testing.assert_array_equal(np.asarray(Image.open(record["file_name"])), expected)
