"""Images and boxes for detection, by Detectron2's own loading: what of them cannot be used."""

import copy
import logging
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    detection_utils,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from detectron2.data import build_detection_test_loader as build_stock_test_loader
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.transforms import AugInput
from PIL import Image
from torch.utils.data import Dataset

from .boxes import without_unusable_boxes
from .coco import CocoMetadata
from .images import open_image, reading, skips_unreadable_images
from .records import CocoRecords
from .stream import EvaluationLoader, ImageDataset

logger = logging.getLogger(__name__)


class DetectionMapper(DatasetMapper):
    """Detectron2's mapper, which says of an image that it cannot be read, and of nothing else."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read and transform an image and its annotations, step by step as the stock mapper does.

        Raises:
            UnreadableImageError: the image cannot be decoded, or is of another size than the
                annotation's.
            ValueError: annotations that cannot be used, with the image's name.
        """
        record = copy.deepcopy(dataset_dict)
        given = AugInput(_read(record, self.image_format))
        if "sem_seg_file_name" in record:
            name = record.pop("sem_seg_file_name")
            with reading(name):
                given.sem_seg = detection_utils.read_image(name, "L").squeeze(2)
        transforms = self.augmentations(given)
        shape = given.image.shape[:2]
        record["image"] = torch.as_tensor(np.ascontiguousarray(given.image.transpose(2, 0, 1)))
        if given.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(given.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(
                record, shape, transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            try:
                self._transform_annotations(record, transforms, shape)
            except ValueError as error:
                name = record["file_name"]
                raise ValueError(f"annotations of '{name}' cannot be used: {error!r}") from error
        return record


def _read(record: dict[str, Any], form: str) -> np.ndarray:
    # As Detectron2's read_image, and what that overlooks is refused: it asks a PNG for its
    # orientation, for which Pillow decodes it, and ignores all errors of that, so that a damaged
    # one is half black; and it clips 16-bit values at 255.
    image = open_image(record)
    with reading(record["file_name"]):
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its mode is {image.mode}, and Detectron2 takes 8 bits: convert it")
        if image.format == "PNG":
            # The checksums, which takes a few percent of decoding it.
            Image.open(BytesIO(image.fp.getvalue())).verify()
        image.load()
        turned = detection_utils._apply_exif_orientation(image)
        pixels = detection_utils.convert_PIL_to_numpy(turned, form)
        try:
            detection_utils.check_image_size(record, pixels)
        except detection_utils.SizeMismatchError as error:
            if turned.size == image.size or image.size != (record["width"], record["height"]):
                raise
            raise ValueError(
                f"{error} Its EXIF says that it is turned, and its annotations are of the image "
                "as it is stored: remove the orientation from its EXIF"
            ) from error
    # YUV-BT.601 is of float64, which no layer takes.
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)


def load_detection_dicts(
    cfg: CfgNode, names: list[str], *, training: bool
) -> Sequence[dict] | Dataset:
    """Load the dataset dicts of some data sets, or the torch Dataset where one is registered.

    For training, by the keys that say which images are used. What :func:`.without_unusable_boxes`
    leaves out for training is reported for evaluation, too.
    What cannot be loaded is an OSError or a ValueError with the data sets' names.
    """
    filtered = training and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    options: dict[str, Any] = {"filter_empty": filtered}
    if training and cfg.MODEL.KEYPOINT_ON:
        options["min_keypoints"] = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    files = [MetadataCatalog.get(name).as_dict().get("json_file") for name in names]
    where = "Data set " + ", ".join(
        f"'{name}' ('{file}')" if file else f"'{name}'"
        for name, file in zip(names, files, strict=True)
    )
    try:
        if cfg.MODEL.LOAD_PROPOSALS:
            part = "TRAIN" if training else "TEST"
            files = zip(cfg.DATASETS[part], cfg.DATASETS[f"PROPOSAL_FILES_{part}"], strict=True)
            options["proposal_files"] = list(map(dict(files).get, names))
        if all(isinstance(MetadataCatalog.get(name), CocoMetadata) for name in names) and (
            not cfg.MODEL.LOAD_PROPOSALS
        ):
            dicts = _load_records(names, **options)
        else:
            dicts = get_detection_dataset_dicts(names, **options)
    except OSError:
        raise
    except Exception as error:  # what it takes for granted fails in many ways
        raise ValueError(f"{where}: Detectron2 cannot load it: {error!r}") from error
    if isinstance(dicts, Dataset) or (dicts and "annotations" not in dicts[0]):
        return dicts
    dicts = without_unusable_boxes(dicts, where, training=training)
    # Detectron2's weighted samplers load the data sets again, and have to find the same images.
    if filtered and not cfg.DATALOADER.SAMPLER_TRAIN.startswith("Weighted"):
        dicts = _with_objects(dicts)
    if not dicts:
        raise ValueError(f"{where}: no image has an object that can be used.")
    return dicts


def _load_records(names: list[str], *, filter_empty: bool, min_keypoints: int = 0) -> CocoRecords:
    # As get_detection_dataset_dicts does, which makes every dict.
    records = CocoRecords.joined([MetadataCatalog.get(name).records() for name in names])
    if filter_empty:
        records = _with_objects(records)
    if min_keypoints:
        before = len(records)
        records = records.with_keypoints(min_keypoints)
        logger.info("%d images have fewer than %d keypoints.", before - len(records), min_keypoints)
    detection_utils.check_metadata_consistency("thing_classes", names)
    objects = [{"category_id": label} for label in records.classes()]
    print_instances_class_histogram(
        [{"annotations": objects}], MetadataCatalog.get(names[0]).thing_classes
    )
    return records


def _with_objects(dicts: Sequence[dict]) -> Sequence[dict]:
    if not isinstance(dicts, CocoRecords):
        return filter_images_with_only_crowd_annotations(dicts)
    records = dicts.with_objects()
    logger.info("%d images have no objects; %d are left.", len(dicts) - len(records), len(records))
    return records


def build_detection_test_loader(cfg: CfgNode, dataset_name: str) -> Any:
    """Build a loader of every image of a data set once, in order, shared out over the processes.

    Returns:
        a loader of batches of one image, as Detectron2's. Images that cannot be read are left out,
        or an error, as DATALOADER.UNREADABLE_IMAGES says.

    Raises:
        OSError, ValueError: see :func:`load_detection_dicts`.
    """
    dicts = load_detection_dicts(cfg, [dataset_name], training=False)
    mapper = DetectionMapper(cfg, False)
    workers = cfg.DATALOADER.NUM_WORKERS
    if isinstance(dicts, Dataset):
        return build_stock_test_loader(dicts, mapper=mapper, num_workers=workers)
    dataset = ImageDataset(dicts, mapper, skip=skips_unreadable_images(cfg), replace=False)
    return EvaluationLoader(dataset, batch_size=1, num_workers=workers)
