"""From an image file to the tensor that a classifier takes."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image, UnidentifiedImageError

from ss_detectron.config import choose
from ss_detectron.utils.text import printable


class UnreadableImageError(OSError):
    """An image that cannot be used: damaged, empty, missing, or not what is said about it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def skips_unreadable_images(cfg: CfgNode) -> bool:
    """Say whether DATALOADER.UNREADABLE_IMAGES is "skip", and not "error"."""
    return choose(cfg, "DATALOADER.UNREADABLE_IMAGES", "error", "skip") == "skip"


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raise whatever goes wrong within as an :class:`UnreadableImageError` that names the file.

    It belongs around nothing but opening and decoding that file: such an image may be skipped, an
    error in a mapper or a lack of memory may not.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of all kinds
        if isinstance(error, UnidentifiedImageError) and _is_heic(name):
            error = ValueError("it is HEIC, as telephones store photographs: convert it to JPEG")
        raise UnreadableImageError(f"'{name}' cannot be read as an image: {error}") from error


def _is_heic(name: str) -> bool:
    with PathManager.open(name, "rb") as file:
        return re.match(rb"....ftyp(hei|hev|mif1|msf1)", file.read(12), re.DOTALL) is not None


def open_image(record: dict[str, Any]) -> Image.Image:
    """Open the image of a dataset dict, for :func:`decode`. Its file is closed already.

    It is "image" of the record, a uint8 array (H, W, 3) or (H, W), or else the file "file_name".
    """
    name = record["file_name"]
    with reading(name):
        if "image" in record:
            image = Image.fromarray(record["image"])
        else:
            with PathManager.open(name, "rb") as file:
                image = Image.open(BytesIO(file.read()))
    image.filename = name
    return image


