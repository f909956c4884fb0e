import hashlib
import json

import numpy as np
import pytest
from coco_utils import detections
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from matplotlib.path import Path as Polygon
from PIL import Image

from ss_detectron.data import SHAPES_CLASSES, draw_shapes, generate_shapes, shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("datasets"), train=60, val=20)


DEFAULTS = {"train": 400, "val": 100, "size": 96, "seed": 0}


def test_annotations_are_consistent_and_inside_the_picture(folder):
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    ids = [a["id"] for a in content["annotations"]]
    assert len(set(ids)) == len(ids)
    for annotation in content["annotations"]:
        points = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        x, y, width, height = annotation["bbox"]
        assert points.min() >= 0 and points.max() <= 96
        np.testing.assert_allclose(points.min(0), (x, y), atol=0.01)
        np.testing.assert_allclose(points.max(0), (x + width, y + height), atol=0.01)
        assert 5 < width < 55 and 5 < height < 55
        fills = {1: (0.75, 0.95), 2: (0.45, 1), 3: (0.2, 1)}[annotation["category_id"]]
        assert fills[0] < annotation["area"] / (width * height) <= fills[1]
    assert [c["name"] for c in content["categories"]] == list(SHAPES_CLASSES)
    for image in content["images"]:
        assert Image.open(folder / "train" / image["file_name"]).size == (96, 96)


def test_outlines_and_boxes_match_the_pixels(monkeypatch):
    """Drawn once on black and once on white, a picture differs where nothing was drawn."""
    monkeypatch.setattr(shapes, "MIN_CONTRAST", 0)  # or the background would choose the shapes
    y, x = np.mgrid[:96, :96] + 0.5
    centres = np.stack([x.ravel(), y.ravel()], -1)
    single = 0
    for seed in range(60):
        pictures = []
        for level in (0, 255):
            plain = np.full((96, 96, 3), level)
            monkeypatch.setattr(shapes, "background", lambda rng, size, plain=plain: plain)
            picture, drawn = draw_shapes(np.random.default_rng(seed), 96)
            pictures.append(picture.astype(int))
        background = (pictures[1] - pictures[0]).mean(-1) / 255
        assert len(drawn) >= 1
        inside = np.zeros((96, 96), dtype=bool)
        for _, outline in drawn:
            inside |= Polygon(outline).contains_points(centres).reshape(96, 96)
        assert inside[background < 0.1].all()
        assert not inside[background > 0.95].any()
        assert ((background >= 0.1) & (background <= 0.9)).mean() < 0.1
        if len(drawn) == 1:
            single += 1
            rows, columns = np.nonzero(background < 0.9)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            outline = drawn[0][1]
            np.testing.assert_allclose([*outline.min(0), *outline.max(0)], box, atol=2)
    assert single > 5


def test_evaluator_works_from_an_empty_folder_and_gives_the_truth_full_marks(root, monkeypatch):
    monkeypatch.setattr(shapes.SHAPES, "defaults", {**DEFAULTS, "train": 40, "val": 10})
    assert MetadataCatalog.get("shapes_val").thing_classes == list(SHAPES_CLASSES)
    assert not list(root.iterdir())  # registered, but not generated
    evaluator = COCOEvaluator("shapes_val", tasks=("bbox",), distributed=False)
    pictures = DatasetCatalog.get("shapes_val")
    assert len(pictures) == 10 and len(DatasetCatalog.get("shapes_train")) == 40
    evaluator.reset()
    for picture in pictures:
        found = [(a["bbox"], a["category_id"]) for a in picture["annotations"]]
        boxes = [(x, y, x + width, y + height) for (x, y, width, height), _ in found]
        evaluator.process([picture], [detections(picture, boxes, [label for _, label in found])])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_pictures_are_those_of_version_1():
    """A change of any pixel or outline needs another version, as results no longer compare."""
    content = hashlib.sha256()
    for index in range(20):
        picture, drawn = draw_shapes(np.random.Generator(np.random.PCG64([0, 0, index])), 96)
        content.update(picture.tobytes())
        content.update(json.dumps([(c, outline.tolist()) for c, outline in drawn]).encode())
    assert shapes.SHAPES.version == 1 and shapes.SHAPES.defaults == DEFAULTS
    assert content.hexdigest() == "46d613db726a6f9a6fe874da15c1c1634c272b7348dfe24846b65f11a1958979"
