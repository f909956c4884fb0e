"""What an annotation file in COCO's form has to hold, for Detectron2 to load and evaluate it."""

import json
import logging
import os
import re
import reprlib
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

LARGEST = 1e9  # of a number in pixels: what lies beyond is no measure of an image
FARTHEST = 1e6  # of a polygon's points: pycocotools takes memory for every pixel of its edges

Form = dict[str, tuple[Callable[[Any], bool], str]]
"""For each key of an entry, whether a value will do, and what it should be."""


def _is_number(value: Any) -> bool:  # finite, and of no immoderate size
    return type(value) in (int, float) and abs(value) < LARGEST


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_polygon(value: Any) -> bool:
    # Others fail in pycocotools, in evaluation.
    return (
        _is_numbers(value)
        and len(value) >= 6
        and len(value) % 2 == 0
        and max(map(abs, value)) <= FARTHEST
    )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_box(value: Any) -> bool:
    return _is_numbers(value) and len(value) == 4


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and abs(value) < 2**63)


_ID = (_is_id, "an integer")
_SIDE = (lambda v: _is_number(v) and v > 0 and v == int(v), "a positive integer")
CATEGORY: Form = {"id": _ID, "name": (lambda v: isinstance(v, str), "a string")}
IMAGE: Form = {
    "id": _ID,
    "file_name": (lambda v: isinstance(v, str) and v != "", "a path"),
    "height": _SIDE,
    "width": _SIDE,
}
_ANNOTATION: Form = {
    "image_id": _ID,
    "category_id": _ID,
    "bbox": (_is_box, "[x, y, width, height] in pixels"),
    "iscrowd": (lambda v: v in (0, 1), "0 or 1"),
    "ignore": (lambda v: v == 0, "0: iscrowd 1 is supported, ignore is not"),
    "area": (lambda v: _is_number(v) and v >= 0, "a number of pixels"),
    "keypoints": (lambda v: not v or (_is_numbers(v) and len(v) % 3 == 0), "[x1, y1, v1, ...]"),
}
_OPTIONAL = {"iscrowd", "ignore", "area", "keypoints"}
_NUMBER = re.compile(r"\d+(\.\d+)?")


_folder_of_copies = cache(partial(tempfile.TemporaryDirectory, prefix="ss_detectron_"))


def repair(content: Any) -> list[str]:
    """Write in place, as COCO's files do, what is meant clearly and written in another way.

    Annotations without iscrowd are of single objects, those without area have their box's, those
    without num_keypoints as many as are labelled, and where ids are not different numbers from 1
    they are numbered anew: COCO's evaluation marks a detection by the id of the object that it
    finds, and 0 is none.

    Returns:
        in words, what Detectron2 would not have read, or have read as something else.
    """
    if not isinstance(content, dict):
        return []
    content.setdefault("info", {})  # some versions of pycocotools copy it
    images, categories, annotations = (
        list(filter(_is_object, found)) if isinstance(found := content.get(part), list) else []
        for part in ("images", "categories", "annotations")
    )
    odd: Counter[str] = Counter()
    for entry in chain(images, categories, annotations):
        for key in ("id", "image_id", "category_id"):
            if isinstance(value := entry.get(key), float) and value.is_integer():
                entry[key] = int(value)
                odd["ids are whole floats"] += 1
    for annotation in annotations:
        for key in ("iscrowd", "area", "ignore"):
            if annotation.get(key, 0) is None:
                del annotation[key]
                odd[f"times {key} is null"] += 1
            elif isinstance(value := annotation.get(key), str) and _NUMBER.fullmatch(value):
                annotation[key] = float(value)
                odd[f"times {key} is a string"] += 1
        if _is_polygon(polygon := annotation.get("segmentation")):
            annotation["segmentation"] = [polygon]
            odd["polygons are not in a list of them"] += 1
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation and _is_box(box := annotation.get("bbox")):
            annotation["area"] = max(box[2], 0) * max(box[3], 0)
        if isinstance(points := annotation.get("keypoints"), list):
            annotation.setdefault("num_keypoints", sum(map(bool, points[2::3])))
    ids = [annotation.get("id") for annotation in annotations]
    if missing := len(ids) - len(set(filter(_is_id, ids))):
        odd["annotations have no id, or that of another"] = missing
    if missing or not all(type(id) is int and id > 0 for id in ids):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    repairs = [f"{count} {text}" for text, count in odd.items()]
    return repairs + _tell_apart(categories, [a.get("category_id") for a in annotations])


