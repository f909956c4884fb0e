"""What an annotation file in COCO's form has to hold, for Detectron2 to load and evaluate it."""

import json
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CocoFile", "read_coco_file"]

FORM = (
    "an object with the lists 'images' (id, file_name, height, width), 'annotations' (id, "
    "image_id, category_id, bbox) and 'categories' (id, name)"
)
LARGEST = 1e9  # of a number in pixels: what lies beyond is no measure of an image
FARTHEST = 1e6  # of a polygon's points: pycocotools takes memory for every pixel of its edges
DIGITS = 6  # of a number in compressed RLE: beyond, pycocotools' C code loses bits


@dataclass
class CocoFile:
    """The content of an annotation file whose form was checked."""

    images: list[dict]
    annotations: list[dict]
    categories: list[dict]
    strays: list[Any] = field(default_factory=list)
    """The ids of annotations for images that the file does not list."""


def read_coco_file(
    file: str, *, annotated: bool, masks: bool = False, polygons: bool = False
) -> CocoFile:
    """Read an annotation file and check all that Detectron2 and pycocotools take for granted.

    Boxes without area or outside their image are of the right form, and so are images without any.

    Args:
        file: its path.
        annotated: whether there have to be annotations, as for training.
        masks: whether every object and crowd needs a mask that pycocotools can evaluate.
        polygons: whether those of objects have to be given by polygons; crowds are not trained on.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not JSON, or not in COCO's form; names the entries, and what is wrong.
    """
    content = _parse(file)
    lists = {part: content.get(part) for part in ("images", "categories", "annotations")}
    if "annotations" not in content and not annotated:
        lists["annotations"] = []  # as in the files of COCO's test sets
    for part, entries in lists.items():
        if not isinstance(entries, list):
            raise ValueError(
                f"'{file}' is not in COCO's form, {FORM}: '{part}' is {reprlib.repr(entries)}"
            )
    for part, entries in lists.items():
        if not entries and (part != "annotations" or annotated):
            raise ValueError(f"'{file}' has no {part}.")
    check = _Check(file)
    check.entries("categories", lists["categories"], _category_problem)
    check.entries("images", lists["images"], _image_problem)
    images = {image["id"]: image for image in lists["images"]}
    problem = _AnnotationProblem(images, {c["id"] for c in lists["categories"]}, masks, polygons)
    check.entries("annotations", lists["annotations"], problem)
    strays = [a["id"] for a in lists["annotations"] if a["image_id"] not in images]
    return CocoFile(lists["images"], lists["annotations"], lists["categories"], strays)


def _parse(file: str) -> dict:
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' is not in COCO's form, {FORM}: it is {reprlib.repr(content)}")
    return content


class _Check:
    """Goes through lists of a file's entries, and refuses what is not in COCO's form."""

    def __init__(self, file: str) -> None:
        self.file = file

    def entries(self, part: str, entries: list[Any], problem: Callable[[Any], str | None]) -> None:
        found = [(i, text) for i, entry in enumerate(entries) if (text := problem(entry))]
        self._refuse(part, entries, found)
        ids = [entry["id"] for entry in entries]
        if len({type(i) for i in ids}) > 1:
            first = {type(i): repr(i) for i in reversed(ids)}
            raise ValueError(
                f"'{self.file}': the ids of {part} have to be integers, or all be strings; "
                f"there are {' and '.join(first.values())}."
            )
        if len(set(ids)) == len(ids):
            return
        times = Counter(ids)
        twice = [(i, "has an id that others have") for i, id in enumerate(ids) if times[id] > 1]
        self._refuse(part, entries, twice)

    def _refuse(self, part: str, entries: list[Any], found: list[tuple[int, str]]) -> None:
        if not found:
            return
        named = "; ".join(f"{_name(part, i, entries[i])} {text}" for i, text in found[:3])
        raise ValueError(
            f"'{self.file}': {len(found)} of {len(entries)} {part} are not in COCO's form: "
            f"{named}{'; ...' if len(found) > 3 else ''}. Repair or remove them."
        )


def _name(part: str, index: int, entry: Any) -> str:
    """Where an entry is found in a file."""
    known = isinstance(entry, dict) and "id" in entry
    return f"{part}[{index}]" + (f" (id {reprlib.repr(entry['id'])})" if known else "")


def _is_number(value: Any) -> bool:
    """Whether it is a number that can measure an image: finite, of no immoderate size."""
    return type(value) in (int, float) and abs(value) < LARGEST


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and abs(value) < 2**63)


def _has(entry: dict, key: str) -> str:
    """What an entry has under a key, in the words of a problem."""
    return f"has the {key} {reprlib.repr(entry[key])}" if key in entry else f"has no {key}"


def _category_problem(category: Any) -> str | None:
    if not isinstance(category, dict):
        return f"is {reprlib.repr(category)}, not an object"
    if not _is_id(category.get("id")):
        return f"{_has(category, 'id')}, not an integer"
    if not isinstance(category.get("name"), str):
        return f"{_has(category, 'name')}, not a string"
    try:
        category["name"].encode()
    except UnicodeEncodeError:  # JSON can escape half a character, which no log can hold
        return f"{_has(category, 'name')}, which cannot be encoded in UTF-8"
    return None


