"""A small detection data set that is always there: drawn circles, squares and triangles.

It is written once, as PNG files and COCO JSON, below ``DETECTRON2_DATASETS`` and then read like
any other COCO data set. Bright shapes on dark textures, turned a little: a small RetinaNet learns
them from scratch within minutes on a CPU. Everything is drawn with integers and a generator seeded
per picture, so a seed gives the same bytes whatever was drawn before and whichever picture is
drawn first.
"""

import json
from pathlib import Path

import numpy as np
from detectron2.data.datasets import load_coco_json
from PIL import Image

from .drawing import SUB, add_grain, background, fill, paint, polygon
from .generated import SPLITS, GeneratedDataset, GeneratedMetadata, random_generators

SHAPES_CLASSES = ("circle", "square", "triangle")

MIN_VISIBLE = 0.35  # of the whole shape: less would be an object that nobody can recognise
MIN_CONTRAST = 100  # summed over three channels of 0..255, against what the shape covers


def _outline(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """A convex polygon in 1/SUB pixels, (n, 2) integers, that may reach beyond the picture."""
    radius = int(rng.integers(9 * SUB, 21 * SUB))
    cx, cy = rng.integers(radius * 3 // 4, size * SUB - radius * 3 // 4, 2)
    turn = rng.integers(-15, 16)
    if kind == "circle":
        degrees = np.arange(0, 360, 10)
    elif kind == "square":  # these factors give the three kinds similar areas
        degrees, radius = turn + np.arange(45, 405, 90), radius * 6 // 5
    else:
        degrees = turn + np.arange(-90, 270, 120) + rng.integers(-6, 7, 3)
        radius = radius * 13 // 10
    return polygon(cx, cy, radius, degrees)


def _clip(outline: np.ndarray, size: int) -> np.ndarray:
    """The part of a convex outline inside the picture, in pixels (Sutherland-Hodgman)."""
    points = [(x / SUB, y / SUB) for x, y in outline.tolist()]
    for axis in (0, 1):
        for edge, sign in ((0.0, 1), (float(size), -1)):
            kept = []
            for a, b in zip(points, points[1:] + points[:1], strict=True):
                da, db = sign * (a[axis] - edge), sign * (b[axis] - edge)
                if da >= 0:
                    kept.append(a)
                if da * db < 0:
                    t = da / (da - db)
                    cut = [a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])]
                    cut[axis] = edge
                    kept.append(tuple(cut))
            points = kept
    return np.array(points).round(2)


def draw_shapes(
    rng: np.random.Generator, size: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw one picture.

    A shape may cover earlier ones and reach beyond the picture, as long as at least 35 % of each
    shape stays visible. Outlines are those of the whole shape inside the picture, the part
    under a later shape included.

    Args:
        rng: all randomness comes from here.
        size: side of the picture in pixels.

    Returns:
        the picture, (size, size, 3) uint8 RGB, and per shape the index of its class and its
        outline, (n, 2) floats, x and y in pixels.
    """
    picture = background(rng, size)
    owner = np.full((size * SUB,) * 2, -1)  # which shape is seen in each cell
    areas, shapes = [], []
    wanted = rng.integers(1, 4)
    for _ in range(50):  # places are tried until enough shapes fit
        if len(shapes) == wanted:
            break
        category = int(rng.integers(len(SHAPES_CLASSES)))
        outline = _outline(rng, SHAPES_CLASSES[category], size)
        colour = rng.integers(90, 256, 3)
        mask, area = fill(outline, size * SUB)
        seen = np.where(mask, len(shapes), owner)
        visible = np.bincount(seen.ravel() + 1, minlength=len(shapes) + 2)[1:]
        if (visible < MIN_VISIBLE * np.array([*areas, area])).any():
            continue
        painted = paint(picture, mask, colour, MIN_CONTRAST)
        if painted is None:
            continue
        picture, owner = painted, seen
        areas.append(area)
        shapes.append((category, _clip(outline, size)))
    return add_grain(rng, picture), shapes


def _annotation(category: int, outline: np.ndarray) -> dict:
    (x0, y0), (x1, y1) = outline.min(0), outline.max(0)
    x, y = outline.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return {
        "category_id": category + 1,
        "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(float(area), 2),
        "iscrowd": 0,
        "segmentation": [outline.ravel().tolist()],
    }


def _write(folder: Path, stamp: dict) -> None:
    """Pictures in ``train`` and ``val``, COCO JSON in ``annotations`` with the stamp as info."""
    size = stamp["size"]
    (folder / "annotations").mkdir()
    for split in SPLITS:
        (folder / split).mkdir()
        images, annotations = [], []
        for image, rng in enumerate(random_generators(stamp, split), start=1):
            picture, shapes = draw_shapes(rng, size)
            name = f"{image:06d}.png"
            Image.fromarray(picture).save(folder / split / name)
            images.append({"id": image, "file_name": name, "height": size, "width": size})
            for shape in shapes:
                ids = {"id": len(annotations) + 1, "image_id": image}
                annotations.append({**ids, **_annotation(*shape)})
        content = {
            "info": stamp,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES_CLASSES)],
            "images": images,
            "annotations": annotations,
        }
        file = folder / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content, sort_keys=True))


SHAPES = GeneratedDataset(
    "shapes",
    version=1,
    stamp_file="annotations/instances_val.json",
    write=_write,
    defaults={"train": 400, "val": 100, "size": 96, "seed": 0},
)
generate_shapes = SHAPES.generate


class _ShapesMetadata(GeneratedMetadata):
    @property
    def json_file(self) -> str:
        """COCOEvaluator opens it by itself, and may do so before anything was loaded."""
        return str(SHAPES.ensure() / "annotations" / f"instances_{self.split}.json")


def register_shapes() -> None:
    """Register ``shapes_train`` and ``shapes_val`` with Detectron2; nothing is generated yet."""
    SHAPES.register(
        lambda metadata: load_coco_json(metadata.json_file, metadata.image_root, metadata.name),
        _ShapesMetadata,
        evaluator_type="coco",
        thing_classes=list(SHAPES_CLASSES),
    )
