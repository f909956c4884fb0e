"""Loaders of images for classification, which give stacked batches."""

import logging
from collections.abc import Iterable
from functools import partial
from numbers import Integral
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .images import ClassificationMapper, UnreadableImageError

if TYPE_CHECKING:
    from .dali import DaliLoader

__all__ = [
    "ImageDataset",
    "build_classification_test_loader",
    "build_classification_train_loader",
    "check_loader_options",
]

logger = logging.getLogger(__name__)

# So many unreadable images in a row say that more is wrong than single files.
MAX_UNREADABLE = 100


class ImageDataset(Dataset):
    """The images of dataset dicts, read and transformed when they are asked for."""

    def __init__(
        self, records: list[dict], mapper: ClassificationMapper, *, skip: bool, replace: bool
    ) -> None:
        """
        Args:
            records: the dataset dicts, kept in a form that worker processes share.
            mapper: of a dataset dict.
            skip: whether unreadable images are named and passed over, or an error.
            replace: whether the following image takes the place of one that was passed over.
        """
        self.records = DatasetFromList(records, copy=False)
        self.mapper = mapper
        self.skip = skip
        self.replace = replace
        self.unreadable = set()  # of this process

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """
        Returns:
            what the mapper gives; None for an unreadable image that is not replaced.

        Raises:
            UnreadableImageError: an image, or with ``skip`` and ``replace`` as many of them in a
                row as there are, up to 100.
        """
        for offset in range(min(len(self), MAX_UNREADABLE) if self.replace else 1):
            try:
                return self.mapper(self.records[(index + offset) % len(self)])
            except UnreadableImageError as error:
                self._pass_over(error)
        if not self.replace:
            return None
        raise UnreadableImageError(
            f"{offset + 1} images in a row cannot be read, from "
            f"'{self.records[index]['file_name']}' on: see the warnings for what is wrong with them"
        )

    def _pass_over(self, error: UnreadableImageError) -> None:
        if not self.skip:
            raise UnreadableImageError(
                f"{error}. Repair or remove it, or set DATALOADER.UNREADABLE_IMAGES to 'skip' to "
                "go on without such images."
            ) from error
        if str(error) not in self.unreadable:
            self.unreadable.add(str(error))
            logger.warning(
                "%s. Left out; so far, this process has met %d unreadable images.",
                error,
                len(self.unreadable),
            )


def build_classification_train_loader(cfg: CfgNode) -> "DataLoader | DaliLoader":
    """An endless loader of the images in DATASETS.TRAIN, in a new order every epoch.

    Together, the processes see every image once per epoch; ``len(loader.dataset)`` is the number
    of images in one. SEED and DATALOADER.NUM_WORKERS determine all batches; without workers, the
    augmentation depends on torch's random numbers as the model uses them, too. The order, crops
    and flips of DATALOADER.DECODER dali are those of pillow.

    Returns:
        a loader of the batches of one pass, of which ACCUMULATION_STEPS make a step: "image" uint8
        (N, 3, SIZE, SIZE), with dali on the model's device; "label" int64 (N,) and "file_name"
        list[str].

    Raises:
        ImportError, ValueError: see :func:`check_loader_options`; a label that does not fit.
    """
    size = _images_per_pass(cfg)
    dataset = _build_dataset(cfg, cfg.DATASETS.TRAIN, training=True)
    logger.info("%d images for training in %s.", len(dataset), ", ".join(cfg.DATASETS.TRAIN))
    seed = cfg.SEED if cfg.SEED >= 0 else None
    sampler = TrainingSampler(len(dataset), seed=seed)
    if cfg.DATALOADER.DECODER == "pillow":
        return _build_loader(cfg, dataset, sampler, size)
    dali = _import_dali()
    dataset.mapper = dali.EncodedImageMapper(cfg)
    encoded = _build_loader(
        cfg, dataset, sampler, size, collate_fn=dali.collate_encoded, pin_memory=False
    )
    return dali.DaliLoader(cfg, encoded)


def build_classification_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """A loader of every image of a data set once, in order, shared out over the processes.

    Returns:
        a loader of batches as in training, of up to TEST.CLASSIFICATION.IMS_PER_BATCH images:
        those that cannot be read are left out.

    Raises:
        ValueError: see :func:`check_loader_options`; a label that does not fit.
    """
    dataset = _build_dataset(cfg, [dataset_name], training=False)
    size = cfg.TEST.CLASSIFICATION.IMS_PER_BATCH
    return _build_loader(cfg, dataset, InferenceSampler(len(dataset)), size)