def _image_problem(image: Any) -> str | None:
    if not isinstance(image, dict):
        return f"is {reprlib.repr(image)}, not an object"
    if not _is_id(image.get("id")):
        return f"{_has(image, 'id')}, not an integer"
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        return f"{_has(image, 'file_name')}, not a path"
    for side in ("height", "width"):
        value = image.get(side)
        if not _is_number(value) or value <= 0 or value != int(value):
            return f"{_has(image, side)}, not a positive integer"
    return None


class _AnnotationProblem:
    """What is wrong with an annotation, as words, or None."""

    def __init__(
        self, images: dict[Any, dict], categories: set[Any], masks: bool, polygons: bool
    ) -> None:
        self.images = images
        self.categories = categories
        self.masks = masks
        self.polygons = polygons

    def __call__(self, annotation: Any) -> str | None:
        if not isinstance(annotation, dict):
            return f"is {reprlib.repr(annotation)}, not an object"
        for key in ("id", "image_id", "category_id"):
            if not _is_id(annotation.get(key)):
                return f"{_has(annotation, key)}, not an integer"
        if annotation["category_id"] not in self.categories:
            return f"{_has(annotation, 'category_id')}, which is none of 'categories'"
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            return f"{_has(annotation, 'bbox')}, not [x, y, width, height] in pixels"
        if annotation.get("iscrowd", 0) not in (0, 1):
            return f"{_has(annotation, 'iscrowd')}, neither 0 nor 1"
        if annotation.get("ignore", 0) != 0:
            return f"{_has(annotation, 'ignore')}, which is not supported: iscrowd 1 is"
        area = annotation.get("area", 0)
        if type(area) not in (int, float) or not 0 <= area < LARGEST**2:
            return f"{_has(annotation, 'area')}, not a number of pixels"
        return self._keypoint_problem(annotation) or self._mask_problem(annotation)

    @staticmethod
    def _keypoint_problem(annotation: dict) -> str | None:
        points = annotation.get("keypoints")
        if not points:
            return None
        if not isinstance(points, list) or len(points) % 3 or not all(map(_is_number, points)):
            return f"{_has(annotation, 'keypoints')}, not [x1, y1, visibility1, ...]"
        return None

    def _mask_problem(self, annotation: dict) -> str | None:
        mask = annotation.get("segmentation")
        if not mask:
            return "has no segmentation, which MODEL.MASK_ON needs" if self.masks else None
        if isinstance(mask, dict):
            if self.masks and self.polygons and not annotation.get("iscrowd", 0):
                return "has RLE for segmentation: set INPUT.MASK_FORMAT to 'bitmask'"
            return self._rle_problem(annotation)
        if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
            return f"{_has(annotation, 'segmentation')}, neither polygons nor RLE"
        # Whoever needs no masks never looks at the many numbers of polygons.
        if not self.masks:
            return None
        if not all(_is_number(number) for polygon in mask for number in polygon):
            return f"{_has(annotation, 'segmentation')}, not all numbers"
        if any(abs(number) > FARTHEST for polygon in mask for number in polygon):
            return f"{_has(annotation, 'segmentation')}, with points far outside any image"
        # Detectron2 drops such polygons for training, pycocotools fails on them in evaluation.
        if not all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
            return (
                f"{_has(annotation, 'segmentation')}, not all polygons [x1, y1, x2, y2, x3, y3, "
                "...] of three points or more"
            )
        return None

    def _rle_problem(self, annotation: dict) -> str | None:
        """pycocotools reads and writes beyond its memory, or never ends, if sizes do not agree."""
        mask = annotation["segmentation"]
        image = self.images.get(annotation["image_id"])
        size, counts = mask.get("size"), mask.get("counts")
        if image is not None and (
            size != [image["height"], image["width"]] or not all(type(side) is int for side in size)
        ):
            return f"has RLE of {_has(mask, 'size')[4:]}, not of its image's [height, width]"
        if isinstance(counts, str):
            if not self.masks:  # then nobody decodes it
                return None
            counts = _decompressed(counts)
        if (
            not isinstance(counts, list)
            or not all(type(count) is int and count >= 0 for count in counts)
            or (image is not None and sum(counts) != size[0] * size[1])
        ):
            return f"has RLE of {_has(mask, 'counts')[4:]}, not those of its size"
        return None


def _decompressed(counts: str) -> list[int] | None:
    """The numbers in a string of compressed RLE, as pycocotools reads them, or None.

    Each is of digits of 5 bits, the lowest first, a sixth bit saying that more follow; from the
    fourth on, they are differences to the last but one.
    """
    if not counts.isascii():
        return None
    numbers, value, shift = [], 0, 0
    for byte in counts.encode():
        digit = byte - ord("0")
        if not 0 <= digit < 64 or shift == 5 * DIGITS:
            return None
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:  # the sign
            value -= 1 << shift
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
        value = shift = 0
    return None if shift else numbers
