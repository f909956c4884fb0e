"""COCO data sets of one's own by config keys alone, and a look at them before training."""

import logging
import os
import re
from pathlib import PureWindowsPath
from urllib.parse import unquote

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ss_detectron.utils.text import abbreviate

from .catalog import new_entries, where_to_put
from .coco_index import CocoIndex, read_index
from .images import skips_unreadable_images
from .records import CocoRecords

logger = logging.getLogger(__name__)


class CocoMetadata(Metadata):
    """Metadata of a data set in COCO's form whose annotation file is read as repaired.

    What ``as_dict`` returns has the file itself.
    """

    @property
    def json_file(self) -> str:
        """The file that Detectron2 and pycocotools are to read: itself or a repaired copy."""
        return self._index().path

    def records(self) -> CocoRecords:
        """Return the dataset dicts, which stay in the file, and learn their classes."""
        return self._index().records(self.image_root, self.name)

    def _index(self) -> CocoIndex:
        return read_index(PathManager.get_local_path(self.as_dict()["json_file"]))


def register_coco_from_config(cfg: CfgNode) -> None:
    """Register every data set listed in ``cfg.DATASETS.COCO_INSTANCES`` with Detectron2.

    Each entry is ``[name, annotation file, image folder]``, all strings. Relative paths are tried
    from the current folder first, then from ``DETECTRON2_DATASETS``. No file is opened here:
    :func:`.check_datasets` does that for the sets that are used. Registering the same entry again
    changes nothing.

    Raises:
        ValueError: an entry has another form, or its name belongs to another data set already.
    """
    for name, *paths in new_entries(cfg, "COCO_INSTANCES", "json_file", "image_root"):
        _register(name, *paths)


def _register(name: str, json_file: str, image_root: str) -> None:
    metadata = CocoMetadata(
        name=name, evaluator_type="coco", json_file=json_file, image_root=image_root
    )
    # A list, which others than this package's loaders may change.
    DatasetCatalog.register(name, lambda: metadata.records()[:])
    MetadataCatalog[name] = metadata


def check_coco(cfg: CfgNode, metadata: Metadata, training: bool) -> list[str]:
    """Check a data set in COCO's form; return the names of its classes as Detectron2 orders them.

    Its files are there. Sets whose classes are known beforehand (COCO, LVIS) are not parsed, which
    takes long; of the others the annotation file is checked, see :func:`.read_index`, and
    every image has to be on disk, unless DATALOADER.UNREADABLE_IMAGES is skip. Of what is not on
    this machine, no class is known. Sets that are only evaluated (not ``training``) need less.
    """
    file, folder = metadata.as_dict()["json_file"], metadata.get("image_root")
    where = f"Data set '{metadata.name}':"
    if "://" not in file and not os.path.isfile(file):
        raise FileNotFoundError(f"{where} there is no annotation file '{file}'. {where_to_put()}")
    if folder is not None and "://" in folder:
        folder = None
    if folder is not None and not (os.path.isdir(folder) and any(os.scandir(folder))):
        raise FileNotFoundError(
            f"{where} there is no image folder '{folder}', or nothing in it. {where_to_put()}"
        )
    if known := metadata.get("thing_classes"):
        return list(known)
    if "://" in file:
        return []
    polygons = training and cfg.INPUT.MASK_FORMAT == "polygon"
    try:
        index = read_index(file, annotated=training, masks=cfg.MODEL.MASK_ON * (1 + polygons))
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
    if not isinstance(metadata, CocoMetadata) and index.path != file:
        raise ValueError(
            f"{where} '{file}' can only be used as repaired, which the log has: name it in "
            "DATASETS.COCO_INSTANCES, or repair it."
        )
    if folder is not None:
        _check_images(cfg, f"{where} '{file}'", folder, index.names)
    if training:
        _note_unused_classes(f"{where} '{file}'", index)
    return [name for _, name in index.categories]


def _check_images(cfg: CfgNode, where: str, folder: str, names: list[str]) -> None:
    present = set(os.listdir(folder))  # one look instead of one per image
    missing = [
        name
        for name in names
        if name not in present and not os.path.exists(os.path.join(folder, name))
    ]
    if not missing:
        return
    found = (
        f"{where} names {len(names)} images, {len(missing)} of which are not in '{folder}': "
        f"{abbreviate(missing)}"
    )
    similar = {
        _stem(file): os.path.relpath(os.path.join(place, file), folder)
        for place, _, files in os.walk(folder)
        for file in files
    }
    if near := [f"'{n}' as '{similar[_stem(n)]}'" for n in missing if _stem(n) in similar]:
        found += f". {len(near)} seem to be there: {abbreviate(near)}. Write these into the file."
    if len(missing) == len(names) or not skips_unreadable_images(cfg):
        raise FileNotFoundError(found)
    if comm.is_main_process():
        logger.warning("%s", found)


def _stem(name: str) -> str:
    """A file's name without folders of any system, extension, case, %20 and a service's marks.

    Label Studio's is 1a2b3c4d-x.jpg, Roboflow's x_jpg.rf.1a2b3c.jpg.
    """
    stem = PureWindowsPath(unquote(name)).stem.lower()
    return re.sub(r"^[0-9a-f]{8}-|_[a-z0-9]+\.rf\.[0-9a-z]+$", "", stem)


def _note_unused_classes(where: str, index: CocoIndex) -> None:
    used = {*index.objects["category"].tolist()}
    unused = [name for label, (_, name) in enumerate(index.categories) if label not in used]
    if unused and comm.is_main_process():
        message = (
            "%s: %d of %d categories have no objects: %s. They are classes like the others, even "
            "where they are only their supercategory."
        )
        logger.warning(message, where, len(unused), len(index.categories), abbreviate(unused))
