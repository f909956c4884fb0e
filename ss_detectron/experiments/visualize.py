"""Pictures of what a detector sees: its detections beside the ground truth."""

from collections import defaultdict
from typing import Any

import matplotlib
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .styles import COLOURS

__all__ = ["draw_detections"]


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
