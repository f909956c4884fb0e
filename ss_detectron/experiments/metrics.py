"""Detectron2's metrics.json: its rows, and what its keys mean."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

__all__ = [
    "ERRORS",
    "SCORES",
    "label_of",
    "losses_of",
    "main_metric",
    "matching",
    "read_metrics",
]

logger = logging.getLogger(__name__)

# What an evaluation gives, with the labels of its axes. With several test sets, a set's name and a
# slash stand before the key.
ERRORS = {
    "classification/top1_error": "top-1 error, %",
    "classification/top5_error": "top-5 error, %",
}
SCORES = {"bbox/AP": "box AP, %", "segm/AP": "mask AP, %", "keypoints/AP": "keypoint AP, %"}
_LABELS = {
    **ERRORS,
    **SCORES,
    "bbox/AP50": "box AP at IoU 0.5, %",
    "bbox/AP75": "box AP at IoU 0.75, %",
    "train_top1_error": "training top-1 error, %",
    "total_loss": "total training loss",
    "loss_cls": "training loss, classes",
    "loss_box_reg": "training loss, boxes",
    "alignment/gradient_angle": "gradient angle to BP, °",
    "time": "time per step, s",
    "lr": "learning rate",
}


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """
    The rows of a Detectron2 metrics.json, one dict per iteration, in the order of the iterations.

    A line that was cut off, because the run was killed while writing, is reported and left out; a
    row that a resumed run wrote right behind it is not. Rows that a resumed run wrote again count
    once, as it wrote them last.

    Raises:
        FileNotFoundError: there is no such file.
    """
    rows: dict[float, dict[str, float]] = defaultdict(dict)
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
        row = _parse(line)
        if row is None:
            _say_incomplete(str(path), number)
            # Rows are flat, so the last brace opens what follows on the piece.
            row = _parse(line[line.rfind("{") :])
        if row is not None:
            rows[row["iteration"]] |= row
    return [rows[iteration] for iteration in sorted(rows)]


@cache
def _say_incomplete(path: str, number: int) -> None:
    """Once, however often the file is read."""
    logger.warning("%s, line %d is not complete and is left out", path, number)


def _parse(line: str) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "iteration" in row else None


def label_of(key: str) -> str:
    """The label of a metric's axis, with its unit; of a metric not known here, its key."""
    if key in _LABELS:
        return _LABELS[key]
    dataset, _, base = key.partition("/")
    return f"{_LABELS[base]} ({dataset})" if base in _LABELS else key


def matching(keys: Iterable[str], bases: Iterable[str]) -> list[str]:
    """Those of ``keys`` that are one of ``bases``, with or without the name of a test set."""
    keys = list(keys)
    return [key for base in bases for key in keys if key == base or key.endswith("/" + base)]


def losses_of(keys: Sequence[str]) -> list[str]:
    """The total loss, its parts where there are several, and the training error."""
    parts = [key for key in keys if key.startswith("loss")]
    total = [key for key in ("total_loss",) if key in keys]
    if total and len(parts) == 1:  # which is the total
        parts = []
    return [*total, *parts, *(key for key in ("train_top1_error",) if key in keys)]


def main_metric(keys: Sequence[str], dataset: str = "") -> str | None:
    """
    The metric that a comparison goes by: top-1 error or AP, of ``dataset`` where it has its own.
    None if there is none.
    """
    found = matching(keys, ["classification/top1_error", *SCORES])
    return next((key for key in found if key.startswith(f"{dataset}/")), None) or next(
        iter(found), None
    )
