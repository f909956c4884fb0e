"""From an image file to the tensor that a classifier takes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from .catalog import printable

__all__ = [
    "ClassificationMapper",
    "RandomResizedCrop",
    "UnreadableImageError",
    "build_image_transform",
    "decode",
    "read_image",
    "skips_unreadable_images",
]

Step = Callable[[Image.Image], Image.Image]


class UnreadableImageError(OSError):
    """An image that cannot be used: damaged, empty, missing, or not what is said about it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def skips_unreadable_images(cfg: CfgNode) -> bool:
    """Whether DATALOADER.UNREADABLE_IMAGES is skip, and not error.

    Raises:
        ValueError: it is neither.
    """
    value = cfg.DATALOADER.UNREADABLE_IMAGES
    return _choose("DATALOADER.UNREADABLE_IMAGES", value, {"error": False, "skip": True})


# Reading -----------------------------------------------------------------------------------------


def decode(image: Image.Image) -> Image.Image:
    """
    An opened image as 8-bit RGB, itself where it is that already.

    Grey becomes three equal channels; of transparency the colour below is kept; CMYK and palettes
    become the colours they stand for; of 16-bit values the upper 8 bits are kept. As in
    torchvision, the orientation in a photograph's EXIF is not followed.
    """
    image.load()
    image.info.pop("transparency", None)  # Pillow warns of it where it is lost
    if image.mode.startswith("I"):
        image = _upper_bits(image)
    elif image.mode == "F":
        raise ValueError("floats, which do not say what is white")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(record: dict[str, Any], decode: Step = decode) -> Image.Image:
    """The image of a dataset dict as 8-bit RGB.

    Args:
        record: with "image", a uint8 array (H, W, 3) or (H, W), or else with "file_name".
        decode: :func:`decode`, or what decodes a part only, such as :class:`RandomResizedCrop`.

    Raises:
        UnreadableImageError: naming the image and what is wrong with it.
    """
    name = record["file_name"]
    try:
        if "image" in record:
            return decode(Image.fromarray(record["image"]))
        with PathManager.open(name, "rb") as file, Image.open(file) as image:
            return decode(image)
    except Exception as error:  # Pillow's decoders raise errors of all kinds
        raise UnreadableImageError(f"'{name}' cannot be read as an image: {error}") from error


def _upper_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, as Pillow reads 16-bit colours; it would clip them."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"values {values.min()} to {values.max()}, 16 bits are taken")
    return Image.fromarray((values >> 8).astype(np.uint8))


# Transforms --------------------------------------------------------------------------------------


class RandomResizedCrop:
    """
    torchvision's RandomResizedCrop of an image that is not decoded yet.

    A JPEG can be decoded at a half, a quarter or an eighth of its size for a fraction of the time.
    The crop is drawn first, so that the smallest of these is taken that leaves the crop at least
    ``size`` pixels wide and high. The draws are the same with and without, the pixels nearly.
    """

    def __init__(self, size: int, reduced_decoding: bool) -> None:
        """
        Args:
            size: of the result, in pixels.
            reduced_decoding: without, results are torchvision's to the bit.
        """
        self.crop = v2.RandomResizedCrop(size)
        self.size = size
        self.reduced_decoding = reduced_decoding

    def __call__(self, image: Image.Image) -> Image.Image:
        """An opened image -> one of 8-bit RGB, ``size`` x ``size``."""
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        scale = self._reduce(image, width, height) if self.reduced_decoding else 1
        box = [scale * edge for edge in (left, top, left + width, top + height)]
        # Of a reduced image, the crop may begin and end within a pixel. Pixels beyond it do not
        # count, as in torchvision.
        x, y = math.floor(box[0]), math.floor(box[1])
        part = decode(image).crop((x, y, math.ceil(box[2]), math.ceil(box[3])))
        box = [box[0] - x, box[1] - y, box[2] - x, box[3] - y]
        return part.resize((self.size, self.size), Image.Resampling.BILINEAR, box)

    def _reduce(self, image: Image.Image, width: int, height: int) -> float:
        """Has a JPEG decoded at this scale, so that such a crop keeps ``size`` pixels each way."""
        full = image.size
        least = math.ceil(full[0] * self.size / width), math.ceil(full[1] * self.size / height)
        draft = image.draft(None, least)
        return draft[1][2] / full[0] if draft else 1  # None: only JPEG's decoder can do this


def _resized_crop(options: CfgNode, training: bool) -> list[Step]:
    if training:
        return [RandomResizedCrop(options.SIZE, options.REDUCED_DECODING)]
    if options.RESIZE < options.SIZE:
        raise ValueError(
            f"INPUT.CLASSIFICATION.RESIZE is {options.RESIZE}; choose at least SIZE, "
            f"{options.SIZE}, which is cut out of it"
        )
    return [decode, v2.Resize(options.RESIZE), v2.CenterCrop(options.SIZE)]


def _pad_crop(options: CfgNode, training: bool) -> list[Step]:
    if options.PAD < 0:
        raise ValueError(f"INPUT.CLASSIFICATION.PAD is {options.PAD}; choose at least 0")
    if training:
        # Smaller images are padded as far as needed, as CenterCrop does.
        return [decode, v2.RandomCrop(options.SIZE, padding=options.PAD, pad_if_needed=True)]
    return [decode, v2.CenterCrop(options.SIZE)]


def _resize(options: CfgNode, training: bool) -> list[Step]:
    return [decode, v2.Resize((options.SIZE, options.SIZE))]


TRANSFORMS = {"resized_crop": _resized_crop, "pad_crop": _pad_crop, "resize": _resize}
FLIPS = {"horizontal": v2.RandomHorizontalFlip, "vertical": v2.RandomVerticalFlip, "none": None}


def build_image_transform(cfg: CfgNode, training: bool) -> tuple[Step, v2.Compose]:
    """
    torchvision's transforms for what INPUT.CLASSIFICATION and INPUT.RANDOM_FLIP say.

    They work on PIL images, with Pillow's antialiased bilinear filter, as in torchvision's
    reference training and in the transforms of its weights.

    Args:
        cfg: the config.
        training: random crops and flips, or those of evaluation.

    Returns:
        how :func:`read_image` is to decode, and what then makes a uint8 tensor (3, SIZE, SIZE) of
        the PIL image.

    Raises:
        ValueError: a value that is unknown or out of range.
    """
    options = cfg.INPUT.CLASSIFICATION
    kind = _choose("INPUT.CLASSIFICATION.TRANSFORM", options.TRANSFORM, TRANSFORMS)
    flip = _choose("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, FLIPS)
    if options.SIZE < 1:
        raise ValueError(f"INPUT.CLASSIFICATION.SIZE is {options.SIZE}; choose at least 1")
    first, *steps = kind(options, training)
    if training and flip is not None:
        steps.append(flip())
    # PILToTensor's dispatch takes longer than what it does.
    return first, v2.Compose([*steps, functional.pil_to_tensor])


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
        self.decode, self.transform = build_image_transform(cfg, training)
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
        image = self.transform(read_image(record, self.decode))
        return {
            "image": image.flip(0) if self.reverse else image,
            "label": int(record["label"]),
            "file_name": record["file_name"],
        }