def check_loader_options(cfg: CfgNode, training: bool = True) -> None:
    """Refuse what classification's loaders and transforms cannot follow.

    Args:
        cfg: the config.
        training: False for evaluation only, which never needs NVIDIA DALI.

    Raises:
        ImportError: DATALOADER.DECODER is dali, which is not installed.
        ValueError: names the key, its value and what to choose.
    """
    for augment in (True, False):
        ClassificationMapper(cfg, augment)
    if cfg.DATALOADER.UNREADABLE_IMAGES not in ("error", "skip"):
        raise ValueError(
            f"DATALOADER.UNREADABLE_IMAGES is {cfg.DATALOADER.UNREADABLE_IMAGES!r}; choose 'error' "
            "or 'skip'"
        )
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}; for classification, "
            "choose 'TrainingSampler'"
        )
    if cfg.TEST.CLASSIFICATION.IMS_PER_BATCH < 1:
        raise ValueError(
            f"TEST.CLASSIFICATION.IMS_PER_BATCH is {cfg.TEST.CLASSIFICATION.IMS_PER_BATCH}; choose "
            "at least 1"
        )
    if cfg.DATALOADER.DECODER not in ("pillow", "dali"):
        raise ValueError(
            f"DATALOADER.DECODER is {cfg.DATALOADER.DECODER!r}; choose 'pillow' or 'dali'"
        )
    if training and cfg.DATALOADER.DECODER == "dali":
        _check_dali(cfg)


def _check_dali(cfg: CfgNode) -> None:
    wanted = {
        "INPUT.CLASSIFICATION.TRANSFORM": (cfg.INPUT.CLASSIFICATION.TRANSFORM, "resized_crop"),
        # It decodes a batch as a whole, and cannot go on after an error.
        "DATALOADER.UNREADABLE_IMAGES": (cfg.DATALOADER.UNREADABLE_IMAGES, "error"),
    }
    for key, (value, only) in wanted.items():
        if value != only:
            raise ValueError(
                f"DATALOADER.DECODER is 'dali', which goes with {key} {only!r} only, not "
                f"{value!r}; change that, or set DATALOADER.DECODER to 'pillow'"
            )
    _import_dali()


def _import_dali() -> ModuleType:
    try:
        from . import dali
    except ImportError as error:
        raise ImportError(
            "DATALOADER.DECODER is 'dali', and NVIDIA DALI cannot be imported: install it by "
            "`pip install ss-detectron[dali]`, or set DATALOADER.DECODER to 'pillow'. "
            f"({error})"
        ) from error
    return dali


def _images_per_pass(cfg: CfgNode) -> int:
    images, passes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    parts = comm.get_world_size() * passes
    if passes < 1 or images < 1 or images % parts:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {comm.get_world_size()} processes cannot "
            f"share out in {passes} equal passes (SOLVER.ACCUMULATION_STEPS)"
        )
    return images // parts


def _build_dataset(cfg: CfgNode, names: Iterable[str], training: bool) -> ImageDataset:
    check_loader_options(cfg, training)
    records = [record for name in names for record in _load(cfg, name)]
    if not records:
        raise ValueError("there are no images: DATASETS.TRAIN names no data set")
    skip = cfg.DATALOADER.UNREADABLE_IMAGES == "skip"
    mapper = ClassificationMapper(cfg, training)
    return ImageDataset(records, mapper, skip=skip, replace=training)


def _load(cfg: CfgNode, name: str) -> list[dict]:
    classes = cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES
    records = DatasetCatalog.get(name)
    if not records:
        raise ValueError(f"Data set '{name}' has no images.")
    for record in records:
        if not {"file_name", "label"} <= record.keys():
            raise ValueError(
                f"Data set '{name}': an image needs 'file_name' and 'label', and one has only "
                f"{sorted(record)}."
            )
        label = record["label"]
        if not isinstance(label, Integral) or not 0 <= label < classes:
            raise ValueError(
                f"Data set '{name}': '{record['file_name']}' has the label {label!r}; the model "
                f"takes integers from 0 to {classes - 1}, as MODEL.IMAGE_CLASSIFIER.NUM_CLASSES is "
                f"{classes}."
            )
    return records


def _build_loader(
    cfg: CfgNode, dataset: ImageDataset, sampler: Sampler, batch_size: int, **options: Any
) -> DataLoader:
    # Worker processes take their seeds from a generator of their own, so that they do not depend
    # on what else draws random numbers, and evaluation leaves training as it is.
    generator = torch.Generator()
    if cfg.SEED >= 0:
        generator.manual_seed(cfg.SEED + comm.get_rank())
    else:
        generator.seed()
    options = {
        "collate_fn": partial(_collate, size=cfg.INPUT.CLASSIFICATION.SIZE),
        "pin_memory": torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available(),
        **options,
    }
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        generator=generator,
        **options,
    )


def _collate(images: list[dict[str, Any] | None], size: int) -> dict[str, Any]:
    read = [image for image in images if image is not None]
    if read:
        return default_collate(read)
    return {
        "image": torch.empty((0, 3, size, size), dtype=torch.uint8),
        "label": torch.empty(0, dtype=torch.int64),
        "file_name": [],
    }
