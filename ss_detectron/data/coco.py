"""COCO data sets of one's own by config keys alone, and a look at them before training."""

import logging
import os
from itertools import zip_longest

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from .catalog import (
    check_registered,
    own_entries,
    refuse_taken,
    shorten,
    used_datasets,
    where_to_put,
)
from .coco_file import read_coco_file
from .images import skips_unreadable_images

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
    not parsed, which takes long; of the others the annotation file is checked entry by entry, see
    :func:`.read_coco_file`, and every image has to be on disk, unless DATALOADER.UNREADABLE_IMAGES
    is skip. The generated shapes are generated in passing. Sets without an annotation file in
    COCO's form are logged as unchecked.

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
        classes[name] = list(known) if known else _read_classes(cfg, metadata, trained)
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


def _read_classes(cfg: CfgNode, metadata: Metadata, trained: bool) -> list[str]:
    """The names of the classes in the order of their ids, as Detectron2 will number them."""
    file = metadata.json_file
    where = f"Data set '{metadata.name}':"
    if "://" in file:
        logger.info("%s '%s' is not on this machine: not checked.", where, file)
        return []
    try:
        content = read_coco_file(
            file,
            annotated=trained,
            masks=cfg.MODEL.MASK_ON,
            polygons=trained and cfg.INPUT.MASK_FORMAT == "polygon",
        )
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
    if content.strays and comm.is_main_process():
        logger.warning(
            "%s %d of %d annotations are for images that '%s' does not list (annotation ids %s): "
            "they are not used.",
            where,
            len(content.strays),
            len(content.annotations),
            file,
            shorten([str(i) for i in content.strays]),
        )
    images = [image["file_name"] for image in content.images]
    _check_images(cfg, f"{where} '{file}'", metadata.get("image_root"), images)
    return [c["name"] for c in sorted(content.categories, key=lambda c: c["id"])]


def _check_images(cfg: CfgNode, where: str, folder: str | None, images: list[str]) -> None:
    if folder is None or "://" in folder:
        return
    present = set(os.listdir(folder))  # one look instead of one per image
    missing = [
        image
        for image in images
        if image not in present and not os.path.exists(os.path.join(folder, image))
    ]
    if not missing:
        return
    found = (
        f"{where} names {len(images)} images, {len(missing)} of which are not in '{folder}': "
        f"{shorten(missing, 3)}"
    )
    if len(missing) == len(images) or not skips_unreadable_images(cfg):
        raise FileNotFoundError(found)
    if comm.is_main_process():
        logger.warning("%s", found)


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
