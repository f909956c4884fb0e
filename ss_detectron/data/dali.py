"""Training images decoded and resized by NVIDIA DALI, on the GPU where there is one.

Torch's loader reads the files and draws crops and flips, as it does for Pillow; DALI, the extra
``dali``, does the rest.
"""

import re
from collections import deque
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image
from torch.utils.data import default_collate

from ss_detectron.config import choose

from .images import FLIPS, RandomResizedCrop, UnreadableImageError, decode, open_image
from .stream import TrainingLoader


class EncodedImageMapper:
    """Make of a dataset dict for classification its image, not decoded, and a crop and flip."""

    def __init__(self, cfg: CfgNode) -> None:
        self.crop = RandomResizedCrop(cfg.INPUT.CLASSIFICATION.SIZE, reduced_decoding=False)
        self.flips = choose(cfg, "INPUT.RANDOM_FLIP", *FLIPS, "none") != "none"

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: as :class:`~.images.ClassificationMapper` takes it.

        Returns:
            "encoded": uint8 array (bytes,); "start": int32 (2,), top and left, and "shape": int32
            (2,), height and width of the crop; "flip": int32 (), 0 or 1; "label": int and
            "file_name": str.

        Raises:
            UnreadableImageError: of a JPEG, only where it has no header or no end. DALI finds more.
        """
        image = open_image(record)
        top, left, height, width = self.crop.draw(image)
        return {
            "encoded": np.frombuffer(_encode(image), np.uint8),
            "start": np.array([top, left], np.int32),
            "shape": np.array([height, width], np.int32),
            # As torchvision's random flips draw it.
            "flip": np.int32(self.flips and torch.rand(1).item() < 0.5),
            "label": int(record["label"]),
            "file_name": record["file_name"],
        }


def _encode(image: Image.Image) -> bytes:
    """Encode an opened image so that DALI decodes it to the colours of :func:`~.images.decode`.

    JPEGs remain as they are, except those of four colours and those without an end, which a
    decoder on a GPU might fill up. All else is decoded, and passed on without loss.
    """
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        encoded = image.fp.getvalue()
        if encoded.rfind(b"\xff\xd9") > encoded.rfind(b"\xff\xda"):  # its end; its last pixels
            return encoded
    file = BytesIO()
    decode(image).save(file, "PPM")
    return file.getvalue()


def _collate(images: list[dict[str, Any]]) -> dict[str, Any]:
    """Put all files behind each other, to pass from one process to another as one tensor."""
    encoded = [image.pop("encoded") for image in images]
    return {
        "encoded": torch.from_numpy(np.concatenate(encoded)),
        "lengths": [len(image) for image in encoded],
        **default_collate(images),
    }


class DaliLoader(TrainingLoader):
    """A :class:`~.stream.TrainingLoader` whose batches DALI decodes, ahead of those given out.

    Its mapper is :class:`EncodedImageMapper`. Images are on this process's GPU or, with
    MODEL.DEVICE cpu, there. An image that DALI cannot decode is an UnreadableImageError.
    """

    def __init__(self, cfg: CfgNode, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, collate_fn=_collate)
        self.cfg = cfg

    def _load(self) -> Iterator[dict[str, Any]]:
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        waiting = deque()
        encoded = _feed(super()._load(), waiting)  # worker processes start before DALI's threads
        pipeline = _build_pipeline(self.cfg, self.batch_size, encoded)
        images = DALIGenericIterator([pipeline], ["image"], prepare_first_batch=False)
        try:
            while True:
                (batch,) = next(images)
                yield {**batch, **waiting.popleft()}
        except RuntimeError as error:
            sample = re.search(r"Failed to decode sample #(\d+)", str(error))
            if sample is None:
                raise
            name = waiting[0]["file_name"][int(sample[1])]
            raise UnreadableImageError(f"'{name}' cannot be decoded: {error}") from error
        finally:
            encoded.close()  # and with it the worker processes, while DALI's cycles live on


def _feed(batches: Iterator[dict[str, Any]], waiting: deque) -> Iterator[tuple[Any, ...]]:
    """Yield what the pipeline takes; labels and names wait for the images that it makes."""
    for batch in batches:
        waiting.append({key: batch[key] for key in ("label", "file_name")})
        images = np.split(batch["encoded"].numpy(), np.cumsum(batch["lengths"])[:-1])
        yield images, *(batch[key].numpy() for key in ("start", "shape", "flip"))


def _build_pipeline(cfg: CfgNode, batch_size: int, source: Iterator[tuple[Any, ...]]) -> Any:
    from nvidia.dali import Pipeline, fn, types

    device, gpu = torch.device(cfg.MODEL.DEVICE), None
    if device.type == "cuda":
        gpu = torch.cuda.current_device() if device.index is None else device.index
    pipeline = Pipeline(batch_size, max(1, cfg.DATALOADER.NUM_WORKERS), device_id=gpu)
    with pipeline:
        encoded, start, shape, flip = fn.external_source(source, num_outputs=4)
        images = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=(0, 1),
            device="cpu" if gpu is None else "mixed",
            output_type={"RGB": types.RGB, "BGR": types.BGR}[cfg.INPUT.FORMAT],
            # As Pillow does both:
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        size = [cfg.INPUT.CLASSIFICATION.SIZE] * 2
        images = fn.resize(images, size=size, interp_type=types.INTERP_TRIANGULAR)
        upside_down = cfg.INPUT.RANDOM_FLIP == "vertical"
        flips = {"horizontal": 0, "vertical": flip} if upside_down else {"horizontal": flip}
        pipeline.set_outputs(fn.transpose(fn.flip(images, **flips), perm=[2, 0, 1]))
    return pipeline
