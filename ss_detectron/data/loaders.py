"""Loaders of images for classification, which give stacked batches, and for detection."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ss_detectron.config import choose
from ss_detectron.utils.random_state import seeded
from ss_detectron.utils.text import abbreviate

from .catalog import class_names
from .dali import DaliLoader, EncodedImageMapper
from .detection import DetectionMapper, load_detection_dicts
from .images import ClassificationMapper, skips_unreadable_images
from .memory import (
    ImagesInMemory,
    MemoryLoader,
    WholeImageMapper,
    build_memory_test_loader,
    holds_in_memory,
)
from .records import CocoRecords
from .stream import EvaluationLoader, ImageDataset, TrainingLoader

logger = logging.getLogger(__name__)


def build_classification_train_loader(cfg: CfgNode) -> TrainingLoader:
    """Build an endless loader of the images in DATASETS.TRAIN, in a new order every epoch.

    Together, the processes see every image once per epoch; ``len(loader.dataset)`` is the number
    of images in one. SEED determines all batches; the order, crops and flips of DATALOADER.DECODER
    dali are those of pillow.

    Returns:
        a loader of the batches of one pass, of which ACCUMULATION_STEPS make a step: "image"
        (N, C, SIZE, SIZE) as of :class:`.ClassificationMapper`, with dali on the model's device;
        "label" int64 (N,) and "file_name" list[str].

    Raises:
        ImportError: the decoder is dali, which is not installed.
        ValueError: a value of a key that is unknown, out of range or not for this decoder; a label
            that does not fit; an image that cannot be held in memory.
    """
    size, mapper = _images_per_pass(cfg), build_training_mapper(cfg)
    in_memory = holds_in_memory(cfg)
    if in_memory:
        loader, mapper = partial(MemoryLoader, cfg), WholeImageMapper(cfg)
    elif isinstance(mapper, EncodedImageMapper):
        loader = partial(DaliLoader, cfg)
    else:
        loader = partial(TrainingLoader, pin_memory=_pins_memory(cfg))
    records = [record for name in cfg.DATASETS.TRAIN for record in _load(cfg, name)]
    images = ImageDataset(records, mapper, skip=skips_unreadable_images(cfg), replace=True)
    return loader(
        ImagesInMemory(images) if in_memory else images,
        lambda seed: TrainingSampler(len(records), seed=seed),
        size,
        seed=_training_seed(cfg),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_training_mapper(cfg: CfgNode) -> ClassificationMapper | EncodedImageMapper:
    """Build the mapper of training images for DATALOADER.DECODER, if the other keys let it."""
    if choose(cfg, "DATALOADER.DECODER", "pillow", "dali") == "pillow":
        return ClassificationMapper(cfg, training=True)
    try:
        choose(cfg, "INPUT.CLASSIFICATION.TRANSFORM", "resized_crop")
        choose(cfg, "INPUT.FORMAT", "RGB", "BGR")
        # It decodes a batch as a whole, and cannot go on after an error.
        choose(cfg, "DATALOADER.UNREADABLE_IMAGES", "error")
    except ValueError as error:
        raise ValueError(
            f"with DATALOADER.DECODER 'dali', {error}, or the decoder 'pillow'"
        ) from None
    mapper = EncodedImageMapper(cfg)
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"NVIDIA DALI cannot be imported ({error}): `pip install ss-detectron[dali]`, or set "
            "DATALOADER.DECODER to 'pillow'"
        ) from error
    return mapper


def build_classification_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build a loader of every image of a data set once, in order, shared out over the processes.

    Returns:
        a loader of batches as in training, of up to TEST.CLASSIFICATION.IMS_PER_BATCH images.
        Images that cannot be read are left out, or an error, as DATALOADER.UNREADABLE_IMAGES says.

    Raises:
        ValueError: see :class:`.ClassificationMapper`; a label that does not fit.
    """
    mapper = ClassificationMapper(cfg, training=False)
    skip = skips_unreadable_images(cfg)
    images = ImageDataset(_load(cfg, dataset_name), mapper, skip=skip, replace=False)
    if holds_in_memory(cfg):
        return build_memory_test_loader(
            ImagesInMemory(images), cfg.TEST.CLASSIFICATION.IMS_PER_BATCH
        )
    return EvaluationLoader(
        images,
        cfg.TEST.CLASSIFICATION.IMS_PER_BATCH,
        default_collate,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=_pins_memory(cfg),
    )


