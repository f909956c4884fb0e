"""Small images that are held in memory, and augmented a batch at a time."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data.samplers import InferenceSampler
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ss_detectron.config import choose
from ss_detectron.layers.feedback import seed_of

from .images import ClassificationMapper
from .stream import ImageDataset, TrainingLoader

logger = logging.getLogger(__name__)


class ImagesInMemory(Dataset):
    """
    The images of a data set, decoded once.

    Args:
        images: whose mapper draws nothing at random and makes all images of one size; those that
            it leaves out are left out.

    Attributes:
        images: (number of images, C, H, W).
        labels: int64.
    """

    def __init__(self, images: ImageDataset) -> None:
        entries = [entry for i in range(len(images)) if (entry := images[i]) is not None]
        self.images = torch.stack([entry["image"] for entry in entries])
        self.labels = torch.tensor([entry["label"] for entry in entries])
        self.file_names = [entry["file_name"] for entry in entries]
        size = self.images.numel() * self.images.element_size()
        logger.info("%d images are held in memory: %.1f MB.", len(entries), size / 1e6)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Return a batch; see :func:`.build_classification_train_loader`."""
        return {
            "image": self.images[indices],
            "label": self.labels[indices],
            "file_name": [self.file_names[i] for i in indices],
        }


class WholeImageMapper(ClassificationMapper):
    """
    A :class:`.ClassificationMapper` of images that :class:`MemoryLoader` augments.

    Raises:
        ValueError: an image from which pad_crop would cut before it pads.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg, training=False)
        self.cut = self.transform
        self.size = cfg.INPUT.CLASSIFICATION.SIZE
        if cfg.INPUT.CLASSIFICATION.TRANSFORM == "pad_crop":
            self.transform = self._refuse_other_sizes

    def _refuse_other_sizes(self, image: Image.Image) -> Image.Image:
        if image.size != (self.size, self.size):
            raise ValueError(
                f"'{image.filename}' is {image.width} x {image.height} pixels: with "
                "DATALOADER.IN_MEMORY and INPUT.CLASSIFICATION.TRANSFORM 'pad_crop', images have "
                f"to be INPUT.CLASSIFICATION.SIZE, {self.size} x {self.size}; set IN_MEMORY to "
                "False, or TRANSFORM to 'resize'"
            )
        return self.cut(image)


class MemoryLoader(TrainingLoader):
    """
    A :class:`.TrainingLoader` of :class:`ImagesInMemory`, without worker processes. Crops and flips
    of a batch are drawn at once, and follow from the seed and the batch's number.

    Args:
        cfg: INPUT.CLASSIFICATION and INPUT.RANDOM_FLIP say how images are augmented.
        others: of :class:`.TrainingLoader`.
    """

    def __init__(self, cfg: CfgNode, dataset: ImagesInMemory, *args: Any, **options: Any) -> None:
        super().__init__(dataset, *args, **options)
        options = cfg.INPUT.CLASSIFICATION
        self.pad = options.PAD if options.TRANSFORM == "pad_crop" else 0
        self.flip = {"horizontal": -1, "vertical": -2}.get(cfg.INPUT.RANDOM_FLIP)

    def _load(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator()
        for samples in self._samples_of_batches():
            batch = self.dataset.__getitems__([index for _, index in samples])
            generator.manual_seed(seed_of(f"{self.seed}/{samples[0][0]}"))
            yield {**batch, "image": augment(batch["image"], self.pad, self.flip, generator)}


def augment(images: Tensor, pad: int, flip: int | None, generator: torch.Generator) -> Tensor:
    """
    Return images (N, C, H, W), each cut out of itself with ``pad`` black pixels around, at a random
    place, and every other one, at random, turned round in the dimension ``flip``.
    """
    count, _, height, width = images.shape
    if pad:
        padded = F.pad(images, [pad] * 4)
        places = torch.randint(2 * pad + 1, (count, 2), generator=generator).tolist()
        cut = [
            p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, places, strict=True)
        ]
        images = torch.stack(cut)
    if flip is not None:
        turned = torch.rand(count, generator=generator) < 0.5
        images = torch.where(turned[:, None, None, None], images.flip(flip), images)
    return images


def build_memory_test_loader(dataset: ImagesInMemory, batch_size: int) -> DataLoader:
    """Build a loader of every image once, in order, shared out over the processes."""
    sampler = BatchSampler(InferenceSampler(len(dataset)), batch_size, drop_last=False)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_as_it_is)


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def holds_in_memory(cfg: CfgNode) -> bool:
    """
    Return DATALOADER.IN_MEMORY.

    Raises:
        ValueError: other keys do not go with it.
    """
    if cfg.DATALOADER.IN_MEMORY:
        try:
            choose(cfg, "INPUT.CLASSIFICATION.TRANSFORM", "pad_crop", "resize")
            choose(cfg, "DATALOADER.DECODER", "pillow")
        except ValueError as error:
            raise ValueError(f"with DATALOADER.IN_MEMORY, {error}, or set it to False") from None
    return cfg.DATALOADER.IN_MEMORY