def _tell_apart(categories: list[dict], used: list[Any]) -> list[str]:
    """Give categories of one name, one AP of which would be lost, different ones."""
    named: dict[str, list[dict]] = {}
    for category in sorted(categories, key=lambda c: str(c.get("id"))):  # as in the set's others
        if isinstance(name := category.get("name"), str):
            named.setdefault(name, []).append(category)
    repairs = []
    taken = set(named)
    for name, same in named.items():
        for category in same[1:]:
            free = (f"{name} ({number})" for number in count(2))
            category["name"] = next(new for new in free if new not in taken)
            taken.add(category["name"])
        if len(same) > 1:
            found = [f"id {c.get('id')!r} of {used.count(c.get('id'))} objects" for c in same]
            now = ", ".join(f"'{category['name']}'" for category in same)
            repairs.append(
                f"{len(same)} categories are called {name!r} ({', '.join(found)}), now {now}: if "
                "they are one class, make them one category"
            )
    return repairs


def repaired_file(file: str, annotated: bool, masks: int = 0) -> str:
    """Check all that Detectron2 and pycocotools need of an annotation file that was repaired.

    Boxes without area or outside their image are of the right form, and so are images without any.

    Args:
        file: its path.
        annotated: whether there have to be annotations, as for training.
        masks: see :func:`mask_problem`.

    Returns:
        the path of a file that needs no :func:`repair`: itself, or a copy in a temporary folder,
        which ends with this process.

    Raises:
        ValueError: names the file, how many entries are wrong, and the first of them.
    """
    encoded = Path(file).read_bytes()
    try:
        content = json.loads(encoded)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{file}' is not valid JSON: it is not in UTF-8 ({error}). It may be in Latin-1 or "
            "cp1252: save it in UTF-8."
        ) from error
    except ValueError as error:
        raise ValueError(f"'{file}' is not valid JSON: {error}") from error
    repairs = repair(content)
    if (encoding := json.detect_encoding(encoded)) != "utf-8":
        repairs.append(f"its encoding is {encoding}")  # of a byte-order mark, utf-8-sig
    del encoded
    if repairs and comm.is_main_process():
        message = f"'{file}' is used as if it were repaired: {'; '.join(repairs)}."
        log_first_n(logging.WARNING, message, key="message", name=__name__)
    _check_content(file, content, annotated, masks)
    if not repairs:
        return file
    copy = Path(tempfile.mkdtemp(dir=_folder_of_copies().name), os.path.basename(file))
    copy.write_text(json.dumps(content), encoding="utf-8")
    return str(copy)


def _check_content(file: str, content: Any, annotated: bool, masks: int) -> None:
    found = dict(content) if isinstance(content, dict) else {}
    if not annotated:
        found.setdefault("annotations", [])  # which the files of COCO's test sets lack
    lists = {part: found.get(part) for part in ("images", "categories", "annotations")}
    for part, entries in lists.items():
        if not isinstance(entries, list):
            raise ValueError(
                f"'{file}' is not in COCO's form: '{part}' is {reprlib.repr(entries)}, not a list"
            )
        if not entries and (part != "annotations" or annotated):
            raise ValueError(f"'{file}' has no {part}.")
    _check(file, "categories", lists["categories"], partial(problem, CATEGORY))
    _check(file, "images", lists["images"], partial(problem, IMAGE))
    categories = {category["id"] for category in lists["categories"]}
    images = {image["id"]: image for image in lists["images"]}

    def annotation_problem(annotation: Any) -> str | None:
        if found := problem(_ANNOTATION, annotation):
            return found
        for key, part in (("image_id", "images"), ("category_id", "categories")):
            if type(annotation[key]) is not type(first := lists[part][0]["id"]):
                kind = "an integer" if isinstance(first, int) else "a string"
                like = f"{kind} like the id {reprlib.repr(first)} in '{part}'"
                return _unlike(annotation, key, like)
        if annotation["category_id"] not in categories:
            return _unlike(annotation, "category_id", "one of 'categories'")
        image = images.get(annotation["image_id"])  # Detectron2 leaves out those of no image
        expected = image and mask_problem(annotation, masks, [image["height"], image["width"]])
        return _unlike(annotation, "segmentation", expected) if expected else None

    _check(file, "annotations", lists["annotations"], annotation_problem)
    annotations = lists["annotations"]
    if annotations and not any(annotation["image_id"] in images for annotation in annotations):
        found, known = map(reprlib.repr, (annotations[0]["image_id"], next(iter(images))))
        raise ValueError(
            f"'{file}': none of {len(annotations)} annotations is of one of its {len(images)} "
            f"images: the first has the image_id {found}, the first image the id {known}."
        )


