"""What trained models see in a picture, drawn side by side."""

import glob
import logging
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Instances
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ss_detectron.checkpoint.checkpointer import FeedbackCheckpointer, compare_classes
from ss_detectron.data import (
    ClassificationMapper,
    UnreadableImageError,
    read_image,
    register_coco_from_config,
    register_image_folders_from_config,
)
from ss_detectron.data.catalog import check_registered
from ss_detectron.data.folders import is_image
from ss_detectron.layers import feedback_report
from ss_detectron.layers.feedback import Backpropagation
from ss_detectron.modeling import ImageClassifier
from ss_detectron.utils.text import abbreviate

from .runs import trained_config
from .visualize import ClassVisualizer, fit

logger = logging.getLogger(__name__)

MIN_WIDTH = 160  # of a panel, whose picture may be narrower
MARGIN, LINE, CHARACTER = 8, 18, 9  # around pictures, and of the text; in pixels


# Models ------------------------------------------------------------------------------------------


def load_config(name: str, options: Sequence[str] = (), weights: str | None = None) -> CfgNode:
    """Reads :func:`~ss_detectron.experiments.runs.trained_config`, on the CPU where no GPU is."""
    cfg = trained_config(name, options, weights)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


class Predictor:
    """
    A trained model that takes pictures as they come.

    Attributes:
        model: in evaluation mode.
        rule: which it was trained by, as its checkpoint says or, of one that does not, its config.
        classes: their names, as its checkpoint says or, of one that does not, those of the config's
            first data set.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Raises:
            ValueError: MODEL.WEIGHTS do not fit the model or are a part of it only; the data set
                is not known or has another number of classes.
        """
        self.model = build_model(cfg).eval()
        self.rule, saved = _load_weights(self.model, cfg.MODEL.WEIGHTS, cfg.MODEL.TRUSTED_WEIGHTS)
        self.classes = _class_names(cfg, self.model, saved)

    def draw(self, image: np.ndarray) -> tuple[np.ndarray, str]:
        """Draws what the model sees: the picture of a panel, (H, W, 3), and the lines below it."""
        raise NotImplementedError


class Detector(Predictor):
    """A detector; draws the objects of this score at least, whatever SCORE_THRESH_TEST is."""

    def __init__(self, cfg: CfgNode, score: float = 0.4) -> None:
        cfg = cfg.clone()
        for head in (cfg.MODEL.RETINANET, cfg.MODEL.ROI_HEADS):
            head.SCORE_THRESH_TEST = min(head.SCORE_THRESH_TEST, score)
        super().__init__(cfg)
        self.score = score
        self.format = cfg.INPUT.FORMAT
        (self.resize,) = detection_utils.build_augmentation(cfg, is_train=False)

    @torch.no_grad()
    def __call__(self, image: np.ndarray, size: tuple[int, int] | None = None) -> Instances:
        """
        Finds objects.

        Args:
            image: (H, W, 3) uint8 RGB.
            size: height and width of the picture that the results are for; by default ``image``.

        Returns:
            the objects, the most certain first, on the CPU.

        Raises:
            ValueError: this model finds no objects (it segments, say).
        """
        height, width = size or image.shape[:2]
        pixels = detection_utils.convert_PIL_to_numpy(Image.fromarray(image), self.format)
        pixels = self.resize.get_transform(pixels).apply_image(pixels)
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        tensor = tensor.float()  # YUV-BT.601 is of float64, which no layer takes
        output = self.model([{"image": tensor, "height": height, "width": width}])[0]
        if "instances" not in output:
            raise ValueError(f"{type(self.model).__name__} gives {', '.join(output)}: no instances")
        found = output["instances"].to("cpu")
        found = found[found.scores >= self.score]
        return found[found.scores.argsort(descending=True, stable=True)]

    def draw(self, image: np.ndarray) -> tuple[np.ndarray, str]:
        picture = fit(image)
        found = self(image, picture.shape[:2])
        drawing = ClassVisualizer(picture, self.classes).draw_instance_predictions(found)
        return drawing.get_image(), ""


