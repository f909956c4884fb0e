"""What trained models see in a picture, drawn side by side."""

import glob
import itertools
import logging
import math
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import is_image_file

from ss_detectron.checkpoint.checkpointer import FeedbackCheckpointer
from ss_detectron.checkpoint.weights import abbreviate
from ss_detectron.config import add_ss_config, merge_config_file
from ss_detectron.data import (
    ClassificationMapper,
    UnreadableImageError,
    register_coco_from_config,
    register_image_folders_from_config,
)
from ss_detectron.data.catalog import check_registered
from ss_detectron.layers import feedback_report
from ss_detectron.layers.feedback import Backpropagation
from ss_detectron.modeling import ImageClassifier

from .styles import COLOURS

__all__ = [
    "Classifier",
    "Detector",
    "Panel",
    "build_predictor",
    "check_same_classes",
    "draw_video",
    "find_files",
    "load_config",
    "output_paths",
    "read_picture",
    "render",
    "side_by_side",
    "titles",
]

logger = logging.getLogger(__name__)

# The longer side of a picture in a panel, in pixels, at least and at most.
MIN_SIDE, MAX_SIDE = 400, 1000
MIN_WIDTH = 160  # of a panel, whose picture may be narrower
MARGIN, LINE = 8, 18  # around pictures, and per line of text; in pixels
DPI = 100

MOST_PROBABLE = 5  # classes that a classifier's panel names


# Models ------------------------------------------------------------------------------------------


def load_config(name: str, options: Sequence[str] = (), weights: str | None = None) -> CfgNode:
    """
    The config of a trained model, on the CPU where there is no GPU.

    MODEL.WEIGHTS is, in this order: ``weights``; what ``options`` say; ``model_final.pth`` beside
    the file, for a run's config.yaml names the weights that the run started from; the file's.

    Args:
        name: a path, or the name of a config that ships with this package.
        options: KEY VALUE ...
        weights: path or URL of a checkpoint.

    Raises:
        FileNotFoundError: no such config, or no such checkpoint.
        KeyError, ValueError: an unknown key, in the file or in the options; a value that does not
            fit.
    """
    cfg = get_cfg()
    add_ss_config(cfg)
    file = merge_config_file(cfg, name)
    final = Path(file).with_name("model_final.pth")
    if final.is_file():
        cfg.MODEL.WEIGHTS = str(final)
    try:
        cfg.merge_from_list(list(options))
    except AssertionError as error:  # yacs's, of an unknown key
        raise ValueError(str(error)) from error
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise FileNotFoundError(
            f"{name} names no trained weights, and there is no model_final.pth beside it: give a "
            "checkpoint (--weights)"
        )
    if "://" not in path and not os.path.isfile(path.partition("?")[0]):
        raise FileNotFoundError(f"there are no weights {path!r} (for {name})")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


class Predictor:
    """
    A trained model that takes pictures as they come.

    Attributes:
        model: in evaluation mode.
        rule: which it was trained by, as its checkpoint says or, of one that does not, its config.
        classes: their names, those of the config's first data set.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: of :func:`load_config`.

        Raises:
            ValueError: MODEL.WEIGHTS do not fit the model or are a part of it only; the data set
                is not known or has another number of classes.
        """
        self.model = build_model(cfg).eval()
        self.rule = _load_weights(self.model, cfg.MODEL.WEIGHTS, cfg.MODEL.TRUSTED_WEIGHTS)
        self.classes = _class_names(cfg, _num_classes(self.model))

    def draw(self, image: np.ndarray) -> tuple[np.ndarray, str]:
        """What the model sees in a picture: the picture of a :class:`Panel`, and its caption."""
        raise NotImplementedError