def problem(form: Form, entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"is {reprlib.repr(entry)}, not an object"
    for key, (fits, expected) in form.items():
        if not fits(entry[key]) if key in entry else key not in _OPTIONAL:
            return _unlike(entry, key, expected)
    return None


def _unlike(entry: dict, key: str, expected: str) -> str:
    found = f"has the {key} {reprlib.repr(entry[key])}" if key in entry else f"has no {key}"
    return f"{found}, expected {expected}"


def _check(file: str, part: str, entries: list[Any], problem: Callable[[Any], str | None]) -> None:
    problems = [(i, text) for i, entry in enumerate(entries) if (text := problem(entry))]
    if not problems:
        ids = [entry["id"] for entry in entries]
        times, kind = Counter(ids), type(ids[0]) if ids else None
        problems = [
            (i, "has an id that others have" if times[id] > 1 else "has an id of another type")
            for i, id in enumerate(ids)
            if times[id] > 1 or type(id) is not kind
        ]
    if problems:
        index, text = problems[0]
        known = isinstance(entries[index], dict) and "id" in entries[index]
        id = f" (id {reprlib.repr(entries[index]['id'])})" if known else ""
        raise ValueError(
            f"'{file}': {len(problems)} of {len(entries)} {part} are not in COCO's form, the first "
            f"of them {part}[{index}]{id}, which {text}. Repair or remove them."
        )


def mask_problem(annotation: dict, masks: int, size: list | None = None) -> str | None:
    """What a segmentation should be that cannot be used; None for one that can.

    Args:
        annotation: of the right form but for it.
        masks: 1 where every object and crowd needs a mask that pycocotools can evaluate, 2 where
            those of objects have to be polygons; crowds are not trained on. Else 0.
        size: height and width of its image; None for those that the mask has.
    """
    mask = annotation.get("segmentation")
    if not mask:
        return "a mask, which MODEL.MASK_ON needs" if masks else None
    if isinstance(mask, dict):
        if masks > 1 and not annotation.get("iscrowd", 0):
            return "polygons: set INPUT.MASK_FORMAT to 'bitmask'"
        if isinstance(mask.get("counts"), str) and not masks:
            return None  # nobody decodes it
        return None if _fills(mask, size) else "RLE of its image's [height, width]"
    # Without masks, Detectron2 drops objects whose polygons are too short.
    fits = _is_polygon if masks else lambda polygon: isinstance(polygon, list)
    if isinstance(mask, list) and all(map(fits, mask)):
        return None
    return "polygons [[x1, y1, x2, y2, x3, y3, ...], ...] or RLE"


def _fills(rle: dict, expected: list | None) -> bool:
    """Whether run lengths fill an image of their own or the ``expected`` size, to the pixel.

    Of others, pycocotools reads and writes beyond its memory, or never ends.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    return (
        isinstance(size, list)
        and size == (expected or size)
        and len(size) == 2
        and all(type(side) is int and side > 0 for side in size)
        and isinstance(counts, list)
        and all(type(count) is int and count >= 0 for count in counts)
        and sum(counts) == size[0] * size[1]
    )


def _decompressed(counts: str) -> list[int] | None:
    """The run lengths in a string of compressed RLE, as pycocotools reads them, or None.

    Each is a word of digits of 5 bits, the lowest first: P to o, and 0 to O as the last. From the
    fourth on, they are differences to the last but one. Of words longer than six digits,
    pycocotools' C code loses bits.
    """
    if not re.fullmatch("([P-o]{0,5}[0-O])*", counts):
        return None
    lengths: list[int] = []
    for word in re.findall("[P-o]*[0-O]", counts):
        value = sum((ord(digit) - 48 & 31) << 5 * place for place, digit in enumerate(word))
        if ord(word[-1]) - 48 & 16:  # the sign
            value -= 1 << 5 * len(word)
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
    return lengths
