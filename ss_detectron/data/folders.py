"""Images in one folder per class: ImageNet, CIFAR-10 as JPEG, and one's own by a config key."""

import logging
import os
import re
from collections.abc import Callable, Iterable
from functools import cache

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from PIL import Image
from torchvision.datasets.folder import find_classes, make_dataset

from ss_detectron.utils.text import abbreviate

from .catalog import datasets_root, new_entries, where_to_put

# Of the formats that Pillow reads, those of pictures; HEIF where a plug-in of one's own reads it.
FORMATS = {"AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA"}
FORMATS |= {"TIFF", "WEBP"}
# What macOS, Jupyter, Windows and storage devices put between one's files.
_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
HIDDEN = re.compile(rf"(^|/)(\.|({'|'.join(map(re.escape, _FOLDERS))})(/|$))")


@cache
def _extensions() -> tuple[str, ...]:
    return tuple(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)


def is_image(name: str) -> bool:
    """Say whether a path is that of an image by its name, and of no hidden file or folder."""
    return name.lower().endswith(_extensions()) and not HIDDEN.search(name)


def _find_classes(folder: str) -> list[str]:
    classes = [name for name in find_classes(folder)[0] if not HIDDEN.search(name)]
    if not classes:
        raise FileNotFoundError(f"Couldn't find any class folder in {folder}.")
    return classes


def _remark(unused: Iterable[str]) -> str:
    heic = any(name.lower().endswith((".heic", ".heif")) for name in unused)
    return " HEIC photographs are not read: convert them to JPEG." * heic


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
        return _find_classes(self.image_root)

    def prepare(self, cfg: CfgNode) -> None:
        """Check that there is a folder of images for every class; else raise an OSError."""
        where = f"Data set '{self.name}': "
        try:
            classes = self.thing_classes
        except OSError as error:
            raise type(error)(
                f"{where}'{self.image_root}' has to hold one folder of images per class, whose "
                f"name is that of the class: {error}. {where_to_put()}"
            ) from error
        folders = {name: os.path.join(self.image_root, name) for name in classes}
        if empty := {name: of for name, of in folders.items() if not _holds_image(of)}:
            raise FileNotFoundError(
                f"{where}in '{self.image_root}', {len(empty)} of {len(classes)} class folders hold "
                f"no image ({abbreviate(empty)}). Put images there, or remove the folders."
                + _remark(file for folder in empty.values() for file in os.listdir(folder))
            )


def _holds_image(folder: str) -> bool:
    walk = os.walk(folder, followlinks=True)  # up to the first
    found = (os.path.join(of, file) for of, _, files in walk for file in files)
    return any(is_image(file[len(folder) :]) for file in found)


def load_image_folder(folder: str) -> list[dict]:
    """List the dataset dicts of a folder of class folders, as torchvision's ImageFolder does.

    What is not used is counted in the log: what :func:`is_image` takes for no image in class
    folders, images in none, and hidden folders.
    """
    with os.scandir(folder) as entries:
        unused = [
            entry.name
            for entry in entries
            if (HIDDEN.search(entry.name) if entry.is_dir() else is_image(entry.name))
        ]

    def is_used(file: str) -> bool:
        name = file[len(folder) + 1 :]
        if not (found := is_image(name)):
            unused.append(name)
        return found

    classes = {name: label for label, name in enumerate(_find_classes(folder))}
    files = make_dataset(folder, classes, is_valid_file=is_used)
    if unused and comm.is_main_process():
        message = (
            f"'{folder}': {len(unused)} files or folders are not used, as they are no images by "
            f"their names, hidden or in no class folder: {abbreviate(unused)}.{_remark(unused)}"
        )
        log_first_n(logging.WARNING, message, key="message", name=__name__)
    return [{"file_name": f, "image_id": i, "label": label} for i, (f, label) in enumerate(files)]


def _register(name: str, path: str, chosen: Callable[[int], bool] = lambda i: True) -> None:
    def load() -> list[dict]:
        records = load_image_folder(MetadataCatalog.get(name).image_root)
        return [record for record in records if chosen(record["image_id"])]

    DatasetCatalog.register(name, load)
    MetadataCatalog[name] = FolderMetadata(name=name, path=path, evaluator_type="classification")


def register_image_folders() -> None:
    """
    Register ``imagenet_{train,val}`` and ``cifar10_jpeg_{train,test,fit,val}``; no file is looked
    at.

    They are ``imagenet/train``, ... below ``DETECTRON2_DATASETS``, with one folder per class, as
    torchvision.datasets.ImageNet unpacks the original archives. cifar10_jpeg is CIFAR-10 compressed
    once more, which changes its pixels; val is every tenth image of its train, fit the others.
    """
    for name, split in (
        *(("imagenet", "train"), ("imagenet", "val")),
        *(("cifar10_jpeg", "train"), ("cifar10_jpeg", "test")),
    ):
        _register(f"{name}_{split}", os.path.join(name, split))
    train = os.path.join("cifar10_jpeg", "train")
    _register("cifar10_jpeg_fit", train, lambda i: i % 10 != 9)
    _register("cifar10_jpeg_val", train, lambda i: i % 10 == 9)


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
