"""Data sets as Pascal VOC and YOLO keep them: read as dataset dicts, written in COCO's form.

The standard library parses and Detectron2 writes. Libraries that convert lose more: globox 2.9.0
takes VOC's corners, which count from 1, for coordinates; datumaro 1.13.12 stops at classes that are
not VOC's own; supervision 0.31.2 makes background of images whose annotations are missing, and
pixels of polygons; none writes difficult objects as crowds.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.data.detection_utils import _apply_exif_orientation
from detectron2.structures import BoxMode

from ss_detectron.utils.text import abbreviate

from .boxes import without_unusable_boxes
from .coco_index import read_index
from .folders import HIDDEN, is_image
from .images import UnreadableImageError, open_image, reading

logger = logging.getLogger(__name__)


@dataclass
class AnnotatedImages:
    """The images of a data set and their objects."""

    image_root: Path
    """What the names of image files are relative to."""
    classes: list[str]
    """In the order of their ids."""
    splits: dict[str, list[dict]]
    """Dataset dicts; their annotations have the name of a "category" in place of its id."""


def read_voc(folder: str | Path, *, zero_based: bool = False) -> AnnotatedImages:
    """Read a folder with Pascal VOC's XML files.

    They are in its ``Annotations`` and the images in its ``JPEGImages`` (or ``annotations`` and
    ``images``), or both in the folder itself. Its splits are the lists in ``ImageSets/Main``;
    without any, it is one of its own name. An image and its XML file have one name, but for the
    extension, whatever is written in it. What is left out is logged: images or XML files without
    the other, and images that cannot be read.

    Pixels count from 1: a box from (1, 1) to (width, height) covers its image. Objects marked as
    difficult become crowds: they are not learned from, and to detect them is neither right nor
    wrong.

    Args:
        folder: its path.
        zero_based: corners are coordinates, as datumaro writes them: a box from (0, 0) to (width,
            height) covers its image.

    Raises:
        FileNotFoundError: there are no XML files.
        ValueError: a file is not of VOC's form.
    """
    root = Path(folder)
    image_root = _first(root, "JPEGImages", "images") or root
    xml_root = _first(root, "Annotations", "annotations") or root
    images: dict[str, str] = {}
    for name in (pictures := _files(image_root, is_image)):
        images.setdefault(os.path.splitext(name)[0], name)
    files = {name[:-4]: xml_root / name for name in _files(xml_root, _is_xml)}
    if not files:
        raise FileNotFoundError(f"there are no XML files in '{xml_root}'")
    lists = _voc_lists(root, {*images, *files})
    if not lists:
        _warn(root, "images without an XML file are left out", images, files)
        lists = {root.resolve().name: list(files)}
    listed = dict.fromkeys(name for names in lists.values() for name in names)
    _warn(root, "listed images without an XML file are left out", listed, files)
    found = [name for name in listed if name in files]
    _warn(root, "XML files without an image are left out", found, images)
    _warn(root, "images of another's name are left out", pictures, images.values())
    records = _open(image_root, {name: images[name] for name in found if name in images})

    resized, before = [], []
    for name, record in records.items():
        try:
            tree = ElementTree.parse(files[name]).getroot()
            record["annotations"] = [_voc_object(node) for node in tree.iterfind("object")]
        except (ElementTree.ParseError, ValueError) as error:
            raise ValueError(f"'{files[name]}' is not of VOC's form: {error}") from error
        stated = [tree.findtext(f"size/{side}") or "0" for side in ("width", "height")]
        if "0" not in stated and stated != [str(record["width"]), str(record["height"])]:
            resized.append(f"{record['file_name']} ({' x '.join(stated)})")
        for box in (annotation["bbox"] for annotation in record["annotations"]):
            if not zero_based:
                before += [record["file_name"]] * (min(box[:2]) < 1)
                box[0] -= 1
                box[1] -= 1
    _warn(root, "images are not of the size in their XML file, which their boxes may fit", resized)
    _warn(root, "boxes begin before pixel 1: zero-based, as other tools write them?", before)
    classes = {a["category"] for record in records.values() for a in record["annotations"]}
    return AnnotatedImages(image_root, sorted(classes), _chosen(records, lists))


def read_yolo(source: str | Path) -> AnnotatedImages:
    """Read a data set with YOLO's text files.

    ``source`` is Ultralytics' data.yaml, or a folder that has one. Any other folder is one split of
    its own name, with its classes in the lines of ``classes.txt``, there or in ``labels``, or of
    ``obj.names``. The text file of an image is in ``labels`` where the image is in ``images``, or
    else beside it; without one, an image has no objects, which is logged. Polygons are kept as
    masks, and boxes are made of them; keypoints are not kept.

    Raises:
        FileNotFoundError: there are no classes, or no text files.
        ValueError: a file is not of YOLO's form.
    """
    source = Path(source)
    file = source / "data.yaml" if source.is_dir() else source
    if file.is_file():
        root, classes, entries, keypoints = _read_data_yaml(file)
    elif names := _first(source, "classes.txt", "labels/classes.txt", "obj.names"):
        root, classes, entries, keypoints = source, _lines(names), {source.resolve().name: ["."]}, 0
    else:
        raise FileNotFoundError(f"'{source}' has neither a data.yaml nor a classes.txt")
    if len({*classes}) < len(classes):
        raise ValueError(f"'{source}' names a class twice: {', '.join(classes)}")
    splits = {split: list(_yolo_images(root, sources)) for split, sources in entries.items()}
    texts = {name: _text_file(root / name) for names in splits.values() for name in names}
    labelled = [name for name, text in texts.items() if text.is_file()]
    if not labelled:
        expected = abbreviate(map(str, texts.values()), 1)
        raise FileNotFoundError(f"'{source}': {len(texts)} images, no text file: {expected}")
    records = _open(root, {name: name for name in texts})
    _warn(root, "images have no text file and so no objects", records, labelled)
    for name, record in records.items():
        lines = _lines(texts[name]) if name in labelled else []
        size = record["width"], record["height"]
        try:
            record["annotations"] = [_yolo_object(li, classes, keypoints, size) for li in lines]
        except ValueError as error:
            raise ValueError(f"'{texts[name]}' is not of YOLO's form: {error}") from error
    _check_fractions(source, records.values())
    return AnnotatedImages(root, classes, _chosen(records, splits))


def _check_fractions(source: Path, records: Iterable[dict]) -> None:
    boxes = [(record, a["bbox"]) for record in records for a in record["annotations"]]
    far = [
        f"{np.divide(box, 2 * [record['width'], record['height']]).round(3).tolist()} of "
        f"{record['file_name']}"
        for record, box in boxes
        if box[2] > 2 * record["width"] or box[3] > 2 * record["height"]
    ]
    if len(far) > len(boxes) / 2:
        raise ValueError(
            f"'{source}': {len(far)} of {len(boxes)} boxes reach beyond twice their image's width "
            f"or height ({abbreviate(far, 1)}): are they in pixels? YOLO's are fractions of these."
        )


def write_coco(images: Iterable[dict], classes: Sequence[str], file: str | Path) -> dict[str, Any]:
    """Write images of :class:`AnnotatedImages` in COCO's form, check and return what was written.

    Left out and logged are objects of other classes, and boxes without area in their image; what
    reaches beyond it is cut off. All ids count from 1: to pycocotools, an object with id 0 is never
    detected.

    Raises:
        FileExistsError: ``file`` is there already.
        ValueError: the boxes are none in pixels, see :func:`.check_plausible`. No file is left.
    """
    if os.path.lexists(file):
        raise FileExistsError(f"'{file}' is there already: remove it or choose another folder")
    dicts, others = [], []
    for image in images:
        annotations = []
        for annotation in image["annotations"]:
            if (category := annotation["category"]) in classes:
                annotations.append({**annotation, "category_id": classes.index(category)})
            else:
                others.append(category)
        dicts.append({**image, "annotations": annotations})
    _warn(file, "objects of other classes are left out", others)
    dicts = without_unusable_boxes(dicts, f"'{file}'")
    for number, image in enumerate(dicts, 1):
        image["image_id"] = number
        for annotation in image["annotations"]:
            sides = 2 * [image["width"], image["height"]]
            annotation["bbox"] = np.clip(annotation["bbox"], 0, sides).tolist()
    name = f"{__name__}: {file}"
    DatasetCatalog.register(name, lambda: dicts)
    try:
        ids = {index + 1: index for index in range(len(classes))}
        metadata = {"thing_classes": list(classes), "thing_dataset_id_to_contiguous_id": ids}
        MetadataCatalog.get(name).set(**metadata)
        content = {"annotations": [], **convert_to_coco_dict(name)}
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    Path(file).write_text(json.dumps(content), encoding="utf-8")
    try:
        read_index(str(file))
    except ValueError:
        Path(file).unlink()
        raise
    return content


def _first(folder: Path, *names: str) -> Path | None:
    return next((path for name in names if (path := folder / name).exists()), None)


def _files(folder: Path, fits: Callable[[str], bool]) -> list[str]:
    """Sorted paths of the files in and below a folder."""
    walk = os.walk(folder, followlinks=True)
    names = (
        os.path.relpath(os.path.join(of, file), folder) for of, _, files in walk for file in files
    )
    return sorted(filter(fits, names))


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml") and not HIDDEN.search(name)


def _text(file: Path) -> str:
    """The text of a file in UTF-8, or in the UTF-16 that some of Windows' programs write."""
    encoded = file.read_bytes()
    try:
        return encoded.decode(json.detect_encoding(encoded))
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is not in UTF-8: save it so ({error})") from error


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    return [line for line in map(str.strip, _text(file).splitlines()) if line]


