"""A look at all data sets of a config before a model is built."""

import logging

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.modeling import META_ARCH_REGISTRY

from ss_detectron.config import choose
from ss_detectron.utils.text import abbreviate
from ss_detectron.utils.trust import is_url

from .catalog import check_registered
from .coco import check_coco
from .images import ClassificationMapper, skips_unreadable_images
from .loaders import build_training_mapper

logger = logging.getLogger(__name__)

# What says a model's number of classes, by a part of MODEL.META_ARCHITECTURE.
_NUM_CLASSES = {"RetinaNet": "RETINANET", "GeneralizedRCNN": "ROI_HEADS"}


def check_datasets(cfg: CfgNode, *, training: bool = True) -> None:
    """Check the data sets of a config before a model is built.

    Those in ``DATASETS.TRAIN`` and ``DATASETS.TEST`` are registered, fit the meta-architecture,
    agree on the classes, and have as many as the model. Their files are there: see
    :func:`.check_coco`, and the method ``prepare`` of the metadata of others. Sets that are
    generated when first needed, or that ``DATASETS.DOWNLOAD`` lets be downloaded, are so in
    passing. The keys that say how images are loaded can be followed. No image is opened.

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
    trained = cfg.DATASETS.TRAIN if training else ()
    names = list(dict.fromkeys([*trained, *cfg.DATASETS.TEST]))
    check_registered(names)
    classifier = _is_classifier(cfg.MODEL.META_ARCHITECTURE)
    for name in names:
        _check_kind(cfg, MetadataCatalog.get(name), classifier)
    _check_loading(cfg, training, classifier)
    classes = {}
    for name in names:
        metadata = MetadataCatalog.get(name)
        if classifier:
            classes[name] = _check_classification(cfg, metadata)
        elif metadata.as_dict().get("json_file") is not None:
            classes[name] = check_coco(cfg, metadata, name in trained)
    known = {name: found for name, found in classes.items() if found}
    _check_classes(cfg, known, classifier, training)
    for name, found in classes.items() if not training else ():
        if found and not MetadataCatalog.get(name).get("thing_classes"):
            # As they are to be compared with a checkpoint's before the set is loaded.
            MetadataCatalog.get(name).thing_classes = found


def _is_classifier(architecture: str) -> bool:
    # By name, as this package's models are imported after its data sets.
    if architecture not in META_ARCH_REGISTRY:
        return False
    model = META_ARCH_REGISTRY.get(architecture)
    return isinstance(model, type) and issubclass(model, META_ARCH_REGISTRY.get("ImageClassifier"))


def _check_kind(cfg: CfgNode, metadata: Metadata, classifier: bool) -> None:
    known = metadata.as_dict()  # without what is computed, or generated, on access
    for url in filter(is_url, (str(known.get(key)) for key in ("json_file", "image_root"))):
        if not cfg.DATASETS.DOWNLOAD:
            raise ValueError(
                f"Data set '{metadata.name}' would be downloaded from {url}: set DATASETS.DOWNLOAD "
                "True, or download it by hand and register the files."
            )
        logger.info("Data set '%s' is downloaded from %s where it is needed.", metadata.name, url)
    kind = metadata.get("evaluator_type")
    if (kind == "classification") != classifier:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, but data set "
            f"'{metadata.name}' is {'not ' * classifier}for classification (its evaluator_type is "
            f"{kind!r}): 'ImageClassifier' and data sets for classification go together."
        )


def _check_loading(cfg: CfgNode, training: bool, classifier: bool) -> None:
    skips_unreadable_images(cfg)
    if classifier:
        choose(cfg, "DATALOADER.SAMPLER_TRAIN", "TrainingSampler")
        ClassificationMapper(cfg, training=False)
        if training:
            build_training_mapper(cfg)
        if (batch := cfg.TEST.CLASSIFICATION.IMS_PER_BATCH) < 1:
            raise ValueError(f"TEST.CLASSIFICATION.IMS_PER_BATCH is {batch}; choose at least 1")
    elif cfg.DATALOADER.DECODER != "pillow":
        decoder = cfg.DATALOADER.DECODER
        raise ValueError(f"DATALOADER.DECODER is {decoder!r}; for detection, choose 'pillow'")
    # Means of another number would be broadcast, and the image with them.
    channels = {"RGB": 3, "BGR": 3, "YUV-BT.601": 3, "L": 1, "RGBA": 4, "CMYK": 4}
    count = channels[choose(cfg, "INPUT.FORMAT", *channels)]
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != count:
            raise ValueError(
                f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r} and MODEL.{key} {cfg.MODEL[key]}; choose a "
                f"list of {count}"
            )


def _check_classification(cfg: CfgNode, metadata: Metadata) -> list[str]:
    if hasattr(metadata, "prepare"):
        metadata.prepare(cfg)
    metadata.get("image_root")  # where a set is generated on access
    if classes := metadata.get("thing_classes"):
        return list(classes)
    raise ValueError(
        f"Data set '{metadata.name}' does not say its classes: set the thing_classes of "
        f"MetadataCatalog.get('{metadata.name}') to their names."
    )


def _check_classes(
    cfg: CfgNode, classes: dict[str, list[str]], classifier: bool, training: bool
) -> None:
    if not classes:
        return
    (first, reference), *others = classes.items()
    remedy = "Each needs images" if classifier else "List what is missing; it needs no objects"
    for other, names in others:
        if names == reference:
            continue
        lacks = [
            f"'{name}' lacks {abbreviate(missing)}"
            for name, has, all_of in ((other, names, reference), (first, reference, names))
            if (missing := [label for label in all_of if label not in has])
        ]
        raise ValueError(
            f"The classes of data sets '{first}' and '{other}' differ: "
            f"{'; '.join(lacks) or 'their order does'}. All sets of a config need the same, in the "
            f"same order. {remedy}."
        )
    architecture = cfg.MODEL.META_ARCHITECTURE
    parts = [part for name, part in _NUM_CLASSES.items() if name in architecture]
    for part in ["IMAGE_CLASSIFIER"] if classifier else parts:
        wanted = cfg.MODEL[part].NUM_CLASSES
        if len(reference) != wanted:
            raise ValueError(
                f"Data set '{first}' has {len(reference)} classes ({abbreviate(reference)}), the "
                f"model is set to {wanted}: set MODEL.{part}.NUM_CLASSES to {len(reference)}"
                + ("." if training else f", if it was trained on these. Else: {remedy.lower()}.")
            )
