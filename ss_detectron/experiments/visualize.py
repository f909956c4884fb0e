"""Boxes on pictures: Detectron2's visualizer with one look per class, and a run's detections."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_ioa
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, tensor

from .styles import COLOURS

# The longer side of a picture, in pixels, at least and at most.
MIN_SIDE, MAX_SIDE = 400, 1000
WIDTH = 3.0  # of a picture in a figure, on average, in inches


class ClassVisualizer(Visualizer):
    """
    Detectron2's, with a colour for each class, opaque boxes (half transparent, they are lost on a
    dark picture), and lines and labels that follow the sizes of box and picture. A label stands
    where it hides as little as can be of boxes and other labels: mostly within a large box, and
    beside a small one.

    Args:
        image: (H, W, 3) uint8 RGB.
        classes: their names.
    """

    def __init__(self, image: np.ndarray, classes: Sequence[str]) -> None:
        colours = [255 * np.array(to_rgb(COLOURS[i % len(COLOURS)])) for i in range(len(classes))]
        metadata = Metadata(thing_classes=classes, thing_colors=colours)
        super().__init__(image, metadata, instance_mode=ColorMode.SEGMENTATION)
        self.side = float(np.sqrt(self.output.width * self.output.height))
        self.points = 72 / self.output.dpi  # of a pixel

    def _jitter(self, color):
        return color

    def draw_box(self, box_coord, alpha=1.0, edge_color="g", line_style="-"):
        output = super().draw_box(box_coord, alpha, edge_color, line_style)
        width = np.clip(_side(box_coord) / 30, 1, max(1, self.side / 200))
        output.ax.patches[-1].set_linewidth(width * self.points)
        return output

    def overlay_instances(self, *, boxes=None, labels=None, assigned_colors=None, **options):
        options |= {"boxes": boxes, "assigned_colors": assigned_colors}
        corners = None if boxes is None else self._convert_boxes(boxes)
        if labels is None or assigned_colors is None or corners is None or corners.shape[1] != 4:
            return super().overlay_instances(labels=labels, **options)
        super().overlay_instances(**options)
        taken = torch.as_tensor(corners, dtype=torch.float32).reshape(-1, 4)
        for i in sorted(range(len(labels)), key=lambda i: _side(corners[i])):
            place = self._write(labels[i], corners[i], assigned_colors[i], taken)
            taken = torch.cat([taken, place])
        return self.output

    def _write(self, label: str, box: np.ndarray, colour: tuple, taken: Tensor) -> Tensor:
        """Writes a box's label where it covers the least of what is ``taken``; (1, 4), where."""
        size = np.clip(_side(box) / 8, max(8, self.side / 50), max(8, self.side / 32))
        self.draw_text(
            label,
            (0, 0),
            font_size=size * self.points,
            color=self._change_color_brightness(colour, brightness_factor=0.7),
            horizontal_alignment="left",
        )
        text = self.output.ax.texts[-1]
        extent = text.get_window_extent(self.output.canvas.get_renderer())
        width, height = extent.width + 2, extent.height + 2  # with its margin
        x0, y0, x1, y1 = box
        # At the upper left corner, first above it, then within; below; on the right and left.
        corners = [(x0, y0 - height), (x0, y0), (x0, y1), (x1, y0), (x0 - width, y0)]
        limits = self.output.width - width, self.output.height - height
        corners = torch.tensor(np.clip(corners, 0, np.maximum(limits, 0)), dtype=torch.float32)
        places = torch.cat([corners, corners + torch.tensor([width, height])], 1)
        best = int(pairwise_ioa(Boxes(places), Boxes(taken)).sum(1).argmin())
        text.set_position((corners[best] + 1).tolist())
        return places[best : best + 1]


def _side(box: np.ndarray) -> float:
    """The shorter side of x0, y0, x1, y1."""
    return min(box[2] - box[0], box[3] - box[1])


def fit(image: np.ndarray) -> np.ndarray:
    """Enlarges or reduces a picture, so that its longer side is 400 to 1000 pixels."""
    side = min(max(*image.shape[:2], MIN_SIDE), MAX_SIDE)
    return np.asarray(ImageOps.contain(Image.fromarray(image), (side, side)))


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
    images = [read_image(record["file_name"], format="RGB") for record in records]
    ratios = [image.shape[1] / image.shape[0] for image in images]
    high = WIDTH * len(ratios) / sum(ratios)  # of all, whatever their shapes
    figure = Figure(figsize=(WIDTH * len(ratios), 2 * high + 0.6), layout="compressed")
    rows = figure.subplots(2, len(ratios), squeeze=False, width_ratios=ratios)
    for record, image, above, below in zip(records, images, *rows, strict=True):
        found = [
            {**result, "bbox_mode": BoxMode.XYWH_ABS}
            | {"category_id": to_class.get(result["category_id"], result["category_id"])}
            for result in results
            if result["image_id"] == record["image_id"] and result["score"] >= score_threshold
        ]
        picture = fit(image)
        for axes, objects in ((above, record["annotations"]), (below, found)):
            instances = Instances(picture.shape[:2])
            boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
            instances.pred_boxes = Boxes(boxes)
            instances.pred_boxes.scale(*np.divide(picture.shape[1::-1], image.shape[1::-1]))
            instances.pred_classes = tensor([o["category_id"] for o in objects])
            if objects is found:
                instances.scores = tensor([o["score"] for o in objects])
            drawing = ClassVisualizer(picture, metadata.thing_classes)
            axes.imshow(drawing.draw_instance_predictions(instances).get_image())
            axes.set(xticks=[], yticks=[])
    rows[0][0].set_title("ground truth", loc="left")
    rows[1][0].set_title(f"predicted, score over {score_threshold:g}", loc="left")
    figure.suptitle(title)
    return figure