def _warn(where: Path | str, what: str, names: Iterable[str], known: Container[str] = ()) -> None:
    if left := [name for name in names if name not in known]:
        logger.warning("'%s': %d %s: %s", where, len(left), what, abbreviate(left))


def _open(root: Path, names: dict[str, str]) -> dict[str, dict]:
    """Dataset dicts of the images that can be opened, with the size that Detectron2 will see."""
    records, unreadable = {}, []
    for key, name in names.items():
        try:
            image = open_image({"file_name": str(root / name)})
            with reading(image.filename):
                width, height = _apply_exif_orientation(image).size
            records[key] = {"file_name": name, "width": width, "height": height}
        except UnreadableImageError:
            unreadable.append(name)
    _warn(root, "images cannot be read and are left out", unreadable)
    return records


def _chosen(records: dict[str, dict], splits: dict[str, list[str]]) -> dict[str, list[dict]]:
    return {
        split: [records[name] for name in dict.fromkeys(names) if name in records]
        for split, names in splits.items()
    }


def _voc_lists(root: Path, known: Container[str]) -> dict[str, list[str]]:
    """The splits' lists. Those of one class (cat_train.txt) say 1, -1 or 0 of each image."""
    lists = {file.stem: _lines(file) for file in sorted(root.glob("ImageSets/Main/*.txt"))}

    def is_of_class(line: str) -> bool:  # and no image is called so
        return line not in known and re.fullmatch(r".*\s(-1|0|1)", line) is not None

    return {split: names for split, names in lists.items() if not all(map(is_of_class, names))}