class Detector(Predictor):
    """A detector; draws the boxes whose score reaches a threshold."""

    def __init__(self, cfg: CfgNode, score: float = 0.4) -> None:
        """
        Args:
            cfg: see :class:`Predictor`; INPUT says how large the model wants the picture.
            score: the least one, from 0 to 1, whatever the config's SCORE_THRESH_TEST.
        """
        cfg = cfg.clone()
        for head in (cfg.MODEL.RETINANET, cfg.MODEL.ROI_HEADS):
            head.SCORE_THRESH_TEST = min(head.SCORE_THRESH_TEST, score)
        super().__init__(cfg)
        self.score = score
        self.format = cfg.INPUT.FORMAT
        self.resize = T.AugmentationList(detection_utils.build_augmentation(cfg, is_train=False))

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """
        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            the objects found, the most certain first, on the CPU, in the picture's pixels.

        Raises:
            ValueError: this model finds no objects (it segments, say).
        """
        height, width = image.shape[:2]
        resized = T.AugInput(image if self.format == "RGB" else image[:, :, ::-1])
        self.resize(resized)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        output = self.model([{"image": tensor, "height": height, "width": width}])[0]
        if "instances" not in output:
            raise ValueError(
                f"{type(self.model).__name__} gives {', '.join(output)}: only detectors' "
                "instances and classifiers' probabilities are drawn"
            )
        found = output["instances"].to("cpu")
        found = found[found.scores >= self.score]
        return found[found.scores.argsort(descending=True, stable=True)]

    def draw(self, image: np.ndarray) -> tuple[np.ndarray, str]:
        found = self(image)
        enlarged = _fit(image)
        boxes = found.pred_boxes.clone()
        boxes.scale(enlarged.shape[1] / image.shape[1], enlarged.shape[0] / image.shape[0])
        drawing = _Visualizer(enlarged)
        if len(found):
            classes = found.pred_classes.tolist()
            drawing.overlay_instances(
                boxes=boxes,
                labels=[
                    f"{self.classes[c]} {score:.0%}"
                    for c, score in zip(classes, found.scores.tolist(), strict=True)
                ],
                assigned_colors=[
                    matplotlib.colors.to_rgb(COLOURS[c % len(COLOURS)]) for c in classes
                ],
            )
        return drawing.output.get_image(), ""


class Classifier(Predictor):
    """A classifier; names the most probable classes below the picture."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: see :class:`Predictor`; INPUT says which part of a picture the model sees.
        """
        super().__init__(cfg)
        self.mapper = ClassificationMapper(cfg, training=False)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Tensor:
        """
        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            the classes' probabilities, (num_classes,), on the CPU.
        """
        prepared = self.mapper({"image": image, "file_name": "the picture", "label": 0})
        return self.model([{"image": prepared["image"]}])[0]["probabilities"].cpu()

    def draw(self, image: np.ndarray) -> tuple[np.ndarray, str]:
        probabilities, classes = self(image).topk(min(MOST_PROBABLE, len(self.classes)))
        lines = [
            f"{p:6.1%}  {self.classes[c]}"
            for p, c in zip(probabilities.tolist(), classes.tolist(), strict=True)
        ]
        return _fit(image), "\n".join(lines)


def build_predictor(cfg: CfgNode, score: float = 0.4) -> Detector | Classifier:
    """
    Args:
        cfg: of :func:`load_config`.
        score: the least one of a detection.

    Raises:
        ValueError: see :class:`Predictor`.
    """
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if isinstance(architecture, type) and issubclass(architecture, ImageClassifier):
        return Classifier(cfg)
    return Detector(cfg, score)


def check_same_classes(predictors: Sequence[Predictor], names: Sequence[str]) -> None:
    """
    Refuses models that were not trained on the same classes.

    Args:
        names: of the predictors' configs.

    Raises:
        ValueError: naming two of the configs and the first class in which they differ.
    """
    for predictor, name in zip(predictors[1:], names[1:], strict=True):
        pairs = itertools.zip_longest(predictors[0].classes, predictor.classes)
        for index, (first, other) in enumerate(pairs):
            if first != other:
                raise ValueError(
                    f"{names[0]} and {name} differ in their classes: class {index} is {first!r} "
                    f"in the one and {other!r} in the other. What is drawn side by side needs the "
                    "same classes"
                )


def titles(predictors: Iterable[Predictor], weights: Sequence[str]) -> list[str]:
    """The predictors' rules; with the weights' folder and name where two have the same rule."""
    rules = [predictor.rule.replace("_", " ") for predictor in predictors]
    places = ["/".join(Path(path).with_suffix("").parts[-2:]) for path in weights]
    return [
        f"{rule} ({place})" if rules.count(rule) > 1 else rule
        for rule, place in zip(rules, places, strict=True)
    ]


