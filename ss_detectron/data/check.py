"""A look at all data sets of a config before a model is built."""

import logging

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY

from ss_detectron.utils.trust import is_url

from .catalog import check_registered, shorten, used_datasets, where_to_put
from .cifar import CIFAR10Metadata, read_cifar10
from .coco import check_detection_datasets
from .folders import FolderMetadata, check_image_folder
from .images import skips_unreadable_images
from .loaders import check_loader_options

__all__ = ["check_classification_datasets", "check_datasets"]

logger = logging.getLogger(__name__)


def check_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Check the data sets of a config before a model is built.

    They are registered and fit the meta-architecture; and see
    :func:`check_classification_datasets` and :func:`check_detection_datasets`.

    Args:
        cfg: a config whose own data sets are registered already.
        training: False for evaluation only, which needs ``DATASETS.TEST`` and not
            ``DATASETS.TRAIN``.

    Raises:
        FileNotFoundError: files or folders are missing.
        ImportError: DATALOADER.DECODER is dali, which is not installed.
        ValueError: anything else; the message names what is wrong and what to change.
    """
    key = "TRAIN" if training else "TEST"
    if not cfg.DATASETS[key]:
        raise ValueError(f"DATASETS.{key} names no data set.")
    names = used_datasets(cfg, training)
    check_registered(names)
    _check_downloads(cfg, names)
    architecture = cfg.MODEL.META_ARCHITECTURE
    classifier = _is_classifier(architecture)
    for name in names:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind == "classification" and not classifier:
            raise ValueError(
                f"Data set '{name}' is for classification, but MODEL.META_ARCHITECTURE is "
                f"{architecture!r}: set it to 'ImageClassifier', or choose another data set."
            )
        if kind != "classification" and classifier:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE is {architecture!r}, but data set '{name}' is not for "
                f"classification: its evaluator_type is {kind!r}, not 'classification'."
            )
    if classifier:
        check_classification_datasets(cfg, training=training)
    else:
        if cfg.DATALOADER.DECODER != "pillow":
            raise ValueError(
                f"DATALOADER.DECODER is {cfg.DATALOADER.DECODER!r}, which is for classification; "
                "Detectron2 loads the images for detection: set it to 'pillow'"
            )
        skips_unreadable_images(cfg)
        check_detection_datasets(cfg, training=training)


def check_classification_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Check the data sets of a classification config before a model is built.

    Those in ``DATASETS.TRAIN`` and ``DATASETS.TEST`` are registered, their folders are there with
    an image for every class, they agree on the classes, and these are as many as the model's. The
    keys that say how images are loaded have values that can be followed. Sets that are generated
    when first needed, or that ``DATASETS.DOWNLOAD`` lets be downloaded, are so in passing. No image
    is opened.

    Args:
        cfg: a config with ``DATASETS.IMAGE_FOLDERS``, registered already.
        training: False for evaluation only, which does not need ``DATASETS.TRAIN``.

    Raises:
        FileNotFoundError: folders or images are missing.
        ImportError: DATALOADER.DECODER is dali, which is not installed.
        ValueError: anything else; the message names what is wrong and what to change.
    """
    check_loader_options(cfg, training)
    names = used_datasets(cfg, training)
    check_registered(names)
    classes = {}
    for name in names:
        metadata = MetadataCatalog.get(name)
        if isinstance(metadata, FolderMetadata):
            check_image_folder(metadata, where_to_put(cfg, "IMAGE_FOLDERS", name))
        if isinstance(metadata, CIFAR10Metadata):
            read_cifar10(train=False, download=cfg.DATASETS.DOWNLOAD)
        metadata.get("image_root")  # where a set is generated on access
        classes[name] = list(metadata.get("thing_classes", ()))
        if not classes[name]:
            raise ValueError(
                f"Data set '{name}' does not say its classes: set the thing_classes of "
                f"MetadataCatalog.get('{name}') to their names."
            )
    _check_same_classes(classes)
    wanted = cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES
    for name in names[:1]:
        if len(classes[name]) != wanted:
            raise ValueError(
                f"Data set '{name}' has {len(classes[name])} classes, the model is set to "
                f"{wanted}: set MODEL.IMAGE_CLASSIFIER.NUM_CLASSES to {len(classes[name])}."
            )


def _check_downloads(cfg: CfgNode, names: list[str]) -> None:
    for name in names:
        # as_dict leaves out what is computed on access.
        known = MetadataCatalog.get(name).as_dict()
        for what in ("json_file", "image_root"):
            path = str(known.get(what))
            if not is_url(path):
                continue
            if not cfg.DATASETS.DOWNLOAD:
                raise ValueError(
                    f"Data set '{name}' would be downloaded from {path}: set DATASETS.DOWNLOAD "
                    "True, or download it by hand and register the files."
                )
            logger.info("Data set '%s' is downloaded from %s where it is needed.", name, path)


def _is_classifier(architecture: str) -> bool:
    # By name, as this package's models are imported after its data sets.
    if architecture not in META_ARCH_REGISTRY:
        return False
    model = META_ARCH_REGISTRY.get(architecture)
    return isinstance(model, type) and issubclass(model, META_ARCH_REGISTRY.get("ImageClassifier"))


def _check_same_classes(classes: dict[str, list[str]]) -> None:
    (first, reference), *others = classes.items() or [(None, [])]
    for other, names in others:
        if names == reference:
            continue
        only = [
            f"only '{name}' has {shorten(found)}"
            for name, found in (
                (first, [c for c in reference if c not in names]),
                (other, [c for c in names if c not in reference]),
            )
            if found
        ]
        raise ValueError(
            f"Data sets '{first}' and '{other}' differ in their classes "
            f"({'; '.join(only) or 'they are in another order'}). All sets of a config need the "
            "same."
        )
