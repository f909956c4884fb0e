"""The one pass over an annotation file in COCO's form, which checks it and finds its parts."""

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from iopath.common.file_io import file_lock, get_cache_dir, portalocker

from .boxes import check_plausible
from .coco_file import CATEGORY, IMAGE, LARGEST, mask_problem, problem, repaired_file
from .records import IMAGE as PLACE
from .records import OBJECT, AnnotationFile, CocoRecords, is_polygon

logger = logging.getLogger(__name__)

CACHED_FROM = 16 << 20  # bytes: a smaller file is read in a fraction of a second
FORMAT = 1  # of what is cached
CHUNK = 100  # annotations that are held at once: the garbage collector need not look at them
ANEW = "What is known of '%s' cannot be cached, and every process will read it anew: %s"
_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")

_known: dict[str, tuple[list, "CocoIndex"]] = {}


@dataclass
class CocoIndex:
    """What is known of an annotation file that was read.

    Attributes:
        path: of the file that Detectron2 and pycocotools can read: itself or a repaired copy.
        version: of that file, see :meth:`.AnnotationFile.status`.
        masks: how its masks were checked, see :func:`.mask_problem`.
        categories: id and name of each, sorted by id.
        names: of the images' files, in the order of their ids.
        images: of dtype :data:`.records.IMAGE`.
        objects: of dtype :data:`.records.OBJECT`; those of no image are behind the others.
    """

    path: str
    version: tuple[int, int]
    masks: int
    categories: list[tuple[Any, str]]
    names: list[str]
    images: np.ndarray
    objects: np.ndarray

    def records(self, folder: str, name: str) -> CocoRecords:
        """Return dataset dicts of images in a folder; the metadata ``name`` get the classes."""
        classes = {id: label for label, (id, _) in enumerate(self.categories)}
        MetadataCatalog.get(name).set(
            thing_classes=[label for _, label in self.categories],
            thing_dataset_id_to_contiguous_id=classes,
        )
        total = len(self.objects)
        for count, what in (
            (total - self.images["objects"][-1, 1], "are of no image in it"),
            ((~self.objects["used"]).sum(), "have polygons of fewer than three points alone"),
        ):
            if count and comm.is_main_process():
                message = f"'{self.path}': {count} of {total} annotations {what}: left out."
                log_first_n(logging.WARNING, message, key="message", name=__name__)
        file = AnnotationFile(self.path, self.version, folder, classes)
        return CocoRecords([file], self.images, self.objects)


def read_index(file: str, *, annotated: bool = False, masks: int = 0) -> CocoIndex:
    """Check all that Detectron2 and pycocotools need of an annotation file, and find its parts.

    A file is read once by this process, and a large one once by all processes that share the
    folder of cached files (FVCORE_CACHE, by default ~/.torch/iopath_cache), until it changes.

    Args:
        file: its path.
        annotated: whether there have to be annotations, as for training.
        masks: how they are checked, see :func:`.mask_problem`.

    Raises:
        OSError: there is no such file.
        ValueError: see :func:`.repaired_file`.
    """
    key = _key(file)
    known, index = _known.get(file, (None, None))
    if known != key or index.masks < masks:
        large = os.path.getsize(file) >= CACHED_FROM
        index = _cached(file, key, masks) if large else _build(file, masks)
        _known[file] = key, index
    if annotated and not len(index.objects):
        repaired_file(file, annotated, masks)  # which says so
    return index


def _key(file: str) -> list:
    """What changes when a file does. The last is set by the system, and nobody can set it back."""
    version = AnnotationFile.status(file)
    return [FORMAT, os.path.realpath(file), *version, os.stat(file).st_ctime_ns]


def _build(file: str, masks: int) -> CocoIndex:
    if index := _scan(file, file, masks):
        return index
    copy = repaired_file(file, False, masks)
    if index := _scan(copy, file, masks):
        return index
    raise ValueError(f"'{file}' is not in COCO's form")


def _cached(file: str, key: list, masks: int) -> CocoIndex:
    """What another process, or one before, has found, or else build it and leave it to others."""
    name = f"{hashlib.sha256(os.fsencode(key[1])).hexdigest()[:32]}.npz"
    cache = Path(get_cache_dir(), "ss_detectron", name)
    unlocked = None
    with ExitStack() as stack:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(str(cache)))
        except (OSError, portalocker.LockException) as error:
            unlocked = error
        if (index := _load(cache, key, file)) and index.masks >= masks:
            return index
        if unlocked:
            logger.warning(ANEW, file, unlocked)
        index = _build(file, masks)
        if not unlocked and index.path == file and [*index.version] == key[2:4]:
            _store(cache, key, index)
        return index


