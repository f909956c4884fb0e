"""From an image file to the tensor that a classifier takes."""

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from PIL import Image
from torchvision.transforms import v2

__all__ = ["ClassificationMapper", "UnreadableImageError", "build_image_transform", "read_image"]


class UnreadableImageError(OSError):
    """An image that is damaged, empty, or no image at all."""


# Reading -----------------------------------------------------------------------------------------


def read_image(record: dict[str, Any]) -> Image.Image:
    """The image of a dataset dict as 8-bit RGB.

    Grey becomes three equal channels; of transparency the colour below is kept; CMYK and palettes
    become the colours they stand for; of 16-bit values the upper 8 bits are kept. As in
    torchvision, the orientation in a photograph's EXIF is not followed.

    Args:
        record: with "image", a uint8 array (H, W, 3) or (H, W), or else with "file_name".

    Raises:
        UnreadableImageError: naming the image and what is wrong with it.
    """
    name = record["file_name"]
    try:
        if "image" in record:
            return _to_rgb(Image.fromarray(record["image"]))
        with PathManager.open(name, "rb") as file, Image.open(file) as image:
            return _to_rgb(image)
    except Exception as error:  # Pillow's decoders raise errors of all kinds
        raise UnreadableImageError(f"'{name}' cannot be read as an image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image.info.pop("transparency", None)  # Pillow warns of it where it is lost
    if image.mode.startswith("I"):
        image = _upper_bits(image)
    elif image.mode == "F":
        raise ValueError("floats, which do not say what is white")
    return image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, as Pillow reads 16-bit colours; it would clip them."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"values {values.min()} to {values.max()}, 16 bits are taken")
    return Image.fromarray((values >> 8).astype(np.uint8))


# Transforms --------------------------------------------------------------------------------------


def _resized_crop(options: CfgNode, training: bool) -> list:
    if training:
        return [v2.RandomResizedCrop(options.SIZE)]
    if options.RESIZE < options.SIZE:
        raise ValueError(
            f"INPUT.CLASSIFICATION.RESIZE is {options.RESIZE}; choose at least SIZE, "
            f"{options.SIZE}, which is cut out of it"
        )
    return [v2.Resize(options.RESIZE), v2.CenterCrop(options.SIZE)]


def _pad_crop(options: CfgNode, training: bool) -> list:
    if options.PAD < 0:
        raise ValueError(f"INPUT.CLASSIFICATION.PAD is {options.PAD}; choose at least 0")
    if training:
        # Smaller images are padded as far as needed, as CenterCrop does.
        return [v2.RandomCrop(options.SIZE, padding=options.PAD, pad_if_needed=True)]
    return [v2.CenterCrop(options.SIZE)]


def _resize(options: CfgNode, training: bool) -> list:
    return [v2.Resize((options.SIZE, options.SIZE))]


TRANSFORMS = {"resized_crop": _resized_crop, "pad_crop": _pad_crop, "resize": _resize}
FLIPS = {"horizontal": v2.RandomHorizontalFlip, "vertical": v2.RandomVerticalFlip, "none": None}


def build_image_transform(cfg: CfgNode, training: bool) -> v2.Transform:
    """
    torchvision's transforms for what INPUT.CLASSIFICATION and INPUT.RANDOM_FLIP say.

    They work on PIL images, with Pillow's antialiased bilinear filter, as in torchvision's
    reference training and in the transforms of its weights.

    Args:
        cfg: the config.
        training: random crops and flips, or those of evaluation.

    Returns:
        a PIL image in RGB -> a uint8 tensor (3, SIZE, SIZE).

    Raises:
        ValueError: a value that is unknown or out of range.
    """
    options = cfg.INPUT.CLASSIFICATION
    kind = _choose("INPUT.CLASSIFICATION.TRANSFORM", options.TRANSFORM, TRANSFORMS)
    flip = _choose("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, FLIPS)
    if options.SIZE < 1:
        raise ValueError(f"INPUT.CLASSIFICATION.SIZE is {options.SIZE}; choose at least 1")
    steps = kind(options, training)
    if training and flip is not None:
        steps.append(flip())
    return v2.Compose([*steps, v2.PILToTensor()])


def _choose(key: str, value: str, choices: dict[str, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{key} is {value!r}; choose {' or '.join(map(repr, choices))}")
    return choices[value]


class ClassificationMapper:
    """A dataset dict for classification -> what a batch is made of."""

    def __init__(self, cfg: CfgNode, training: bool) -> None:
        """
        Args:
            cfg: see :func:`build_image_transform`; INPUT.FORMAT is RGB or BGR.
            training: whether to augment.

        Raises:
            ValueError: a value that is unknown or out of range.
        """
        self.transform = build_image_transform(cfg, training)
        self.reverse = _choose("INPUT.FORMAT", cfg.INPUT.FORMAT, {"RGB": False, "BGR": True})

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: with "label", and "image" or "file_name" as :func:`read_image` takes them.

        Returns:
            "image": uint8 tensor (3, SIZE, SIZE) in the order of INPUT.FORMAT, "label": int and
            "file_name": str.

        Raises:
            UnreadableImageError: see :func:`read_image`.
        """
        image = self.transform(read_image(record))
        return {
            "image": image.flip(0) if self.reverse else image,
            "label": int(record["label"]),
            "file_name": record["file_name"],
        }