def decode(image: Image.Image) -> Image.Image:
    """Decode an image of :func:`open_image` as 8-bit RGB; return itself where it is that already.

    Grey becomes three equal channels; of transparency the colour below is kept; CMYK and palettes
    become the colours they stand for; of 16-bit values the upper 8 bits are kept, of grey ones
    of which all but one in a thousand have at most 8, 10, 12 or 14 bits the upper 8 of these, up to
    255. As in torchvision, the orientation in a photograph's EXIF is not followed.
    """
    with reading(image.filename):
        image.load()
        image.info.pop("transparency", None)  # Pillow warns of it where it is lost
        if image.mode.startswith("I"):
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 0xFFFF:
                raise ValueError(f"values {values.min()} to {values.max()}, 16 bits are taken")
            # What cameras and scanners store in 16 bits, often without saying of how many it is;
            # a hot pixel does not either.
            high = np.quantile(values, 0.999, method="lower")
            bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 1 << bits)
            message = (
                f"Grey images of 16 bits with 999 of 1000 values below {1 << bits} are taken as of "
                f"{bits} bits: convert all to 8 bits where one may be darker than others."
            )
            log_first_n(logging.INFO, message, key="message", name=__name__)
            # Of 16-bit colours, Pillow keeps the same bits; of grey, it would clip the values.
            image = Image.fromarray(np.minimum(values >> bits - 8, 255).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floats, which do not say what is white")
        return image if image.mode == "RGB" else image.convert("RGB")


def read_image(record: dict[str, Any]) -> Image.Image:
    """Read the image of a dataset dict: "image", a uint8 array, or else the file "file_name".

    Returns:
        8-bit RGB; see :func:`decode` for what becomes of other images.

    Raises:
        UnreadableImageError: names the image and what is wrong with it.
    """
    return decode(open_image(record))


class RandomResizedCrop:
    """torchvision's RandomResizedCrop of an image that is not decoded yet.

    A JPEG can be decoded at a half, a quarter or an eighth of its size for a fraction of the time.
    With ``reduced_decoding``, the smallest of these is taken that leaves the crop at least ``size``
    pixels wide and high. The draws are the same with and without; without, so are the pixels.
    """

    def __init__(self, size: int, reduced_decoding: bool) -> None:
        from torchvision.transforms import v2

        self.crop = v2.RandomResizedCrop(size)
        self.size = size
        self.reduced_decoding = reduced_decoding

    def draw(self, image: Image.Image) -> list[int]:
        """Draw top, left, height and width of a crop."""
        return self.crop.get_params(image, self.crop.scale, self.crop.ratio)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Crop an image of :func:`open_image`; return 8-bit RGB, ``size`` x ``size``."""
        top, left, height, width = self.draw(image)
        scale = 1.0
        if self.reduced_decoding:
            full = image.size
            sides = zip(full, (width, height), strict=True)
            least = tuple(math.ceil(side * self.size / crop) for side, crop in sides)
            if draft := image.draft(None, least):  # None: only JPEG's decoder can do this
                scale = draft[1][2] / full[0]
        box = [scale * edge for edge in (left, top, left + width, top + height)]
        # Of a reduced image, the crop may begin and end within a pixel. Pixels beyond it do not
        # count, as in torchvision.
        x, y = math.floor(box[0]), math.floor(box[1])
        part = decode(image).crop((x, y, math.ceil(box[2]), math.ceil(box[3])))
        box = [box[0] - x, box[1] - y, box[2] - x, box[3] - y]
        return part.resize((self.size, self.size), Image.Resampling.BILINEAR, box)


FLIPS = {"horizontal": "RandomHorizontalFlip", "vertical": "RandomVerticalFlip"}
"""INPUT.RANDOM_FLIP -> torchvision's transform of that name."""


def _build_transform(cfg: CfgNode, training: bool) -> Callable[[Image.Image], Image.Image]:
    """Build what makes of an image of :func:`open_image` one of 8-bit RGB, SIZE x SIZE."""
    from torchvision.transforms import v2  # detectors need none of it

    options, size = cfg.INPUT.CLASSIFICATION, cfg.INPUT.CLASSIFICATION.SIZE
    kind = choose(cfg, "INPUT.CLASSIFICATION.TRANSFORM", "resized_crop", "pad_crop", "resize")
    flip = choose(cfg, "INPUT.RANDOM_FLIP", *FLIPS, "none")
    if size < 1:
        raise ValueError(f"INPUT.CLASSIFICATION.SIZE is {size}; choose at least 1")
    if kind == "resize":
        steps = [decode, v2.Resize((size, size))]
    elif kind == "pad_crop":
        if options.PAD < 0:
            raise ValueError(f"INPUT.CLASSIFICATION.PAD is {options.PAD}; choose at least 0")
        # Smaller images are padded as far as needed, as CenterCrop does.
        crop = v2.RandomCrop(size, padding=options.PAD, pad_if_needed=True)
        steps = [decode, crop if training else v2.CenterCrop(size)]
    elif training:
        steps = [RandomResizedCrop(size, options.REDUCED_DECODING)]
    else:
        if size > options.RESIZE:
            raise ValueError(
                f"INPUT.CLASSIFICATION.RESIZE is {options.RESIZE}; choose at least SIZE, {size}, "
                "which is cut out of it"
            )
        steps = [decode, v2.Resize(options.RESIZE), v2.CenterCrop(size)]
    if training and flip != "none":
        steps.append(getattr(v2, FLIPS[flip])())
    return v2.Compose(steps)


class ClassificationMapper:
    """Make of a dataset dict for classification what a batch is made of.

    By torchvision's transforms for what INPUT.CLASSIFICATION and INPUT.RANDOM_FLIP say, with
    Pillow's antialiased bilinear filter, as torchvision's reference training and the transforms of
    its weights have it. INPUT.FORMAT is one of Detectron2's.

    Raises:
        ValueError: a value that is unknown or out of range.
    """

    def __init__(self, cfg: CfgNode, training: bool) -> None:
        self.transform = _build_transform(cfg, training)
        self.format = choose(cfg, "INPUT.FORMAT", "RGB", "BGR", "L", "YUV-BT.601")

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: with "label", and "image" or "file_name" as :func:`open_image` takes them.

        Returns:
            "image": tensor (C, SIZE, SIZE) in INPUT.FORMAT, uint8, or float32 for YUV-BT.601;
            "label": int and "file_name": str.

        Raises:
            UnreadableImageError: see :func:`open_image` and :func:`decode`.
        """
        image = convert_PIL_to_numpy(self.transform(open_image(record)), self.format)
        pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
        return {
            "image": pixels.float() if pixels.is_floating_point() else pixels,
            "label": int(record["label"]),
            "file_name": record["file_name"],
        }
