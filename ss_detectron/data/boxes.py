"""The boxes of Detectron2's dataset dicts: which of them nothing can be learned from."""

import logging
from math import nan

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ss_detectron.utils.text import abbreviate

logger = logging.getLogger(__name__)

# The forms of boxes that are not rotated: whether the second two numbers are a size.
AXES = {BoxMode.XYXY_ABS: False, BoxMode.XYWH_ABS: True}


def without_unusable_boxes(dicts: list[dict], where: str) -> list[dict]:
    """Leave out the boxes without area or outside their image; log how many, as ``where`` has them.

    Boxes that reach beyond their image, which Detectron2 clips, are counted too. Those that are not
    four finite numbers are a ValueError. Crowds, which are not learned from, and rotated boxes are
    not looked at. A box of negative width would be one of positive sides to Detectron2.
    """
    places, corners, sizes = [], [], []
    for i, image in enumerate(dicts):
        size = image.get("width", np.inf), image.get("height", np.inf)
        for j, annotation in enumerate(image["annotations"]):
            mode = annotation.get("bbox_mode")
            if mode in AXES and not annotation.get("iscrowd", 0):
                places.append((i, j))
                corners.append(_corners(annotation.get("bbox"), mode))
                sizes.append(size)

    def examples(rows: np.ndarray) -> str:
        found = []
        for i, j in (places[row] for row in np.flatnonzero(rows)[:4]):
            box = dicts[i]["annotations"][j].get("bbox")
            image = dicts[i].get("image_id", dicts[i].get("file_name"))
            found.append(f"{box!r:.60} of image {image!r}")
        return abbreviate(found)

    boxes, sizes = np.reshape(corners, (-1, 4)), np.reshape(sizes, (-1, 2))
    if (wrong := ~np.isfinite(boxes).all(1)).any():
        message = f"{where}: {wrong.sum()} boxes are not four finite numbers: {examples(wrong)}"
        raise ValueError(f"{message}. Repair or remove them.")
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
            logger.warning("%s: %d boxes %s: %s.", where, rows.sum(), kind, examples(rows))
    unusable = {places[row] for row in np.flatnonzero(flat | outside)}
    dicts = list(dicts)
    for i in {i for i, _ in unusable}:
        kept = [a for j, a in enumerate(dicts[i]["annotations"]) if (i, j) not in unusable]
        dicts[i] = {**dicts[i], "annotations": kept}
    return dicts


def _corners(box: list, mode: BoxMode) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = map(float, box)
    except (TypeError, ValueError):
        return nan, nan, nan, nan
    if AXES[mode]:
        right, bottom = left + right, top + bottom
    return left, top, right, bottom


def _is_empty(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    # As Detectron2 does, which drops such boxes (filter_empty_instances).
    return (high.astype(np.float32) - low.astype(np.float32) <= 1e-5).any(1)
