"""hotcoco in the place of pycocotools: the same figures, wherever both take the input."""

import copy
import importlib.machinery
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from pycocotools import mask as mask_util

from ss_detectron.evaluation import DetectionEvaluator
from ss_detectron.evaluation import coco as evaluation

WIDTH, HEIGHT = 120, 100
NAME = "own_compared"


class Keeping(DetectionEvaluator):
    """Keeps the figures and precisions of the last task."""

    def _derive_coco_results(self, coco_eval, *args, **kwargs):
        self.figures = np.array(coco_eval.stats), np.array(coco_eval.eval["precision"])
        return super()._derive_coco_results(coco_eval, *args, **kwargs)


def random_set(seed: int, task: str, detections: int) -> tuple[dict, list[dict]]:
    """Objects, crowds among them, and detections near them; few coordinates, areas and scores, so
    that thresholds of IoU and area are met exactly and ties are many."""
    generator = np.random.default_rng(seed)
    images, classes = generator.integers(2, 6), generator.integers(1, 4)

    def outline(box: list[int], found: bool) -> dict:
        if task == "keypoints":
            points = generator.integers(0, (WIDTH, HEIGHT, 3), (17, 3))
            return {
                "keypoints": points.ravel().tolist(),
                "num_keypoints": int((points > 0)[:, 2].sum()),
            }
        if task == "bbox":
            return {}
        x, y, w, h = box
        if not found and generator.random() < 0.5:
            return {"segmentation": [[x, y, x + w, y, x + w, y + h], [5.5, 5, 20, 5.25, 20, 30]]}
        mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        rle = mask_util.encode(mask)
        return {"segmentation": {**rle, "counts": rle["counts"].decode()}}

    def box_near(boxes: list[list[int]]) -> list[int]:
        box = generator.integers((0, 0, 10, 10), (60, 50, 60, 50)) // 5 * 5
        if boxes and generator.random() < 0.7:
            box = boxes[generator.integers(len(boxes))] + generator.integers(-3, 4, 4)
        return np.maximum(box, 1).tolist()

    annotations, results = [], []
    for image in range(1, images + 1):
        boxes = [box_near([]) for _ in range(generator.integers(0, 6))]
        for box in boxes:
            area = [box[2] * box[3], 1023.9999, 1024, 9216, 9216.0001][generator.integers(5)]
            ids = {"id": len(annotations) + 1, "image_id": image}
            crowd = int(generator.random() < 0.2 and task != "keypoints")
            annotations.append(
                {**ids, "bbox": box, "area": area, "iscrowd": crowd, **outline(box, False)}
            )
        for _ in range(generator.integers(1, detections)):
            box = box_near(boxes)
            more = {"bbox": box, "score": generator.integers(6) / 6, **outline(box, True)}
            results.append({"image_id": image, **more})
    for entry in annotations:
        entry["category_id"] = int(generator.integers(1, classes + 1))
    for entry in results:
        entry["category_id"] = int(generator.integers(classes))
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT, "license": "by"}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)],
    }
    return content, results


def figures(api: str, content: dict, results: list[dict], folder: Any, task: str, **options: Any):
    img_ids = options.pop("img_ids", None)
    file = folder / "labels.json"
    file.write_text(json.dumps(content))
    ids = {category["id"]: i for i, category in enumerate(content["categories"])}
    names = [category["name"] for category in content["categories"]]
    MetadataCatalog.pop(NAME, None)
    MetadataCatalog.get(NAME).set(
        json_file=str(file), thing_classes=names, thing_dataset_id_to_contiguous_id=ids
    )
    evaluator = Keeping(NAME, (task,), distributed=False, coco_api=api, **options)
    evaluator._predictions = [
        {
            "image_id": image["id"],
            "instances": [copy.deepcopy(r) for r in results if r["image_id"] == image["id"]],
        }
        for image in content["images"]
    ]
    evaluator.evaluate(img_ids)
    MetadataCatalog.pop(NAME)
    return evaluator.figures


def check(content: dict, results: list[dict], folder: Any, task: str = "bbox", **options: Any):
    """That both give the same figures, and which of them the second came from."""
    content, results = json.loads(json.dumps((content, results)))
    expected = figures("pycocotools", content, results, folder, task, **options)
    for one, other in zip(
        expected, figures("hotcoco", content, results, folder, task, **options), strict=True
    ):
        assert len(one) == len(other) and np.allclose(one, other, rtol=0, atol=1e-9, equal_nan=True)


hotcoco = pytest.mark.skipif(evaluation.find_spec("hotcoco") is None, reason="needs hotcoco")


@hotcoco
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("detections", [12, 130])
@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_figures_are_those_of_pycocotools(task, detections, seed, tmp_path, caplog):
    content, results = random_set(seed, task, detections)
    check(content, results, tmp_path, task)
    assert not [r for r in caplog.records if "in place of hotcoco" in r.getMessage()]


