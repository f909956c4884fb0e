"""Images and boxes for detection, by Detectron2's own loading: what of them cannot be used."""

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data import build_detection_test_loader as build_stock_test_loader
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.samplers import InferenceSampler
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from .boxes import without_unusable_boxes
from .images import UnreadableImageError, skips_unreadable_images
from .stream import ImageDataset

__all__ = ["DetectionMapper", "build_detection_test_loader", "load_detection_dicts"]


# Images ------------------------------------------------------------------------------------------


class DetectionMapper(DatasetMapper):
    """Detectron2's mapper, to which whatever cannot be used is an UnreadableImageError."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            UnreadableImageError: an image that cannot be decoded, or does not fit its annotations,
                by its name.
        """
        name = dataset_dict["file_name"]
        try:
            _check_image(name)
            return super().__call__(dataset_dict)
        except Exception as error:  # Pillow's decoders raise errors of all kinds
            raise UnreadableImageError(f"'{name}' cannot be used: {_describe(error)}") from error


def _check_image(name: str) -> None:
    """What Detectron2's read_image overlooks.

    It asks a PNG for its orientation, for which Pillow decodes it, and ignores all errors of that:
    a damaged one is half black. And it clips 16-bit values at 255.
    """
    with PathManager.open(name, "rb") as file, Image.open(file) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"its values are of mode {image.mode}, and Detectron2 takes 8 bits: convert it"
            )
        if image.format == "PNG":
            image.verify()  # the checksums, which takes a few percent of decoding it


def _describe(error: Exception) -> str:
    known = isinstance(error, (OSError, ValueError))
    return str(error) if known and str(error) else repr(error)


# Data sets ---------------------------------------------------------------------------------------


def load_detection_dicts(cfg: CfgNode, names: list[str], *, training: bool) -> list[dict] | Dataset:
    """Detectron2's dataset dicts of some data sets, together.

    For training, by the keys that say which images are used, without the boxes that nothing can be
    learned from: those without area, and those outside their image. How many there are is logged,
    and how many reach beyond their image, which Detectron2 clips.

    Returns:
        the dataset dicts, or a torch Dataset where one is registered.

    Raises:
        OSError: files are missing.
        ValueError: the data sets cannot be loaded, or nothing in them can be used.
    """
    options = {"filter_empty": False}  # which is done below
    if training and cfg.MODEL.KEYPOINT_ON:
        options["min_keypoints"] = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    if cfg.MODEL.LOAD_PROPOSALS:
        options["proposal_files"] = _proposal_files(cfg, names, training)
    try:
        dicts = get_detection_dataset_dicts(names, **options)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{_where(names)}: Detectron2 cannot load it: {_describe(error)}"
        ) from error
    if not training or not isinstance(dicts, list) or "annotations" not in dicts[0]:
        return dicts
    where = _where(names)
    filtered = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    # Detectron2's weighted samplers load the data sets again: they have to find the same images.
    weighted = cfg.DATALOADER.SAMPLER_TRAIN.startswith("Weighted")
    if filtered and weighted:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    dicts = without_unusable_boxes(dicts, where)
    if filtered and not weighted:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    if not dicts:
        raise ValueError(f"{where}: no image has an object that can be used.")
    return dicts


def _proposal_files(cfg: CfgNode, names: list[str], training: bool) -> list[str]:
    if training:
        return list(cfg.DATASETS.PROPOSAL_FILES_TRAIN)
    places = [list(cfg.DATASETS.TEST).index(name) for name in names]
    return [cfg.DATASETS.PROPOSAL_FILES_TEST[place] for place in places]


def _where(names: list[str]) -> str:
    """The data sets and their annotation files."""
    files = [MetadataCatalog.get(name).get("json_file") for name in names]
    return "Data set " + ", ".join(
        f"'{name}' ('{file}')" if file else f"'{name}'"
        for name, file in zip(names, files, strict=True)
    )


# Evaluation --------------------------------------------------------------------------------------


class _Readable:
    """The batches of a loader without the images that could not be read."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.dataset = loader.dataset

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.loader:
            images = [image for image in batch if image is not None]
            if images:
                yield images

    def __len__(self) -> int:
        """How many batches there are, had every image been readable."""
        return len(self.loader)


def build_detection_test_loader(cfg: CfgNode, dataset_name: str) -> Any:
    """A loader of every image of a data set once, in order, shared out over the processes.

    Returns:
        a loader of batches of one image, as Detectron2's. Images that cannot be used are left out,
        or an error, as DATALOADER.UNREADABLE_IMAGES says.

    Raises:
        OSError, ValueError: see :func:`load_detection_dicts`.
    """
    dicts = load_detection_dicts(cfg, [dataset_name], training=False)
    mapper = DetectionMapper(cfg, False)
    if not isinstance(dicts, list):
        return build_stock_test_loader(dicts, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)
    dataset = ImageDataset(dicts, mapper, skip=skips_unreadable_images(cfg), replace=False)
    loader = DataLoader(
        dataset,
        sampler=InferenceSampler(len(dataset)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        # Of its own, so that evaluation leaves training's random numbers as they are.
        generator=Generator(),
    )
    return _Readable(loader)