class Classifier(Predictor):
    """A classifier; names the five most probable classes below the picture."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.mapper = ClassificationMapper(cfg, training=False)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Tensor:
        """
        Classifies an image, (H, W, 3) uint8 RGB.

        Returns:
            the classes' probabilities, (num_classes,), on the CPU.
        """
        prepared = self.mapper({"image": image, "file_name": "the picture", "label": 0})
        return self.model([{"image": prepared["image"]}])[0]["probabilities"].cpu()

    def draw(self, image: np.ndarray) -> tuple[np.ndarray, str]:
        probabilities, classes = self(image).topk(min(5, len(self.classes)))
        pairs = zip(probabilities.tolist(), classes.tolist(), strict=True)
        return fit(image), "\n".join(f"{p:6.1%}  {self.classes[c]}" for p, c in pairs)


def build_predictor(cfg: CfgNode, score: float = 0.4) -> Predictor:
    """Builds a classifier, or a detector whose detections have this score at least."""
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if isinstance(architecture, type) and issubclass(architecture, ImageClassifier):
        return Classifier(cfg)
    return Detector(cfg, score)


def titles(predictors: Iterable[Predictor], weights: Sequence[str]) -> list[str]:
    """Names the predictors' rules, with the weights' folder and name where two have the same."""
    rules = [predictor.rule.replace("_", " ") for predictor in predictors]
    places = ["/".join(Path(path).with_suffix("").parts[-2:]) for path in weights]
    return [
        f"{rule} ({place})" if rules.count(rule) > 1 else rule
        for rule, place in zip(rules, places, strict=True)
    ]


def _load_weights(model: nn.Module, path: str, trusted: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Loads a checkpoint of the whole model; returns the rule and the classes it was trained by."""
    checkpoint = FeedbackCheckpointer(model, trusted_weights=trusted, whole=True).load(path)
    if broken := [name for name, tensor in model.state_dict().items() if tensor.isnan().any()]:
        raise ValueError(f"{path} has no numbers for {abbreviate(broken)}: its training diverged")
    rules = checkpoint.get("feedback") or {row.name: row.rule for row in feedback_report(model)}
    # As checkpoints write them: sign_symmetry(scale=mean_abs, gain=1).
    counts = Counter(rule.partition("(")[0] for rule in rules.values())
    del counts[Backpropagation.name]  # last layers stay on it
    rule = counts.most_common(1)[0][0] if counts else Backpropagation.name
    return rule, checkpoint.get("classes") or []


def _class_names(cfg: CfgNode, model: nn.Module, saved: Sequence[str]) -> Sequence[str]:
    """The checkpoint's classes, else the first data set's; numbered where it is not here."""
    register_coco_from_config(cfg)
    register_image_folders_from_config(cfg)
    name = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[0]
    check_registered([name])
    part = model if hasattr(model, "num_classes") else getattr(model, "roi_heads", None)
    number = getattr(part, "num_classes", None)
    metadata = MetadataCatalog.get(name)
    try:
        if not hasattr(metadata, "thing_classes"):
            DatasetCatalog.get(name)  # reads them from the annotations
        classes = list(metadata.thing_classes)
    except FileNotFoundError as error:
        if saved:
            return saved
        logger.warning("The classes have no names here, but numbers: %s", error)
        return [f"class {i}" for i in range(number)]
    if saved:
        if difference := compare_classes(saved, classes):
            said = "The classes drawn are the checkpoint's: it was trained on %s, in data set '%s'."
            logger.warning(said, difference, name)
        return saved
    if number not in (None, len(classes)):
        has = f"data set '{name}' has {len(classes)} classes, the model {number}"
        raise ValueError(f"{has}: DATASETS.TEST is to name the one that it was trained for")
    return classes


# Pictures ----------------------------------------------------------------------------------------


