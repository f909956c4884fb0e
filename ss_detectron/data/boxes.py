"""Boxes from which nothing can be learned: single ones, and all where they are something else."""

import logging
from math import nan

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ss_detectron.utils.text import abbreviate

logger = logging.getLogger(__name__)

# The forms of boxes that are not rotated: whether the second two numbers are a size.
AXES = {BoxMode.XYXY_ABS: False, BoxMode.XYWH_ABS: True}


def check_plausible(where: str, boxes: np.ndarray, sizes: np.ndarray) -> None:
    """Refuse boxes that are not [x, y, width, height] in pixels, by the look of all of a data set.

    Args:
        where: what they are of, for the error.
        boxes: (n, 4); those without area are not looked at.
        sizes: (n, 2), width and height of each one's image.

    Raises:
        ValueError: all are within 0..1, or they are corners: all fit into their images as these,
            and more than a quarter reach beyond by a tenth of its size if they are not.
    """
    some = (boxes[:, 2:] > 0).all(1)
    boxes, sizes = boxes[some], sizes[some]
    if not len(boxes):
        return
    first, second = boxes[:, :2], boxes[:, 2:]
    if (abs(boxes) <= 1).all() and (sizes > 1).all():
        raise ValueError(
            f"{where}: all {len(boxes)} boxes lie within 0..1, such as {_show(boxes[0])}: they are "
            "fractions of their image's width and height. Multiply them: [x, y, width, height] in "
            "pixels are expected."
        )
    fit = ((second > first) & (second <= sizes + 1)).all(1)
    beyond = (first + second > 1.1 * sizes).any(1)
    if fit.mean() > 0.99 and beyond.mean() > 0.25:
        example = int(np.argmax(beyond))
        raise ValueError(
            f"{where}: as [x, y, width, height], {beyond.sum()} of {len(boxes)} boxes reach far "
            f"beyond their image, such as {_show(boxes[example])} of an image of "
            f"{_show(sizes[example])}: they are corners [left, top, right, bottom], as which all "
            "fit. Subtract left and top from right and bottom."
        )


def _show(numbers: np.ndarray) -> str:
    return "[" + ", ".join(f"{number:.6g}" for number in numbers) + "]"


def without_unusable_boxes(dicts: list[dict], where: str) -> list[dict]:
    """Leave out the boxes without area or outside their image; log how many, as ``where`` has them.

    Boxes that reach beyond their image, which Detectron2 clips, are counted too. Those that are not
    four finite numbers are a ValueError, and so are all that :func:`check_plausible` refuses.
    Crowds, which are not learned from, and rotated boxes are not looked at. A box of negative width
    would be one of positive sides to Detectron2.
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
    check_plausible(where, np.hstack([low, high - low]), sizes)
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
