"""Images in one folder per class: ImageNet, and one's own by a config key alone."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, is_image_file, make_dataset

from .catalog import datasets_root, new_entries, shorten

__all__ = [
    "FolderMetadata",
    "check_image_folder",
    "load_image_folder",
    "register_image_folders_from_config",
    "register_imagenet",
]

logger = logging.getLogger(__name__)


class FolderMetadata(Metadata):
    """Metadata of a folder that holds one folder of images per class.

    ``path`` is absolute or below ``DETECTRON2_DATASETS``. What follows from it is read at every
    use: that folder may change after the import, and its content is nobody's to know at import.
    """

    @property
    def image_root(self) -> str:
        return os.path.join(datasets_root(), self.path)

    @property
    def thing_classes(self) -> list[str]:
        """The names of the class folders, sorted: a class's index is its label."""
        return find_classes(self.image_root)[0]


def _register(name: str, path: str) -> None:
    DatasetCatalog.register(name, lambda: load_image_folder(MetadataCatalog.get(name).image_root))
    MetadataCatalog[name] = FolderMetadata(name=name, path=path, evaluator_type="classification")


def load_image_folder(folder: str) -> list[dict]:
    """Dataset dicts of a folder of class folders, read as torchvision's ImageFolder reads it.

    Files that are no images by their names are counted in the log.
    """
    others = []

    def is_image(file: str) -> bool:
        found = is_image_file(file)
        if not found:
            others.append(os.path.relpath(file, folder))
        return found

    _, labels = find_classes(folder)
    files = make_dataset(folder, labels, is_valid_file=is_image)
    if others and comm.is_main_process():
        message = (
            f"'{folder}': {len(others)} files are no images by their names ({shorten(others, 3)}): "
            "they are not used."
        )
        log_first_n(logging.WARNING, message, key="message", name=__name__)
    return [{"file_name": f, "image_id": i, "label": label} for i, (f, label) in enumerate(files)]


def register_imagenet() -> None:
    """Register ``imagenet_train`` and ``imagenet_val`` with Detectron2; no file is looked at.

    They are ``imagenet/train`` and ``imagenet/val`` below ``DETECTRON2_DATASETS``, with one folder
    per class, as torchvision.datasets.ImageNet unpacks the original archives.
    """
    for split in ("train", "val"):
        _register(f"imagenet_{split}", os.path.join("imagenet", split))


def register_image_folders_from_config(cfg: CfgNode) -> None:
    """Register every data set listed in ``cfg.DATASETS.IMAGE_FOLDERS`` with Detectron2.

    Each entry is ``[name, folder]``, both strings. The folder holds one folder of images per
    class; their sorted names are the classes. A relative path is tried from the current folder
    first, then from ``DETECTRON2_DATASETS``. No file is looked at here. Registering the same entry
    again changes nothing.

    Raises:
        ValueError: an entry has another form, or its name belongs to another data set already.
    """
    for name, path in new_entries(cfg, "IMAGE_FOLDERS", "path"):
        _register(name, path)


def check_image_folder(metadata: FolderMetadata, remedy: str) -> None:
    """Check that there is a folder of images for every class, without listing them all.

    Args:
        metadata: of the data set.
        remedy: what to do where there is no such folder, a sentence.

    Raises:
        FileNotFoundError: the folder is not there, has no class folders, or class folders without
            an image, which are named.
    """
    folder = metadata.image_root
    where = f"Data set '{metadata.name}':"
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{where} there is no folder '{folder}'. {remedy}")
    with os.scandir(folder) as entries:
        loose = sum(is_image_file(entry.name) and not entry.is_dir() for entry in entries)
    try:
        classes, _ = find_classes(folder)
    except FileNotFoundError as error:
        found = f"{loose} images, but no folders" if loose else "no folders"
        raise FileNotFoundError(
            f"{where} '{folder}' holds {found}: it has to hold one folder of images per class, "
            "whose name is that of the class. (torchvision.datasets.ImageNet unpacks ImageNet's "
            "archives so.)"
        ) from error
    empty = [name for name in classes if not _holds_image(os.path.join(folder, name))]
    if empty:
        raise FileNotFoundError(
            f"{where} in '{folder}', {len(empty)} of {len(classes)} class folders hold no image "
            f"({shorten(empty)}). Put images there ({', '.join(IMG_EXTENSIONS)}) or remove them."
        )
    if loose:
        logger.warning(
            "%s %d images in '%s' are in no class folder: they are not used.", where, loose, folder
        )


def _holds_image(folder: str) -> bool:
    """Whether there is an image in a folder or below it; looks no further than the first."""
    below = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                below.append(entry.path)
            elif is_image_file(entry.name):
                return True
    return any(map(_holds_image, below))