def side_by_side(
    titles: Sequence[str], pictures: Sequence[np.ndarray], captions: Sequence[str]
) -> np.ndarray:
    """
    Draws panels in one row: pictures, pixel by pixel as they are, between titles and lines of text.

    Args:
        pictures: (H, W, 3) uint8 RGB, all of one size.

    Returns:
        the same, of another size.
    """
    high, narrow, _ = pictures[0].shape
    wide = max(MIN_WIDTH, narrow)
    letters = wide // CHARACTER
    headings = [textwrap.fill(title, letters) for title in titles]
    lines = [[line[:letters] for line in caption.splitlines()] for caption in captions]
    above = 2 * MARGIN + LINE * (1 + max(heading.count("\n") for heading in headings))
    below = MARGIN + LINE * max(map(len, lines))
    size = (MARGIN + len(titles) * (wide + MARGIN), above + high + below)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = ImageFont.truetype(findfont("DejaVu Sans Mono"), 14)
    for i, (heading, picture, caption) in enumerate(zip(headings, pictures, lines, strict=True)):
        left = MARGIN + i * (wide + MARGIN)
        canvas.paste(Image.fromarray(picture), (left + (wide - narrow) // 2, above))
        pen.text((left + wide / 2, MARGIN), heading, "black", anchor="ma", align="center")
        pen.text((left, above + high), "\n".join(caption), "black", anchor="la")
    return np.asarray(canvas)


# Files -------------------------------------------------------------------------------------------


def find_files(words: Iterable[str], *, recursive: bool = False) -> list[Path]:
    """
    Finds the files that a command line names, each once: files, patterns, and folders' images,
    ``recursive`` also those of the folders in them.

    Raises:
        FileNotFoundError: a word that names none.
    """
    found = {}
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            inside = path.rglob("*") if recursive else path.iterdir()
            files = sorted(file for file in inside if is_image(str(file.relative_to(path))))
        else:
            files = sorted(filter(Path.is_file, map(Path, glob.glob(str(path), recursive=True))))
            files = [path] if path.is_file() else files  # its name may look like a pattern
        if not files:
            inside = " (--recursive looks into its folders)" if path.is_dir() else ""
            raise FileNotFoundError(
                f"there is no file '{word}', nor one of that pattern or in it{inside}"
            )
        found |= {file.resolve(): file for file in files if file.resolve() not in found}
    return list(found.values())


def output_paths(files: Sequence[Path], folder: Path, suffix: str = ".png") -> list[Path]:
    """
    Says where drawings go: ``folder/name.png``, and ``name_2.png`` for the second of a name.

    Raises:
        ValueError: a file that is to be drawn would be overwritten.
    """
    paths: list[Path] = []
    for file in files:
        path, number = folder / (file.stem + suffix), 1
        while path in paths:
            number += 1
            path = folder / f"{file.stem}_{number}{suffix}"
        if path.resolve() in {file.resolve() for file in files}:
            raise ValueError(f"'{path}' would overwrite a file that is to be drawn")
        paths.append(path)
    return paths


def read_picture(path: str | Path) -> np.ndarray:
    """
    Reads an image file as Detectron2 does for evaluation: turned as its EXIF says, and converted to
    (H, W, 3) uint8 RGB; 16-bit grey as :func:`~ss_detectron.data.images.decode` has it.

    Raises:
        UnreadableImageError: naming the file and what is wrong with it.
    """
    image = read_image({"file_name": str(path)})
    return np.asarray(detection_utils._apply_exif_orientation(image))


def draw_video(source: Path, target: Path, draw: Callable[[np.ndarray], np.ndarray]) -> None:
    """
    Draws every frame of a video into an MP4 file of the same frame rate, without sound.

    Args:
        draw: (H, W, 3) uint8 RGB -> the same of another size, which is the same for all frames; an
            odd last row or column is cut off.

    Raises:
        UnreadableImageError: the source is no video, or has no frame that can be read.
        OSError: the target cannot be written.
    """
    capture = cv2.VideoCapture(str(source))
    writer, frames = None, 0
    while (read := capture.read())[0]:
        drawn = draw(np.ascontiguousarray(read[1][:, :, ::-1]))
        height, width = (side // 2 * 2 for side in drawn.shape[:2])
        if writer is None:
            codec = cv2.VideoWriter_fourcc(*"mp4v")
            rate = capture.get(cv2.CAP_PROP_FPS) or 25
            writer = cv2.VideoWriter(str(target), codec, rate, (width, height))
            if not writer.isOpened():
                raise OSError(f"'{target}' cannot be written: OpenCV has no MPEG-4 encoder")
        writer.write(np.ascontiguousarray(drawn[:height, :width, ::-1]))
        frames += 1
    if writer is None:
        raise UnreadableImageError(f"'{source}' cannot be read as a video")
    writer.release()
    if frames < (announced := capture.get(cv2.CAP_PROP_FRAME_COUNT)):
        logger.warning("'%s': %d of %d frames could be read.", source, frames, announced)