def _load(cache: Path, key: list, file: str) -> CocoIndex | None:
    try:
        with np.load(cache, allow_pickle=False) as found:
            about = json.loads(found["about"].tobytes())
            images, objects = found["images"], found["objects"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # there is none, or it was damaged
    if about.pop("key") != key:
        return None
    return CocoIndex(file, tuple(key[2:4]), images=images, objects=objects, **about)


def _store(cache: Path, key: list, index: CocoIndex) -> None:
    about = {"key": key, **{of: getattr(index, of) for of in ("masks", "categories", "names")}}
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    part = cache.with_suffix(".part")  # the lock's: what was cut short is written over
    try:
        with open(part, "wb") as stream:
            np.savez(stream, about=text, images=index.images, objects=index.objects)
        os.replace(part, cache)
    except OSError as error:
        logger.warning(ANEW, index.path, error)
        with suppress(OSError):
            part.unlink(missing_ok=True)


# Reading -----------------------------------------------------------------------------------------


class _OtherwiseError(ValueError):
    """A file is not in COCO's form, or something in it is written in another way."""


def _ensure(condition: Any) -> None:
    if not condition:
        raise _OtherwiseError


class _Json:
    """A JSON text, read value by value by Python's own scanner."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self._scan = json.JSONDecoder().scan_once

    def skip(self, choices: str) -> str:
        """Go beyond one of these characters, and the space around it."""
        start = _SPACE.match(self.text, self.at).end()
        found = self.text[start]
        _ensure(found in choices)
        self.at = _SPACE.match(self.text, start + 1).end()
        return found

    def value(self) -> Any:
        try:
            found, self.at = self._scan(self.text, self.at)
        except StopIteration:
            raise _OtherwiseError from None
        return found

    def elements(self) -> Iterator[tuple[int, int, Any]]:
        """Start, end and value of each element of a list."""
        self.skip("[")
        if self.text.startswith("]", self.at):
            self.at += 1
            return
        following = ","
        while following == ",":
            start, found = self.at, self.value()
            yield start, self.at, found
            after = _AFTER.match(self.text, self.at)
            _ensure(after)
            following, self.at = after[1], after.end()


def _scan(path: str, file: str, masks: int) -> CocoIndex | None:
    """Read a file that is right as it is, ``file`` in messages; None for one that is not."""
    with open(path, "rb") as stream:
        version = AnnotationFile.status(stream.fileno())
        encoded = stream.read()
        if AnnotationFile.status(stream.fileno()) != version:
            raise OSError(f"'{file}' is being written: wait until it is there, and start again.")
    try:
        text = encoded.decode()
        del encoded
        images, objects, categories = _parts(_Json(text), masks)
        found = _sorted(images, objects, categories)
    except (ValueError, LookupError, TypeError, OverflowError):
        return None
    categories, names, images, objects = found
    if not text.isascii():
        _count_bytes(text, images, objects)
    single = objects[: images["objects"][-1, 1]]
    sizes = np.repeat(images["size"], images["objects"][:, 1] - images["objects"][:, 0], axis=0)
    check_plausible(f"'{file}'", single["box"][~single["crowd"]], sizes[~single["crowd"]])
    return CocoIndex(path, version, masks, categories, names, images, objects)


def _parts(json_: _Json, masks: int) -> tuple[list[tuple], "_Objects", list[dict]]:
    """Of the whole text: place, id, name and size of each image; the objects; the categories."""
    images, objects, categories = None, _Objects(masks), None
    json_.skip("{")
    while True:
        key = json_.value()
        _ensure(isinstance(key, str))
        json_.skip(":")
        if key == "images":
            images = [(start, end, *_image(found)) for start, end, found in json_.elements()]
        elif key == "annotations":
            objects, elements = _Objects(masks), json_.elements()
            while chunk := list(islice(elements, CHUNK)):
                objects.add(*zip(*chunk, strict=True))
        elif key == "categories":
            categories = json_.value()
        else:
            json_.value()
        if json_.skip(",}") == "}":
            break
    _ensure(json_.at == len(json_.text))
    return images, objects, categories


def _image(entry: Any) -> tuple:
    _ensure(problem(IMAGE, entry) is None)
    return entry["id"], entry["file_name"], entry["width"], entry["height"]


class _Objects:
    """What is kept of annotations, which are looked at by the hundred."""

    def __init__(self, masks: int) -> None:
        self.masks = masks
        self.ids: list[Any] = []
        self.images: list[Any] = []
        self.categories: list[Any] = []
        self.tables: list[np.ndarray] = [np.empty(0, OBJECT)]
        self.rle: list[np.ndarray] = [np.empty((0, 2), np.int64)]
        """Height and width that an image has to have; -1 for any, 0 for none."""

    def add(self, starts: tuple[int], ends: tuple[int], entries: tuple[dict]) -> None:
        self.ids += [entry["id"] for entry in entries]
        self.images += [entry["image_id"] for entry in entries]
        self.categories += [entry["category_id"] for entry in entries]
        table = np.empty(len(entries), OBJECT)
        table["start"], table["end"] = starts, ends
        boxes = [entry["bbox"] for entry in entries]
        _ensure({*map(type, boxes)} == {list} and {*map(len, boxes)} == {4})
        table["box"] = _numbers(chain.from_iterable(boxes)).reshape(-1, 4)
        crowds = [entry.get("iscrowd", 0) for entry in entries]
        _ensure({*crowds} <= {0, 1} and {entry.get("ignore", 0) for entry in entries} <= {0})
        table["crowd"] = crowds
        _ensure((_numbers(entry.get("area", 0) for entry in entries) >= 0).all())
        table["used"], table["visible"] = True, 0
        rle = np.full((len(entries), 2), -1)
        masks = [entry.get("segmentation") or [] for entry in entries]
        if self.masks or {*map(type, masks)} != {list}:
            for i, (entry, mask) in enumerate(zip(entries, masks, strict=True)):
                if mask_problem(entry, self.masks):
                    rle[i] = 0
                elif isinstance(mask, dict) and (self.masks or isinstance(mask["counts"], list)):
                    rle[i] = mask["size"]
        polygons = [mask if isinstance(mask, list) else [] for mask in masks]
        _ensure({*map(type, chain.from_iterable(polygons))} <= {list})
        lengths = {*map(len, chain.from_iterable(polygons))}
        if not all(map(is_polygon, map(range, lengths))):
            table["used"] = [not mask or any(map(is_polygon, mask)) for mask in polygons]
        if any("keypoints" in entry for entry in entries):
            for i, entry in enumerate(entries):
                if points := entry.get("keypoints"):
                    _ensure(isinstance(points, list) and len(points) % 3 == 0)
                    table["visible"][i] = (_numbers(points)[2::3] > 0).sum()
        self.tables.append(table)
        self.rle.append(rle)


def _numbers(values: Iterable[Any]) -> np.ndarray:
    values = list(values)
    _ensure({*map(type, values)} <= {int, float})
    found = np.array(values, float)
    _ensure((abs(found) < LARGEST).all())
    return found


def _sorted(
    images: list[tuple], objects: _Objects, categories: list[dict]
) -> tuple[list[tuple[Any, str]], list[str], np.ndarray, np.ndarray]:
    """What :class:`CocoIndex` has, from what was found in the order of the file."""
    _ensure(images and categories and all(problem(CATEGORY, c) is None for c in categories))
    images.sort(key=lambda image: image[2])
    starts, ends, ids, names, widths, heights = map(list, zip(*images, strict=True))
    classes = sorted((category["id"], category["name"]) for category in categories)
    labels = {id: label for label, (id, _) in enumerate(classes)}
    places = {id: place for place, id in enumerate(ids)}
    for found, unique in (
        (ids, True),
        ([id for id, _ in classes], True),
        ([name for _, name in classes], True),
        (objects.ids, True),
        ([ids[0], *objects.images], False),
        ([classes[0][0], *objects.categories], False),
    ):
        kinds = {*map(type, found)}
        _ensure(kinds <= {str} or kinds == {int} and max(map(abs, found)) < 2**63)
        _ensure(not unique or len({*found}) == len(found))
    owners = np.array([places.get(id, len(ids)) for id in objects.images], np.int64)
    _ensure(not len(owners) or (owners < len(ids)).any())
    sizes = np.array([widths, heights], float).T
    rle = np.concatenate(objects.rle)
    known = owners < len(ids)
    _ensure(((rle < 0) | (rle == sizes[owners.clip(max=len(ids) - 1), ::-1])).all(1)[known].all())
    table = np.concatenate(objects.tables)
    table["category"] = [labels[id] for id in objects.categories]
    last = np.cumsum(np.bincount(owners, minlength=len(ids))[: len(ids)])
    found = np.zeros(len(ids), PLACE)
    found["start"], found["end"], found["size"] = starts, ends, sizes
    found["objects"] = np.stack([np.concatenate([[0], last[:-1]]), last], 1)
    return classes, names, found, table[np.argsort(owners, kind="stable")]


def _count_bytes(text: str, *tables: np.ndarray) -> None:
    """Turn places in a text into those in the file, in which characters take several bytes."""
    places = np.unique(np.concatenate([table[end] for table in tables for end in ("start", "end")]))
    lengths = [len(text[start:end].encode()) for start, end in pairwise([0, *places.tolist()])]
    offsets = np.cumsum(lengths)
    for table in tables:
        for end in ("start", "end"):
            table[end] = offsets[np.searchsorted(places, table[end])]