def _load_weights(model: nn.Module, path: str, trusted: Sequence[str]) -> str:
    """Loads a checkpoint of the whole model; returns the rule it was trained by."""
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)  # what the checkpoint leaves as it is, shows
    checkpoint = FeedbackCheckpointer(model, trusted_weights=trusted).load(path)
    left = [name for name, p in model.named_parameters() if p.isnan().any()]
    if left:
        raise ValueError(
            f"{path} leaves {len(left)} of the model's parameters without a number "
            f"({abbreviate(left)}): it holds a part of a network, such as the backbone that a "
            "training starts from, or its training diverged. Give a trained model's checkpoint"
        )
    rules: dict[str, Any] = checkpoint.get("feedback") or {
        row.name: row.rule for row in feedback_report(model)
    }
    # As checkpoints write them: sign_symmetry(scale=mean_abs, gain=1).
    counts = Counter(rule.partition("(")[0] for rule in rules.values())
    del counts[Backpropagation.name]  # last layers stay on it
    return counts.most_common(1)[0][0] if counts else Backpropagation.name


def _num_classes(model: nn.Module) -> int | None:
    """The model's number of classes, if it says so as Detectron2's models do."""
    for part in (model, getattr(model, "roi_heads", None)):
        if isinstance(number := getattr(part, "num_classes", None), int):
            return number
    return None


def _class_names(cfg: CfgNode, number: int | None) -> list[str]:
    """The classes of the first data set; numbered where it is not on this machine."""
    register_coco_from_config(cfg)
    register_image_folders_from_config(cfg)
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN][:1]
    if not names:
        raise ValueError("DATASETS.TEST is empty: it says what the classes are called")
    check_registered(names)
    metadata = MetadataCatalog.get(names[0])
    try:
        if not hasattr(metadata, "thing_classes"):
            DatasetCatalog.get(metadata.name)  # reads them from the annotations
        classes = list(metadata.thing_classes)
    except FileNotFoundError as error:
        if number is None:
            raise
        logger.warning("The classes have no names here, but numbers: %s", error)
        return [f"class {i}" for i in range(number)]
    if number not in (None, len(classes)):
        raise ValueError(
            f"data set '{metadata.name}' has {len(classes)} classes, the model {number}: "
            "DATASETS.TEST names the data set that the classes' names are taken from"
        )
    return classes


# Pictures ----------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """What is drawn for one model."""

    title: str
    picture: np.ndarray
    """(H, W, 3) uint8 RGB."""
    caption: str = ""
    """Lines below the picture."""


