"""COCO data sets of one's own by config keys alone, and a look at them before training."""

import json
import logging
import os
from itertools import zip_longest

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_instances

from .catalog import (
    check_registered,
    own_entries,
    refuse_taken,
    shorten,
    used_datasets,
    where_to_put,
)

__all__ = ["check_detection_datasets", "register_coco_from_config"]

logger = logging.getLogger(__name__)


def register_coco_from_config(cfg: CfgNode) -> None:
    """Register every data set listed in ``cfg.DATASETS.COCO_INSTANCES`` with Detectron2.

    Each entry is ``[name, annotation file, image folder]``, all strings. Relative paths are tried
    from the current folder first, then from ``DETECTRON2_DATASETS``. No file is opened here:
    :func:`check_detection_datasets` does that for the sets that are used. Registering the same
    entry again changes nothing.

    Raises:
        ValueError: an entry has another form, or its name belongs to another data set already.
    """
    for name, *paths in own_entries(cfg, "COCO_INSTANCES"):
        if name in DatasetCatalog:
            # as_dict leaves out what is computed on access: the shapes are not generated for this.
            known = MetadataCatalog.get(name).as_dict()
            known = known.get("json_file"), known.get("image_root")
            refuse_taken("COCO_INSTANCES", name, known, paths)
        else:
            register_coco_instances(name, {}, *paths)


def check_detection_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Check the data sets of a detection config before a model is built.

    For each data set in ``DATASETS.TRAIN`` and ``DATASETS.TEST``: it is registered, its
    annotation file and images are there, it has as many classes as the model, and all sets agree
    on the names of the classes. Sets whose classes Detectron2 knows beforehand (COCO, LVIS) are
    not parsed; of the others every image has to be on disk. The generated shapes are generated in
    passing. Sets without an annotation file in COCO's form are logged as unchecked.

    Args:
        cfg: a config with ``DATASETS.COCO_INSTANCES``, registered already.
        training: False for evaluation only, which does not need ``DATASETS.TRAIN``.

    Raises:
        FileNotFoundError: an annotation file, an image folder or images are missing.
        ValueError: anything else; the message names the data set and what to change.
    """
    names = used_datasets(cfg, training)
    check_registered(names)
    classes = {}
    for name in names:
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file") is None:
            logger.info("Data set '%s' has no COCO annotation file: not checked.", name)
            continue
        _check_files(cfg, metadata)
        known = metadata.get("thing_classes")
        trained = training and name in cfg.DATASETS.TRAIN
        classes[name] = list(known) if known else _read_classes(metadata, trained)
        _check_num_classes(cfg, name, classes[name])
    _check_same_classes(classes)


def _check_files(cfg: CfgNode, metadata: Metadata) -> None:
    files, folder = metadata.json_file, metadata.get("image_root")
    remedy = where_to_put(cfg, "COCO_INSTANCES", metadata.name)
    where = f"Data set '{metadata.name}':"
    if "://" not in files and not os.path.isfile(files):
        raise FileNotFoundError(f"{where} there is no annotation file '{files}'. {remedy}")
    if folder is None or "://" in folder:
        return
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{where} there is no image folder '{folder}'. {remedy}")
    with os.scandir(folder) as content:
        if next(content, None) is None:
            raise FileNotFoundError(f"{where} the image folder '{folder}' is empty. {remedy}")


def _read_classes(metadata: Metadata, trained: bool) -> list[str]:
    """The names of the classes in the order of their ids, as Detectron2 will number them."""
    file = metadata.json_file
    where = f"Data set '{metadata.name}': '{file}'"
    if "://" in file:
        logger.info("%s is not on this machine: not checked.", where)
        return []
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    try:
        categories = sorted((c["id"], c["name"]) for c in content["categories"])
        images = [image["file_name"] for image in content["images"]]
        annotations = content["annotations"] if trained else True
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is not in COCO's form, an object with the lists 'images' (id, file_name, "
            f"height, width), 'annotations' and 'categories' (id, name): {error!r}"
        ) from error
    found = {"categories": categories, "images": images, "annotations": annotations}
    for part, value in found.items():
        if not value:
            raise ValueError(f"{where} has no {part}.")
    _check_images(where, metadata.get("image_root"), images)
    return [name for _, name in categories]


def _check_images(where: str, folder: str | None, images: list[str]) -> None:
    if folder is None or "://" in folder:
        return
    present = set(os.listdir(folder))  # one look instead of one per image
    missing = [
        image
        for image in images
        if image not in present and not os.path.exists(os.path.join(folder, image))
    ]
    if missing:
        raise FileNotFoundError(
            f"{where} names {len(images)} images, {len(missing)} of which are not in '{folder}': "
            f"{shorten(missing, 3)}"
        )


def _check_num_classes(cfg: CfgNode, name: str, classes: list[str]) -> None:
    architecture = cfg.MODEL.META_ARCHITECTURE
    if "RetinaNet" in architecture:
        key, wanted = "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    elif "GeneralizedRCNN" in architecture:
        key, wanted = "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    else:
        logger.info("%s: its number of classes is not checked.", architecture)
        return
    if classes and len(classes) != wanted:
        raise ValueError(
            f"Data set '{name}' has {len(classes)} classes, the model is set to {wanted}: set "
            f"{key} to {len(classes)}."
        )


def _check_same_classes(classes: dict[str, list[str]]) -> None:
    known = [(name, names) for name, names in classes.items() if names]
    for (first, reference), (other, names) in zip(known, known[1:], strict=False):
        for index, (a, b) in enumerate(zip_longest(reference, names)):
            if a != b:
                raise ValueError(
                    f"Data sets '{first}' and '{other}' differ in their classes: class {index} "
                    f"is {a!r} in the one and {b!r} in the other. All sets of a config need the "
                    "same classes in the same order of their ids."
                )