def _voc_object(node: ElementTree.Element) -> dict[str, Any]:
    name = node.findtext("name", "").strip()
    edges = ("xmin", "ymin", "xmax", "ymax")
    try:
        box = [float(node.findtext(f"bndbox/{edge}")) for edge in edges]
    except (TypeError, ValueError):
        raise ValueError(f"object {name!r} has no bndbox of four numbers, {edges}") from None
    if not name:
        raise ValueError("an object has no name")
    crowd = int(node.findtext("difficult", "0").strip() == "1")
    return {"category": name, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": crowd}


def _read_data_yaml(file: Path) -> tuple[Path, list[str], dict[str, list[str]], int]:
    """Root, classes, folders or lists of images by split, and how many numbers keypoints are."""
    text = _text(file)
    try:
        data = yaml.safe_load(text)
        names = yaml.BaseLoader(text).get_data()["names"]  # as written: on is not true
        if isinstance(names, dict):
            if {*names} != {*map(str, range(len(names)))}:
                raise ValueError(f"they have the numbers {', '.join(names)}, not 0 and so on")
            names = [names[str(i)] for i in range(len(names))]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"they are {names!r:.60}")
        keypoints, values = data.get("kpt_shape", (0, 0))
        path = data.get("path") or ""
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"'{file}' is no data.yaml with names of classes: {error}") from error
    root = next(folder for folder in (file.parent / path, file.parent) if folder.is_dir())
    splits = {}
    for split in ("train", "val", "test"):
        entries = data.get(split) or []
        entries = [entries] if isinstance(entries, str) else entries
        # Roboflow writes ../train/images for what lies beside its data.yaml.
        entries = [e if (root / e).exists() else e.removeprefix("../") for e in entries]
        there = [entry for entry in entries if (root / entry).exists()]
        _warn(file, f"folders or lists of '{split}' are not there", entries, there)
        if there:
            splits[split] = there
    return root, names, splits, keypoints * values


def _yolo_images(root: Path, entries: list[str]) -> Iterator[str]:
    """Paths, relative to ``root``, of images in folders, or in lists of images."""
    for entry in entries:
        source = root / entry
        if source.is_dir():
            names = _files(source, is_image)
            paths = [source / name for name in names]
        else:
            names = _lines(source)
            paths = [source.parent / name if name[0] == "." else root / name for name in names]
        yield from (os.path.relpath(path, root) for path in paths)


def _text_file(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    elsewhere = Path(*parts).with_suffix(".txt")
    return elsewhere if elsewhere.is_file() else image.with_suffix(".txt")


def _yolo_object(
    line: str, classes: list[str], keypoints: int, size: tuple[int, int]
) -> dict[str, Any]:
    try:
        number, *values = map(float, line.split())
    except ValueError:
        raise ValueError(f"{line!r} has words") from None
    if number not in range(len(classes)):
        raise ValueError(f"{line!r} is of class {number:g}, there are 0 to {len(classes) - 1}")
    annotation = {"category": classes[int(number)], "bbox_mode": BoxMode.XYXY_ABS}
    if len(values) in (4, 4 + keypoints):
        center, half = np.reshape(values[:4], (2, 2)) * size * [[1], [0.5]]
        corners = np.concatenate([center - half, center + half])
    elif len(values) >= 6 and len(values) % 2 == 0:
        points = np.reshape(values, (-1, 2)) * size
        corners = np.concatenate([points.min(0), points.max(0)])
        annotation["segmentation"] = [points.round(3).ravel().tolist()]
    else:
        raise ValueError(f"{line!r} is no class and then a box of 4 numbers or a polygon of 6 up")
    return {**annotation, "bbox": corners.tolist()}