def all_of(part: str, **values: Any) -> Callable[[dict, list], None]:
    return lambda content, results: [entry.update(values) for entry in content[part]] and None


def without(key: str) -> Callable[[dict, list], None]:
    return lambda content, results: [a.pop(key) for a in content["annotations"]] and None


def ids_from(first: int, part: str = "annotations") -> Callable[[dict, list], None]:
    def change(content: dict, results: list) -> None:
        for entry in content[part]:
            entry["id"] += first - 1
        if part == "images":
            for entry in content["annotations"] + results:
                entry["image_id"] += first - 1

    return change


def strings(content: dict, results: list) -> None:
    for image in content["images"]:
        image["id"] = str(image["id"])
    for entry in content["annotations"] + results:
        entry["image_id"] = str(entry["image_id"])


def of_no_image(content: dict, results: list) -> None:
    content["annotations"][0]["image_id"] = 99


def shuffled(content: dict, results: list) -> None:
    for part in (content["images"], content["annotations"], results):
        np.random.default_rng(0).shuffle(part)


def half_nan(content: dict, results: list) -> None:
    for result in results[::2]:
        result["bbox"][2] = float("nan")


def nothing(content: dict, results: list) -> None:
    """Leaves all as it is."""


TAKEN = {
    "an annotation of id 0": (ids_from(0), {}),
    "large ids": (ids_from(2**53), {}),
    "ids of images from 0": (ids_from(0, "images"), {}),
    "no area": (without("area"), {}),
    "no iscrowd": (without("iscrowd"), {}),
    "area 0": (all_of("annotations", area=0), {}),
    "crowds alone": (all_of("annotations", iscrowd=1), {}),
    "ignore": (all_of("annotations", ignore=0), {}),
    "keys of other tools": (all_of("annotations", score="high", attributes=[{"a": None}]), {}),
    "an annotation of no image": (of_no_image, {}),
    "another order": (shuffled, {}),
    "some of the images": (nothing, {"img_ids": [2, 1]}),
    "no num_keypoints": (without("num_keypoints"), {"task": "keypoints"}),
}


@hotcoco
@pytest.mark.parametrize("kind", TAKEN)
def test_other_forms_are_taken_or_repaired(kind, tmp_path, caplog):
    change, options = TAKEN[kind]
    for seed in range(2):
        content, results = random_set(seed, options.get("task", "bbox"), 12)
        change(content, results)
        check(content, results, tmp_path, **options)
    assert "in place of hotcoco" not in caplog.text


LEFT = {
    "strings for ids": (strings, {}, "non-negative integer"),
    "negative ids": (ids_from(-9, "images"), {}, "non-negative integer"),
    "a detection that is not finite": (half_nan, {}, "a detection is not finite"),
    "another limit of detections": (nothing, {"max_dets_per_image": 5}, "5 detections per image"),
}


@hotcoco
@pytest.mark.parametrize("kind", LEFT)
def test_what_it_does_not_take_is_pycocotools(kind, tmp_path, caplog):
    change, options, message = LEFT[kind]
    content, results = random_set(0, "bbox", 12)
    change(content, results)
    check(content, results, tmp_path, **options)
    (said,) = [r for r in caplog.records if "in place of hotcoco" in r.getMessage()]
    assert said.levelno == logging.WARNING and message in said.getMessage()


@pytest.mark.parametrize("error", [ImportError("a library is missing"), TypeError("no dict")])
def test_another_hotcoco_ends_no_evaluation(error, monkeypatch, tmp_path, caplog):
    class Broken:
        __spec__ = importlib.machinery.ModuleSpec("hotcoco", None)

        def __getattr__(self, name):
            raise error

    content, results = random_set(0, "bbox", 12)
    monkeypatch.setitem(sys.modules, "hotcoco", Broken())
    check(content, results, tmp_path)
    assert f"pycocotools evaluates in place of hotcoco: {error}." in caplog.text


def test_which_is_used(monkeypatch, tmp_path, caplog):
    content, results = random_set(0, "bbox", 12)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    figures("fastest", content, results, tmp_path, "bbox")
    assert "hotcoco" not in caplog.text
    with pytest.raises(ImportError, match="TEST.COCO_API is 'hotcoco', .* `pip install hotcoco`"):
        figures("hotcoco", content, results, tmp_path, "bbox")


@hotcoco
def test_detectron2s_own_evaluator_is_as_before(tmp_path, caplog):
    content, results = random_set(0, "bbox", 12)
    caplog.set_level(logging.INFO)
    stock = evaluation.coco_evaluation._evaluate_predictions_on_coco
    figures("fastest", content, results, tmp_path, "bbox")
    assert "The figures are those of hotcoco" in caplog.text
    assert evaluation.coco_evaluation._evaluate_predictions_on_coco is stock
