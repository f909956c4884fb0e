"""Training images decoded and resized by NVIDIA DALI, on the GPU where there is one.

Needs the extra ``dali``. Torch's loader reads the files and draws crops and flips, as it does for
Pillow; DALI does the rest.
"""

import re
from collections import deque
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from PIL import Image
from torch.utils.data import Dataset, default_collate

from .images import UnreadableImageError, build_image_transform, decode, read_image
from .stream import TrainingLoader

__all__ = ["DaliLoader", "EncodedImageMapper", "collate_encoded"]


# Two by two pixels that show whether they were flipped, and in any direction.
MARKS = Image.fromarray(np.array([[0, 1], [1, 1]], dtype=np.uint8))


class EncodedImageMapper:
    """A dataset dict for classification -> its image, not decoded, and what to make of it."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: see :func:`~.images.build_image_transform`; the crop is resized_crop.
        """
        first, self.flip = build_image_transform(cfg, training=True)
        self.crop = first.crop

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: as :class:`~.images.ClassificationMapper` takes it.

        Returns:
            "encoded": uint8 array (bytes,); "start": int32 (2,), top and left, and "shape": int32
            (2,), height and width of the crop; "flip": int32 (), 0 or 1; "label": int and
            "file_name": str.

        Raises:
            UnreadableImageError: see :func:`~.images.read_image`; of a JPEG, only where it has no
                header or no end. What else is wrong with one, DALI finds.
        """
        encoded, (top, left, height, width) = read_image(record, self._encode)
        return {
            "encoded": np.frombuffer(encoded, np.uint8),
            "start": np.array([top, left], np.int32),
            "shape": np.array([height, width], np.int32),
            "flip": self.flip(MARKS)[0, 0, 0].int(),
            "label": int(record["label"]),
            "file_name": record["file_name"],
        }

    def _encode(self, image: Image.Image) -> tuple[bytes, list[int]]:
        return _encode(image), self.crop.get_params(image, self.crop.scale, self.crop.ratio)


def _encode(image: Image.Image) -> bytes:
    """An opened image as a file that DALI decodes to the colours of :func:`~.images.decode`.

    JPEGs remain as they are, except those of four colours and those without an end, which a
    decoder on a GPU might fill up. All else is decoded, and passed on without loss.
    """
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        image.fp.seek(0)
        encoded = image.fp.read()
        if encoded.rfind(b"\xff\xd9") > encoded.rfind(b"\xff\xda"):  # its end; its last pixels
            return encoded
    file = BytesIO()
    decode(image).save(file, "PPM")
    return file.getvalue()


def collate_encoded(images: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Args:
        images: N of what :class:`EncodedImageMapper` gives.

    Returns:
        "encoded": uint8 tensor, all images behind each other, which passes from one process to
        another as one; "lengths": list[int], their bytes; "start" and "shape": int32 (N, 2);
        "flip": int32 (N,); "label": int64 (N,) and "file_name": list[str].
    """
    encoded = [image.pop("encoded") for image in images]
    return {
        "encoded": torch.from_numpy(np.concatenate(encoded)),
        "lengths": [len(image) for image in encoded],
        **default_collate(images),
    }


class DaliLoader:
    """Batches of decoded images, on the model's device."""

    def __init__(self, cfg: CfgNode, encoded: TrainingLoader) -> None:
        """
        Args:
            cfg: the config.
            encoded: endless batches of :func:`collate_encoded`.
        """
        self.cfg = cfg
        self.encoded = encoded
        self.batches = 0
        """How many were given out; DALI works ahead of them."""

    @property
    def dataset(self) -> Dataset:
        """The images of one epoch."""
        return self.encoded.dataset

    def state_dict(self) -> dict[str, int]:
        """See :meth:`.TrainingLoader.state_dict`."""
        return {**self.encoded.state_dict(), "batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See :meth:`.TrainingLoader.load_state_dict`."""
        self.encoded.load_state_dict(state)
        self.batches = self.encoded.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """
        Yields:
            "image": uint8 (N, 3, SIZE, SIZE) in the order of INPUT.FORMAT, on this process's GPU
            or, with MODEL.DEVICE cpu, there; "label": int64 (N,) and "file_name": list[str].

        Raises:
            UnreadableImageError: an image, by its name.
        """
        self.encoded.batches = self.batches
        waiting = deque()
        encoded = _feed(iter(self.encoded), waiting)  # worker processes start before DALI's threads
        gpu = _gpu(self.cfg)
        pipeline = _decode(
            encoded,
            self.cfg,
            "cpu" if gpu is None else "mixed",
            batch_size=self.encoded.batch_size,
            num_threads=max(1, self.cfg.DATALOADER.NUM_WORKERS),
            device_id=gpu,
        )
        images = DALIGenericIterator([pipeline], ["image"], prepare_first_batch=False)
        try:
            while True:
                (batch,) = next(images)
                self.batches += 1
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
    """What :func:`_decode` takes; labels and names wait for the images that it makes ahead."""
    for batch in batches:
        waiting.append({key: batch[key] for key in ("label", "file_name")})
        images = np.split(batch["encoded"].numpy(), np.cumsum(batch["lengths"])[:-1])
        yield images, *(batch[key].numpy() for key in ("start", "shape", "flip"))


def _gpu(cfg: CfgNode) -> int | None:
    """The index of the GPU of this process's model, if it is on one."""
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


@pipeline_def
def _decode(source: Iterator[tuple], cfg: CfgNode, decoder: str) -> Any:
    encoded, start, shape, flip = fn.external_source(source, num_outputs=4)
    images = fn.decoders.image_slice(
        encoded,
        start=start,
        shape=shape,
        axes=(0, 1),
        device=decoder,
        output_type={"RGB": types.RGB, "BGR": types.BGR}[cfg.INPUT.FORMAT],
        # As Pillow does both:
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    images = fn.resize(
        images, size=[cfg.INPUT.CLASSIFICATION.SIZE] * 2, interp_type=types.INTERP_TRIANGULAR
    )
    vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
    images = fn.flip(images, horizontal=0 if vertical else flip, vertical=flip if vertical else 0)
    return fn.transpose(images, perm=[2, 0, 1])
