"""Boxes from which nothing can be learned: single ones, and all where they are something else."""

import logging
from collections.abc import Sequence
from math import nan

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from ss_detectron.utils.text import abbreviate

from .records import CocoRecords

# The forms of boxes that are not rotated: whether the second two numbers are a size.
AXES = {BoxMode.XYXY_ABS: False, BoxMode.XYWH_ABS: True}

FEW = 5  # boxes: fewer may look like anything


def check_plausible(where: str, boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """Refuse boxes that are not [x, y, width, height] in pixels, by the look of all of a data set.

    They are fractions if nine of ten are within 0..1, and corners if all but one, and one in a
    hundred, fit into their images as these, and more than a quarter reach beyond by a tenth of its
    size if they are not. They may be percent or thousandths if the farthest end between 70 and 100
    % of 100 or 1000 in both directions, in images of twice that area.

    Args:
        where: what they are of, for the error.
        boxes: (n, 4); those without area are not looked at.
        sizes: (n, 2), width and height of each one's image.

    Returns:
        what is to be said of them and is not certain, or None.

    Raises:
        ValueError: they are fractions or corners, and no fewer than :data:`FEW`.
    """
    some = (boxes[:, 2:] > 0).all(1)
    boxes, sizes = boxes[some], sizes[some]
    if not len(boxes):
        return None
    first, second = boxes[:, :2], boxes[:, 2:]
    seen = None
    within = (abs(boxes) <= 1.05).all(1) & (sizes > 1.05).all(1)  # a little beyond by rounding
    fit = ((second >= first) & (second <= 1.05 * sizes + 1)).all(1)
    beyond = (first + second > 1.1 * sizes).any(1)
    if within.mean() >= 0.9:
        seen = (
            f"{within.sum()} of {len(boxes)} boxes lie within 0..1, such as "
            f"{_show(boxes[np.argmax(within)])}: they look like fractions of their image's width "
            "and height. Multiply them: [x, y, width, height] in pixels are expected. If they are "
            "in pixels, remove them: nothing so small can be detected."
        )
    elif (~fit).sum() <= min(1 + len(fit) // 100, len(fit) // 5) and beyond.mean() > 0.25:
        example = int(np.argmax(beyond & fit))
        seen = (
            f"as [x, y, width, height], {beyond.sum()} of {len(boxes)} boxes reach far beyond "
            f"their image, such as {_show(boxes[example])} of an image of {_show(sizes[example])}: "
            f"they look like corners [left, top, right, bottom], as which {fit.sum()} fit. "
            "Subtract left and top from right and bottom. If they are right as they are, clip them "
            "to their images."
        )
    if len(boxes) < FEW:
        return seen
    if seen:
        raise ValueError(f"{where}: {seen}")
    far = (first + second).max(0)
    for limit, unit in ((100, "percent"), (1000, "thousandths")):
        larger = (sizes > 1.05 * limit).all(1) & (sizes.prod(1) > 2 * limit**2)
        if larger.all() and (far > 0.7 * limit).all() and (far <= limit).all():
            return (
                f"all {len(boxes)} boxes end within 0..{limit}, the farthest at {_show(far)}, in "
                f"images of {_show(sizes.min(0))} and more: are they {unit} of their image's width "
                "and height? [x, y, width, height] in pixels are expected."
            )
    return None


def _warn(message: str) -> None:
    if comm.is_main_process():  # once, though a test set is loaded for every evaluation
        log_first_n(logging.WARNING, message, key="message", name=__name__)


def _show(numbers: np.ndarray) -> str:
    return "[" + ", ".join(f"{number:.6g}" for number in numbers) + "]"


def without_unusable_boxes(
    dicts: Sequence[dict], where: str, *, training: bool = True
) -> Sequence[dict]:
    """Leave out the boxes without area or outside their image; log how many, as ``where`` has them.

    Boxes that reach beyond their image, which Detectron2 clips, are counted too. Those that are not
    four finite numbers are a ValueError, and so are all that :func:`check_plausible` refuses. Where
    it is not for ``training``, nothing is left out, as COCO's evaluation counts all that it finds.
    Crowds, which are not learned from, and rotated boxes are not looked at. A box of negative width
    would be one of positive sides to Detectron2.
    """
    places, boxes, sizes = dicts.boxes() if isinstance(dicts, CocoRecords) else _boxes(dicts)

    def examples(rows: np.ndarray) -> str:
        found = []
        for i, j in places[np.flatnonzero(rows)[:4]]:
            box = dicts[i]["annotations"][j].get("bbox")
            image = dicts[i].get("image_id", dicts[i].get("file_name"))
            found.append(f"{box!r:.60} of image {image!r}")
        return abbreviate(found)

    if (wrong := ~np.isfinite(boxes).all(1)).any():
        message = f"{where}: {wrong.sum()} boxes are not four finite numbers: {examples(wrong)}"
        raise ValueError(f"{message}. Repair or remove them.")
    low, high = boxes[:, :2], boxes[:, 2:]
    if remark := check_plausible(where, np.hstack([low, high - low]), sizes):
        _warn(f"{where}: {remark}")
    flat = _is_empty(low, high)
    outside = ~flat & _is_empty(np.maximum(low, 0), np.minimum(high, sizes))
    # Rounding takes many boxes just over the edge.
    beyond = ~flat & ~outside & ((low < -1) | (high > sizes + 1)).any(1)
    for kind, rows in (
        ("have no area and are left out" * training, flat),  # the evaluator says so of its own
        ("lie outside their image and " + ("are left out" if training else "are missed"), outside),
        ("reach beyond their image by more than a pixel" + " and are clipped" * training, beyond),
    ):
        if kind and rows.any():
            _warn(f"{where}: {rows.sum()} of {len(rows)} boxes {kind}: {examples(rows)}.")
    if not training:
        return dicts
    left_out = places[flat | outside]
    if isinstance(dicts, CocoRecords):
        return dicts.without(left_out)
    unusable = {*map(tuple, left_out.tolist())}
    dicts = list(dicts)
    for i in {i for i, _ in unusable}:
        kept = [a for j, a in enumerate(dicts[i]["annotations"]) if (i, j) not in unusable]
        dicts[i] = {**dicts[i], "annotations": kept}
    return dicts


def _boxes(dicts: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As :meth:`.CocoRecords.boxes`."""
    places, corners, sizes = [], [], []
    for i, image in enumerate(dicts):
        size = image.get("width", np.inf), image.get("height", np.inf)
        for j, annotation in enumerate(image.get("annotations", ())):
            mode = annotation.get("bbox_mode")
            if mode in AXES and not annotation.get("iscrowd", 0):
                places.append((i, j))
                corners.append(_corners(annotation.get("bbox"), mode))
                sizes.append(size)
    return (
        np.reshape(places, (-1, 2)).astype(int),
        np.reshape(corners, (-1, 4)),
        np.reshape(sizes, (-1, 2)),
    )


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
