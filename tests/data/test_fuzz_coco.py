"""Random damage to COCO data sets: an error that says where, or the right boxes, never else."""

import contextlib
import copy
import io
import json
import logging
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_utils import coco_config, detections
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_utils import image_config
from PIL import Image
from time_limit import within

import ss_detectron
from ss_detectron.data import (
    ClassificationMapper,
    DetectionMapper,
    UnreadableImageError,
    check_datasets,
    register_coco_from_config,
)
from ss_detectron.engine import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of damage

PACKAGE = str(Path(ss_detectron.__file__).parent)
NAME = "own_fuzzed"
SIZES = {1: (40, 30), 2: (30, 40), 3: (33, 33)}
"""Width and height of the images by their ids."""
SECONDS = 120  # what has not ended by then, hangs

quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
thorough = settings(quick, max_examples=3000, derandomize=False, print_blob=True)


def valid_content() -> dict:
    """Images with boxes, polygons, a crowd in RLE, keypoints, and one without objects."""
    polygon = [[4, 5, 20, 5, 20, 25]]
    rle = {"size": [40, 30], "counts": [0, 1200]}
    return {
        "info": {"year": 2024},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": width, "height": height}
            for i, (width, height) in SIZES.items()
        ],
        "annotations": [
            _object(1, 1, 2, [4, 5, 16, 20], segmentation=polygon, iscrowd=0, area=160),
            _object(2, 1, 7, [1.5, 2.5, 10, 10], segmentation=polygon, keypoints=[5, 5, 2]),
            _object(3, 2, 2, [0, 0, 30, 40], segmentation=polygon, area=1200.0),
            _object(4, 2, 2, [0, 0, 30, 40], segmentation=rle, iscrowd=1, area=1200),
        ],
        "categories": [{"id": 2, "name": "kite"}, {"id": 7, "name": "balloon"}],
    }


def _object(id: int, image: int, category: int, box: list, **more: Any) -> dict:
    return {"id": id, "image_id": image, "category_id": category, "bbox": box, **more}


# Damage ------------------------------------------------------------------------------------------

ODD = [
    *(None, True, False, 0, 1, 2, 7, -1, 3.0, -2.5, 30, 40, 1000, 1e-9, 1e300, -1e300),
    *(2**40, 2**70, 10**400, math.nan, math.inf, -math.inf),
    *("", "1", "2.png", "..", "\x00", "Käse 猫", "x" * 5000),
    *([], {}, [[]], [[1, 2]], [[1, 2, "a", 4, 5, 6]], [1, 2, 3, 4]),
    *([9, 9, 0, 0], [-5, -5, 100, 100], [50, 50, 5, 5], [9, 9, -5, -5]),
    *({"size": [40, 30], "counts": "zzzzabc"}, {"size": [30, 40], "counts": [1200]}),
]


def _places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths to all values in a tree of lists and dicts, but for its root."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _places(value, (*path, key))


def _at(content: Any, path: tuple) -> Any:
    for key in path:
        content = content[key]
    return content


@st.composite
def damaged_contents(draw: st.DrawFn) -> Any:
    """The valid content with up to four other boxes, and up to three changes anywhere in it."""
    content = valid_content()
    for annotation in content["annotations"]:
        if draw(st.booleans()):
            annotation["bbox"] = draw(
                st.lists(st.floats(-60, 90, width=16), min_size=4, max_size=4)
            )
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(content))
        if not places:
            break
        path = draw(st.sampled_from(places))
        parent, key = _at(content, path[:-1]), path[-1]
        kind = draw(st.sampled_from(["replace", "remove", "repeat", "exchange"]))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif kind == "remove":
            del parent[key]
        elif kind == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            other = draw(st.sampled_from(keys))
            parent[key], parent[other] = parent[other], parent[key]
    return content


# What has to come of it --------------------------------------------------------------------------