def build_resumable_detection_train_loader(cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
    """Build Detectron2's training loader, by the same keys, as a :class:`TrainingLoader`.

    Returns:
        a loader of the batches of one pass, of which ACCUMULATION_STEPS make a step; Detectron2's
        own, which cannot be resumed, where the data set is a torch Dataset and not a list.

    Raises:
        OSError, ValueError: see :func:`.load_detection_dicts`; SOLVER.IMS_PER_BATCH cannot be
            shared out.
    """
    size = _images_per_pass(cfg)
    dicts = load_detection_dicts(cfg, cfg.DATASETS.TRAIN, training=True)
    mapper = DetectionMapper(cfg, True)
    if isinstance(dicts, Dataset):
        total = size * comm.get_world_size()
        return build_detection_train_loader(
            cfg, dataset=dicts, mapper=mapper, total_batch_size=total
        )
    dataset = ImageDataset(dicts, mapper, skip=skips_unreadable_images(cfg), replace=True)
    return TrainingLoader(
        dataset,
        partial(_detection_sampler, cfg, dataset.records),
        size,
        seed=_training_seed(cfg),
        wide=_which_are_wide(dicts) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
    )


def _which_are_wide(dicts: Sequence[dict]) -> list[bool] | None:
    if isinstance(dicts, CocoRecords):
        return (dicts.images["size"][:, 0] > dicts.images["size"][:, 1]).tolist()
    try:
        return [record["width"] > record["height"] for record in dicts]
    except KeyError as missing:
        logger.warning("DATALOADER.ASPECT_RATIO_GROUPING is not followed: no %s is known.", missing)
        return None


def _detection_sampler(cfg: CfgNode, records: DatasetFromList, seed: int) -> Sampler[int]:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    # Of a loader that is not used, as Detectron2 makes samplers nowhere else. Those that take no
    # seed from the config draw one.
    with seeded(seed):
        loader = build_detection_train_loader(
            cfg, dataset=records, mapper=list, aspect_ratio_grouping=False, num_workers=0
        )
    return loader.dataset.sampler


def _training_seed(cfg: CfgNode) -> int:
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def _images_per_pass(cfg: CfgNode) -> int:
    images, passes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    processes = comm.get_world_size()
    if passes < 1 or images < 1 or images % (processes * passes):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {processes} processes cannot share out in "
            f"{passes} equal passes (SOLVER.ACCUMULATION_STEPS)"
        )
    return images // (processes * passes)


def _load(cfg: CfgNode, name: str) -> list[dict]:
    classes = cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES
    records = DatasetCatalog.get(name)
    if not records:
        raise ValueError(f"Data set '{name}' has no images.")
    for record in records:
        label = record.get("label")
        if "file_name" in record and isinstance(label, Integral) and 0 <= label < classes:
            continue
        raise ValueError(
            f"Data set '{name}': an image needs a 'file_name' and, as NUM_CLASSES is {classes}, an "
            f"integer 'label' from 0 to {classes - 1}; got the keys {sorted(record)}, the name "
            f"{record.get('file_name')!r} and the label {label!r}."
        )
    counts = Counter(record["label"] for record in records)
    names = class_names([name]) or [f"class {label}" for label in range(classes)]
    each = abbreviate((f"{label} ({counts[i]})" for i, label in enumerate(names)), 50)
    message = f"Data set '{name}': {len(records)} images; of each class: {each}."
    if comm.is_main_process():
        log_first_n(logging.INFO, message, key="message", name=__name__)
    return records


def _pins_memory(cfg: CfgNode) -> bool:
    return torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available()
