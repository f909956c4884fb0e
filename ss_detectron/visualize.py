"""Pictures of a training run: its detections beside the ground truth, and its curves."""

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_detections", "plot_training", "read_metrics"]

logger = logging.getLogger(__name__)

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """
    The rows of a Detectron2 metrics.json, one dict per line, in the order of their iterations.

    A line that was cut off, because the run was killed while writing, is reported and left out.
    Rows that a resumed run wrote again count once, as it wrote them last.

    Raises:
        FileNotFoundError: there is no such file.
    """
    rows: dict[float, dict[str, float]] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s, line %d is not complete and is left out", path, number)
            continue
        rows[row["iteration"]] = {**rows.get(row["iteration"], {}), **row}
    return [rows[iteration] for iteration in sorted(rows)]


def plot_training(metrics: list[dict[str, float]], title: str = "") -> Figure:
    """
    The losses against the iteration and, where there was an evaluation, box AP beside them.

    Args:
        metrics: rows of :func:`read_metrics`.
        title: above the figure.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2, sharex=True)
    names = ("total_loss", *sorted({k for row in metrics for k in row if k.startswith("loss_")}))
    for name, colour in zip(names, COLOURS, strict=False):
        points = [(row["iteration"], row[name]) for row in metrics if name in row]
        losses.plot(*zip(*points, strict=True), color=colour, label=name)
    losses.set(xlabel="iteration", ylabel="training loss", yscale="log")
    losses.legend()
    keys = sorted({k for row in metrics for k in row if k.endswith(("bbox/AP", "bbox/AP50"))})
    for key, colour in zip(keys, COLOURS, strict=False):
        points = [(row["iteration"], row[key]) for row in metrics if key in row]
        scores.plot(*zip(*points, strict=True), marker="o", color=colour, label=key)
    scores.set(xlabel="iteration", ylabel="AP, %", ylim=(0, 100))
    if keys:
        scores.legend()
    else:
        scores.text(0.5, 0.5, "not evaluated", ha="center", transform=scores.transAxes)
    figure.suptitle(title)
    return figure


def draw_detections(
    dataset_name: str,
    results: list[dict[str, Any]],
    *,
    count: int = 6,
    score_threshold: float = 0.4,
    title: str = "",
) -> Figure:
    """
    A data set's first images twice: above with the true boxes, below with the predicted ones.

    Args:
        dataset_name: a registered data set with boxes.
        results: detections in COCO's result format (``inference/coco_instances_results.json``).
        count: number of images.
        score_threshold: detections below it are not drawn.
        title: above the figure.
    """
    metadata = MetadataCatalog.get(dataset_name)
    records = DatasetCatalog.get(dataset_name)[:count]
    to_class = getattr(metadata, "thing_dataset_id_to_contiguous_id", None)
    by_image = defaultdict(list)
    for result in results:
        if result["score"] >= score_threshold:
            by_image[result["image_id"]].append(result)

    figure = Figure(figsize=(2.2 * len(records), 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, len(records), squeeze=False)
    for record, above, below in zip(records, *rows, strict=True):
        truth = [
            (_xyxy(a["bbox"], a["bbox_mode"]), a["category_id"], "") for a in record["annotations"]
        ]
        found = [
            (
                _xyxy(r["bbox"], BoxMode.XYWH_ABS),
                to_class[r["category_id"]] if to_class else r["category_id"],
                f" {r['score']:.0%}",
            )
            for r in by_image[record["image_id"]]
        ]
        image = read_image(record["file_name"], format="RGB")
        above.imshow(_draw(image, truth, metadata.thing_classes))
        below.imshow(_draw(image, found, metadata.thing_classes))
        for axes in (above, below):
            axes.set(xticks=[], yticks=[])
    rows[0][0].set_ylabel("ground truth")
    rows[1][0].set_ylabel(f"predicted, score over {score_threshold:g}")
    figure.suptitle(title)
    return figure


def _xyxy(box: list[float], mode: BoxMode) -> list[float]:
    return BoxMode.convert(box, mode, BoxMode.XYXY_ABS)


def _draw(image: np.ndarray, boxes: list[tuple], classes: list[str]) -> np.ndarray:
    """The image, enlarged to about 400 pixels, with boxes [(xyxy, class, text), ...]."""
    drawing = Visualizer(image, scale=max(1, 400 / max(image.shape[:2])))
    colours = [matplotlib.colors.to_rgb(COLOURS[c % len(COLOURS)]) for _, c, _ in boxes]
    if boxes:
        drawing.overlay_instances(
            boxes=np.array([box for box, _, _ in boxes]),
            labels=[classes[c] + text for _, c, text in boxes],
            assigned_colors=colours,
        )
    return drawing.output.get_image()