def side_by_side(panels: Sequence[Panel]) -> Figure:
    """
    The panels in one row from left to right, each below its title, pixel by pixel as they are.

    Returns:
        a figure for :func:`render`.
    """
    high = max(panel.picture.shape[0] for panel in panels)
    wide = max(MIN_WIDTH, *(panel.picture.shape[1] for panel in panels))
    headings = ["\n".join(textwrap.wrap(panel.title, wide // 9)) for panel in panels]
    captions = [[line[: wide // 9] for line in panel.caption.splitlines()] for panel in panels]
    above = 2 * MARGIN + LINE * max(1 + heading.count("\n") for heading in headings)
    below = MARGIN + LINE * max(map(len, captions))
    width, height = MARGIN + len(panels) * (wide + MARGIN), above + high + below
    # Matplotlib cuts the fraction off that rounding may leave.
    figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)
    FigureCanvasAgg(figure)

    def write(text: str, x: float, y: float, **options: Any) -> None:
        figure.text(x / width, y / height, text, linespacing=1.3, parse_math=False, **options)

    for index, (panel, heading, lines) in enumerate(zip(panels, headings, captions, strict=True)):
        left = MARGIN + index * (wide + MARGIN)
        centre = left + wide // 2
        figure.figimage(panel.picture, centre - panel.picture.shape[1] // 2, below)
        write(heading, centre, below + high + above / 2, ha="center", va="center", size=11)
        write("\n".join(lines), left, below - MARGIN / 2, va="top", size=10, family="monospace")
    return figure


def render(figure: Figure) -> np.ndarray:
    """A figure of :func:`side_by_side` as pixels, (H, W, 3) uint8 RGB."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy()


class _Visualizer(Visualizer):
    """Detectron2's, but boxes are opaque: half transparent, they are lost on a dark picture."""

    def draw_box(self, box_coord, alpha=1.0, edge_color="g", line_style="-"):
        return super().draw_box(box_coord, alpha, edge_color, line_style)


def _fit(image: np.ndarray) -> np.ndarray:
    """The picture, enlarged or reduced to a panel's size."""
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = min(max(longer, MIN_SIDE), MAX_SIDE) / longer
    size = [max(1, round(side * scale)) for side in (width, height)]
    return np.asarray(Image.fromarray(image).resize(size))


# Files -------------------------------------------------------------------------------------------


def find_files(words: Iterable[str]) -> list[Path]:
    """
    The files that a command line names, each once: files, patterns, and folders' images.

    Raises:
        FileNotFoundError: a word that names none.
    """
    found = {}
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if is_image_file(f.name) and f.is_file())
            problem = f"there is no image in the folder '{word}'"
        elif path.is_file():
            files = [path]
        else:
            matches = map(Path, glob.glob(str(path), recursive=True))
            files = sorted(match for match in matches if match.is_file())
            problem = f"there is no file '{word}', nor one of that pattern"
        if not files:
            raise FileNotFoundError(problem)
        found |= {file.resolve(): file for file in files if file.resolve() not in found}
    return list(found.values())


def output_paths(files: Sequence[Path], folder: Path, suffix: str = ".png") -> list[Path]:
    """
    Where the drawings of files go: ``folder/name.png``, and ``name_2.png`` for the second of a
    name.

    Raises:
        ValueError: a file that is to be drawn would be overwritten.
    """
    sources = {file.resolve() for file in files}
    paths: dict[str, Path] = {}
    for file in files:
        numbered = (f"{file.stem}_{number}{suffix}" for number in itertools.count(2))
        names = itertools.chain([file.stem + suffix], numbered)
        name = next(name for name in names if name.casefold() not in paths)
        paths[name.casefold()] = folder / name
        if (folder / name).resolve() in sources:
            raise ValueError(
                f"the drawing of '{file}' would overwrite '{folder / name}', which is to be drawn "
                "itself: choose another output folder"
            )
    return list(paths.values())


def read_picture(path: str | Path) -> np.ndarray:
    """
    An image file as Detectron2 reads it for evaluation: turned as its EXIF says, and converted to
    (H, W, 3) uint8 RGB.

    Raises:
        UnreadableImageError: naming the file and what is wrong with it.
    """
    try:
        return np.ascontiguousarray(detection_utils.read_image(str(path), format="RGB"))
    except Exception as error:  # Pillow's decoders raise errors of all kinds
        raise UnreadableImageError(f"'{path}' cannot be read as an image: {error}") from error


def draw_video(source: Path, target: Path, draw: Callable[[np.ndarray], np.ndarray]) -> int:
    """
    Draws every frame of a video into an MP4 file of the same frame rate, without sound.

    Args:
        draw: (H, W, 3) uint8 RGB -> the same of another size, which is the same for all frames; an
            odd last row or column is cut off.

    Returns:
        the number of frames.

    Raises:
        UnreadableImageError: the source is no video, or has no frame that can be read.
        OSError: the target cannot be written.
    """
    capture = cv2.VideoCapture(str(source))
    writer, frames = None, 0
    try:
        while (read := capture.read())[0]:
            drawn = draw(np.ascontiguousarray(read[1][:, :, ::-1]))
            height, width = (side // 2 * 2 for side in drawn.shape[:2])
            if writer is None:
                rate = capture.get(cv2.CAP_PROP_FPS) or 25
                codec = cv2.VideoWriter_fourcc(*"mp4v")
                writer = cv2.VideoWriter(str(target), codec, rate, (width, height))
                if not writer.isOpened():
                    raise OSError(f"'{target}' cannot be written: OpenCV has no MPEG-4 encoder")
            writer.write(np.ascontiguousarray(drawn[:height, :width, ::-1]))
            frames += 1
    finally:
        announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
        if writer is not None:
            writer.release()
    if not frames:
        raise UnreadableImageError(f"'{source}' cannot be read as a video")
    if frames < announced:
        logger.warning("'%s': %d of %d frames could be read.", source, frames, announced)
    return frames
