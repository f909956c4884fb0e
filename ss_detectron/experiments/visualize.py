"""Boxes on pictures: Detectron2's visualizer with one look per class, and a run's detections."""

from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import tensor

from .styles import COLOURS


class ClassVisualizer(Visualizer):
    """
    Detectron2's, with a colour for each class, and opaque boxes: half transparent, they are lost on
    a dark picture.

    Args:
        image: (H, W, 3) uint8 RGB.
        classes: their names.
        scale: of the drawing.
    """

    def __init__(self, image: np.ndarray, classes: list[str], scale: float = 1.0) -> None:
        colours = [255 * np.array(to_rgb(COLOURS[i % len(COLOURS)])) for i in range(len(classes))]
        metadata = Metadata(thing_classes=classes, thing_colors=colours)
        super().__init__(image, metadata, scale, ColorMode.SEGMENTATION)

    def _jitter(self, color):
        return color

    def draw_box(self, box_coord, alpha=1.0, edge_color="g", line_style="-"):
        return super().draw_box(box_coord, alpha, edge_color, line_style)


def draw_detections(
    dataset_name: str,
    results: list[dict[str, Any]],
    *,
    count: int = 6,
    score_threshold: float = 0.4,
    title: str = "",
) -> Figure:
    """
    Draws a data set's first images twice: above with the true boxes, below with the predicted ones.

    Args:
        dataset_name: a registered data set with boxes.
        results: detections in COCO's result format (``coco_instances_results.json``).
        count: number of images.
        score_threshold: detections below it are not drawn.
        title: above the figure.

    Raises:
        ValueError: a detection is in an image that the data set does not have.
    """
    records = DatasetCatalog.get(dataset_name)
    known = {record["image_id"] for record in records}
    if strange := {result["image_id"] for result in results} - known:
        raise ValueError(
            f"the detections are of another data set than {dataset_name!r}, which has no image of "
            f"id {min(strange, key=str)}"
        )
    records = records[:count]
    metadata = MetadataCatalog.get(dataset_name)
    to_class = metadata.get("thing_dataset_id_to_contiguous_id", {})
    figure = Figure(figsize=(2.2 * len(records), 4.9), layout="constrained")
    rows = figure.subplots(2, len(records), squeeze=False)
    for record, above, below in zip(records, *rows, strict=True):
        image = read_image(record["file_name"], format="RGB")
        scale = max(1, 400 / max(image.shape[:2]))
        found = [
            {**result, "bbox_mode": BoxMode.XYWH_ABS}
            | {"category_id": to_class.get(result["category_id"], result["category_id"])}
            for result in results
            if result["image_id"] == record["image_id"] and result["score"] >= score_threshold
        ]
        for axes, objects in ((above, record["annotations"]), (below, found)):
            instances = Instances(image.shape[:2])
            boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
            instances.pred_boxes = Boxes(boxes)
            instances.pred_classes = tensor([o["category_id"] for o in objects])
            if objects is found:
                instances.scores = tensor([o["score"] for o in objects])
            drawing = ClassVisualizer(image, metadata.thing_classes, scale)
            axes.imshow(drawing.draw_instance_predictions(instances).get_image())
            axes.set(xticks=[], yticks=[])
    rows[0][0].set_ylabel("ground truth")
    rows[1][0].set_ylabel(f"predicted, score over {score_threshold:g}")
    figure.suptitle(title)
    return figure
