"""What the tests of data sets in COCO's form share: one to write and to spoil, and its config."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from image_utils import image_config
from PIL import Image

SKY = ["own_sky", "sky/labels.json", "sky/images"]
WIDTH, HEIGHT = 64, 48
BOXES = {i: [(4.0, 8.0, 24.0, 18.0 + i)] for i in range(4)}
"""Of the images: left, top, right, bottom."""


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_coco(
    spoil: Callable[[dict], Any] = lambda content: None,
    folder: str | Path = "sky",
    classes: tuple[str, ...] = ("kite", "balloon"),
) -> None:
    """``labels.json`` and ``images``, one object in each of four images, then spoiled.

    Where ``spoil`` returns bytes, these are the annotation file.
    """
    Path(folder, "images").mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    for i, [(x, y, right, bottom)] in BOXES.items():
        picture().save(Path(folder, "images", f"{i}.jpg"))
        image = {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH}
        content["images"].append(image)
        box = [x, y, right - x, bottom - y]
        ids = {"id": i + 1, "image_id": i, "category_id": i % len(classes) + 1}
        content["annotations"].append({**ids, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    text = spoil(content)
    if not isinstance(text, bytes):
        text = json.dumps(content).encode()
    Path(folder, "labels.json").write_bytes(text)


def coco_config(
    *options: Any, entries: Any = (SKY,), train: Any = ("own_sky",), test: Any = ("own_sky",)
) -> CfgNode:
    """A config of a RetinaNet of two classes and of images as they are, with keys and values."""
    cfg = image_config(train=train, test=test)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.DATASETS.COCO_INSTANCES = list(entries)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN = cfg.INPUT.MIN_SIZE_TEST = (0,)  # not resized
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SEED = 3
    cfg.merge_from_list(list(options))
    return cfg


def detections(image: dict, boxes: Any, classes: Any, **more: Any) -> dict[str, Instances]:
    """What a detector would give of an image if it were sure of these objects."""
    return {
        "instances": Instances(
            (image["height"], image["width"]),
            pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
            scores=torch.ones(len(boxes)),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
            **more,
        )
    }