def _expected(content: dict) -> dict[Any, list]:
    """By image, the classes and boxes to be trained on, worked out from the content alone."""
    classes = {
        c["id"]: i for i, c in enumerate(sorted(content["categories"], key=lambda c: c["id"]))
    }
    expected = {image["id"]: [] for image in content["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for annotation in content["annotations"]:
        polygons = annotation.get("segmentation")
        if annotation["image_id"] not in expected or annotation.get("iscrowd"):
            continue
        polygons = polygons if isinstance(polygons, list) else []
        if polygons and not any(len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
            continue
        x, y, w, h = annotation["bbox"]
        width, height = sizes[annotation["image_id"]]
        box = np.float32([max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)])
        if w > 0 and h > 0 and (box[2:] - box[:2] > 1e-5).all():
            label = classes[annotation["category_id"]]
            expected[annotation["image_id"]].append((label, tuple(box.tolist())))
    return {image: sorted(found) for image, found in expected.items()}


def _config(folder: Path, unreadable: str, masks: str | None) -> CfgNode:
    options = ["DATALOADER.UNREADABLE_IMAGES", unreadable, "SOLVER.IMS_PER_BATCH", 1]
    if masks:
        options += ["MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", masks]
    entry = [NAME, str(folder / "labels.json"), str(folder / "images")]
    output = ["OUTPUT_DIR", str(folder / "output")]
    return coco_config(*options, *output, entries=[entry], train=(NAME,), test=(NAME,))


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def use(folder: Path, cfg: CfgNode) -> Exception | None:
    """Trains on and evaluates a data set, or gets an error of ours that names it or its file."""
    try:
        with within(SECONDS), _quiet():
            register_coco_from_config(cfg)
            check_datasets(cfg)
            content = json.loads((folder / "labels.json").read_bytes())
            expected = _expected(content)
            _train(cfg, expected)
            _evaluate(cfg, expected)
            return None
    except (ValueError, FileNotFoundError, UnreadableImageError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        assert raised_in.startswith(PACKAGE), f"not ours: {error!r}"
        assert NAME in str(error) or str(folder) in str(error), f"does not say where: {error!r}"
        return error
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.pop(NAME, None)


def _train(cfg: CfgNode, expected: dict[Any, list]) -> None:
    for (image,) in islice(Trainer.build_train_loader(cfg), 2 * len(expected)):
        instances = image["instances"]
        pairs = zip(instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist(), strict=True)
        found = sorted((label, tuple(box)) for label, box in pairs)
        wanted = expected[image["image_id"]]
        # With masks, objects of empty ones are left out as well, and boxes may be another's.
        assert wanted and (found == wanted or cfg.MODEL.MASK_ON and set(found) <= set(wanted))


def _evaluate(cfg: CfgNode, expected: dict[Any, list]) -> None:
    def oracle(images: list[dict]) -> list[dict]:
        objects = [expected[image["image_id"]] for image in images]
        return [
            detections(image, [box for _, box in found], [label for label, _ in found])
            for image, found in zip(images, objects, strict=True)
        ]

    loader = Trainer.build_test_loader(cfg, NAME)
    evaluator = Trainer.build_evaluator(cfg, NAME)
    results = inference_on_dataset(oracle, loader, evaluator)
    ap = results["bbox"]["AP"] if results else math.nan
    assert math.isnan(ap) or 0 <= ap <= 100.0001


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The images of the valid content."""
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "images").mkdir()
    for i, size in SIZES.items():
        Image.new("RGB", size, (60 * i, 9, 9)).save(folder / "images" / f"{i}.png")
    return folder


def _damaged_content(folder, content, unreadable, masks):
    (folder / "labels.json").write_text(json.dumps(content))
    use(folder, _config(folder, unreadable, masks))


@pytest.mark.parametrize("masks", [None, "polygon", "bitmask"])
def test_valid_content_is_used(folder, masks):
    """So that the others do not just see one error after the other."""
    (folder / "labels.json").write_text(json.dumps(valid_content()))
    assert [len(found) for found in _expected(valid_content()).values()] == [2, 1, 0]
    assert use(folder, _config(folder, "error", masks)) is None


contents = given(
    content=damaged_contents(),
    unreadable=st.sampled_from(["error", "skip"]),
    masks=st.sampled_from([None, None, "polygon", "bitmask"]),
)
test_damaged_content = quick(contents(_damaged_content))
test_damaged_content_thoroughly = pytest.mark.slow(thorough(contents(_damaged_content)))


# Images ------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
FORMS = ["png", "jpeg", "bmp", "tiff", "gif", "webp"]


def _damaged_image(folder: Path, form: str, start: int, length: int, other: bytes) -> None:
    """Mappers give an image of the right size, of a PNG the right one, or an error naming it."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, form)
    content = buffer.getvalue()
    start = start * len(content) // 1000
    content = content[:start] + other + (content[start + length :] if length < 9 else b"")
    file = folder / "damaged image"
    file.write_bytes(content)
    record = {"file_name": str(file), "width": 32, "height": 24, "label": 0}
    for mapper, size in _mappers():
        with within(SECONDS), _quiet():
            try:
                image = mapper(record)["image"]
            except UnreadableImageError as error:
                assert "damaged image' cannot be " in str(error)
                continue
        assert image.shape == (3, *size)
        if form == "png" and size == (24, 32):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), PIXELS)


@cache
def _mappers() -> list[tuple[Any, tuple[int, int]]]:
    cfg = image_config(TRANSFORM="resize", SIZE=8)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (0,), "none"
    return [(DetectionMapper(cfg, True), (24, 32)), (ClassificationMapper(cfg, True), (8, 8))]


images = given(
    form=st.sampled_from(FORMS),
    start=st.integers(0, 999),
    length=st.integers(0, 9),
    other=st.binary(max_size=8),
)
test_damaged_image = quick(images(_damaged_image))
test_damaged_image_thoroughly = pytest.mark.slow(thorough(images(_damaged_image)))
