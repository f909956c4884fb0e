import hashlib

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from image_utils import image_config
from PIL import Image

from ss_detectron.data import SHAPES_CLS_CLASSES, check_datasets, draw_shape, shapes_cls

DEFAULTS = {"train": 2000, "val": 500, "size": 48, "seed": 0}


def rng(index: int, split: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([0, split, index]))


def silhouette(monkeypatch, index: int, category: int):
    """The part of each pixel that is covered: drawn on black and on white, the rest differs."""
    monkeypatch.setattr(shapes_cls, "MIN_CONTRAST", 0)  # or the background would choose the place
    pictures = []
    for level in (20, 235):  # so that no grain is cut off
        plain = np.full((48, 48, 3), level)
        monkeypatch.setattr(shapes_cls, "background", lambda rng, size, plain=plain: plain)
        picture, _ = draw_shape(rng(index), 48, category)
        pictures.append(picture.astype(int))
    # Of the three channels one may be so bright that its grain is cut off.
    return 1 - np.median(pictures[1] - pictures[0], -1) / 215


def classify(cover: np.ndarray) -> str:
    """The class of a silhouette by its moments about the centroid, in units of its area.

    What a turn by 1/m of a circle leaves as it is has no n-fold moment but for n = m, 2m, ...; and
    the n-fold moment turns n times as fast as the form. From right to down, as y points down.
    """
    y, x = np.mgrid[: len(cover), : len(cover)] + 0.5
    z = x + 1j * y
    z = (z - (z * cover).sum() / cover.sum()) / np.sqrt(cover.sum())

    def moment(n: int, radial: int = 0) -> complex:
        return (cover * z**n * np.abs(z) ** radial).sum() / cover.sum()

    def direction(moment: complex, *names: str) -> str:
        return names[round(np.angle(moment) / (2 * np.pi) * len(names)) % len(names)]

    if abs(moment(1, 2)) > 0.01:  # more of it is far from the centroid on the side of the apex
        return "triangle_" + direction(moment(1, 2), "right", "down", "left", "up")
    if abs(moment(2)) > 0.06:
        return "bar_" + direction(moment(2), "horizontal", "falling", "vertical", "rising")
    assert abs(moment(4)) > 0.01
    return direction(moment(4), "diamond", "square")


def test_every_shape_is_of_its_class(monkeypatch):
    """Found out from the pixels alone."""
    for category, name in enumerate(SHAPES_CLS_CLASSES):
        for index in range(25):
            cover = silhouette(monkeypatch, index, category)
            assert classify(cover) == name, index


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
