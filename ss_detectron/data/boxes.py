"""The boxes of Detectron2's dataset dicts: which of them nothing can be learned from."""

import logging
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils import comm

from .catalog import shorten

__all__ = ["without_unusable_boxes"]

logger = logging.getLogger(__name__)

AXES = {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}
"""The forms of boxes that are not rotated."""

EMPTY = 1e-5
"""Sides of up to this many pixels are none to Detectron2 (filter_empty_instances)."""

Place = tuple[int, int]
"""Index of an image, and of an annotation in it. (Detectron2 does not keep the ids of these.)"""


def without_unusable_boxes(dicts: list[dict], where: str) -> list[dict]:
    """Leave out the boxes without area, and those outside their image.

    A mirrored or turned box of negative width or height would be one of positive sides to
    Detectron2. How many there are is logged, and how many reach beyond their image, which
    Detectron2 clips. Crowds, which are not learned from, and rotated boxes are not looked at.

    Args:
        dicts: Detectron2's dataset dicts, which are not changed.
        where: the data set, for messages.

    Returns:
        the dataset dicts, the same list where every box can be used.

    Raises:
        ValueError: boxes that are not four finite numbers.
    """
    places = [
        (i, j)
        for i, image in enumerate(dicts)
        for j, annotation in enumerate(image["annotations"])
        if not annotation.get("iscrowd", 0) and annotation.get("bbox_mode") in AXES
    ]
    if not places:
        return dicts
    boxes = _corners(dicts, places, where)
    sizes = [(image.get("width", np.inf), image.get("height", np.inf)) for image in dicts]
    sizes = np.array(sizes, dtype=float)[[i for i, _ in places]]
    low, high = boxes[:, :2], boxes[:, 2:]
    flat = _is_empty(low, high)
    outside = ~flat & _is_empty(np.maximum(low, 0), np.minimum(high, sizes))
    # Rounding takes many boxes just over the edge.
    beyond = ~flat & ~outside & ((low < -1) | (high > sizes + 1)).any(1)
    for kind, rows in (
        ("have no area and are left out", flat),
        ("lie outside their image and are left out", outside),
        ("reach beyond their image by more than a pixel and are clipped", beyond),
    ):
        if rows.any() and comm.is_main_process():
            examples = _examples(dicts, places, rows)
            logger.warning("%s: %d boxes %s: %s.", where, rows.sum(), kind, examples)
    unusable = {places[row] for row in np.flatnonzero(flat | outside)}
    return _without(dicts, unusable) if unusable else dicts


def _is_empty(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(N,) whether Detectron2 drops such boxes, given by two corners of (N, 2)."""
    low, high = low.astype(np.float32), high.astype(np.float32)
    return (high - low <= EMPTY).any(1)


def _corners(dicts: list[dict], places: list[Place], where: str) -> np.ndarray:
    """The boxes of some annotations as (N, 4) floats: left, top, right, bottom."""
    annotations = [dicts[i]["annotations"][j] for i, j in places]
    rows = [annotation.get("bbox") for annotation in annotations]
    boxes = _numbers(rows)
    if boxes is None or boxes.shape != (len(rows), 4) or not np.isfinite(boxes).all():
        wrong = np.array([not _is_box(row) for row in rows])
        raise ValueError(
            f"{where}: {wrong.sum()} boxes are not four finite numbers: "
            f"{_examples(dicts, places, wrong)}. Repair or remove them."
        )
    sized = np.array([a["bbox_mode"] == BoxMode.XYWH_ABS for a in annotations])
    boxes[sized, 2:] += boxes[sized, :2]
    return boxes


def _numbers(values: Any) -> np.ndarray | None:
    """Floats, or None of what is not numbers."""
    try:
        array = np.array(values)
    except ValueError:  # rows of different lengths
        return None
    return array.astype(float) if array.dtype.kind in "iuf" else None


def _is_box(value: Any) -> bool:
    row = _numbers(value)
    return row is not None and row.shape == (4,) and bool(np.isfinite(row).all())


def _examples(dicts: list[dict], places: list[Place], rows: np.ndarray) -> str:
    found = []
    for i, j in (places[row] for row in np.flatnonzero(rows)[:4]):
        image = dicts[i]
        name = repr(image["image_id"]) if "image_id" in image else f"'{image['file_name']}'"
        found.append(f"{image['annotations'][j].get('bbox')!r:.60} of image {name}")
    return shorten(found, 3)


def _without(dicts: list[dict], unusable: set[Place]) -> list[dict]:
    dicts = list(dicts)
    for i in {i for i, _ in unusable}:
        annotations = enumerate(dicts[i]["annotations"])
        kept = [annotation for j, annotation in annotations if (i, j) not in unusable]
        dicts[i] = {**dicts[i], "annotations": kept}
    return dicts
