"""A small classification data set that is always there: one drawn shape in each picture.

Ten classes that only form and orientation tell apart: place, size, colour, texture and a slight
turn are random. It is written once, one folder per class, below ``DETECTRON2_DATASETS`` and then
read like any other such tree. A ResNet-18 learns it from scratch within two minutes on a CPU by
backpropagation and by sign-symmetry, by feedback alignment much less of it. As left and right are
classes, pictures must not be flipped (``INPUT.RANDOM_FLIP: "none"``).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .drawing import SUB, add_grain, background, fill, paint, polygon
from .folders import load_image_folder
from .generated import SPLITS, GeneratedDataset, random_generators

# The corners, in degrees around the centre, from right (0) to down (90). In the order of folders.
_CORNERS = {
    "bar_falling": (18, 72, 198, 252),
    "bar_horizontal": (27, 153, 207, 333),
    "bar_rising": (108, 162, 288, 342),
    "bar_vertical": (63, 117, 243, 297),
    "diamond": (0, 90, 180, 270),
    "square": (45, 135, 225, 315),
    "triangle_down": (90, 230, 310),
    "triangle_left": (180, 320, 400),
    "triangle_right": (0, 140, 220),
    "triangle_up": (270, 410, 490),
}
SHAPES_CLS_CLASSES = tuple(_CORNERS)

MAX_TURN = 15  # degrees; classes are at least 45 apart
MIN_CONTRAST = 100  # summed over three channels of 0..255, against what the shape covers


def draw_shape(rng: np.random.Generator, size: int, category: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture of one shape, all of it inside.

    Args:
        rng: all randomness comes from here.
        size: side of the picture in pixels.
        category: index of the class in ``SHAPES_CLS_CLASSES``.

    Returns:
        the picture, (size, size, 3) uint8 RGB, and the shape's outline, (n, 2) floats, x and y in
        pixels.
    """
    corners = np.array(_CORNERS[SHAPES_CLS_CLASSES[category]])
    length = size * SUB
    picture = background(rng, size)
    painted = None
    while painted is None:  # until the colour stands out
        radius = int(rng.integers(length * 22 // 100, length * 40 // 100))
        cx, cy = rng.integers(radius, length - radius, 2)
        turn = rng.integers(-MAX_TURN, MAX_TURN + 1)
        outline = polygon(cx, cy, radius, turn + corners)
        mask, _ = fill(outline, length)
        painted = paint(picture, mask, rng.integers(90, 256, 3), MIN_CONTRAST)
    return add_grain(rng, painted), outline / SUB


def _write(folder: Path, stamp: dict) -> None:
    """``train/{class}/000001.png`` and so on, and the stamp beside ``train`` and ``val``."""
    for split in SPLITS:
        for name in SHAPES_CLS_CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index, rng in enumerate(random_generators(stamp, split)):
            number, category = divmod(index, len(SHAPES_CLS_CLASSES))
            picture, _ = draw_shape(rng, stamp["size"], category)
            file = folder / split / SHAPES_CLS_CLASSES[category] / f"{number + 1:06d}.png"
            Image.fromarray(picture).save(file)
    (folder / "generated.json").write_text(json.dumps(stamp, sort_keys=True))


SHAPES_CLS = GeneratedDataset(
    "shapes_cls",
    version=1,
    stamp_file="generated.json",
    write=_write,
    defaults={"train": 2000, "val": 500, "size": 48, "seed": 0},
)
generate_shapes_cls = SHAPES_CLS.generate


def register_shapes_cls() -> None:
    """Register ``shapes_cls_train`` and ``shapes_cls_val`` with Detectron2; generates nothing."""
    SHAPES_CLS.register(
        lambda metadata: load_image_folder(metadata.image_root),
        evaluator_type="classification",
        thing_classes=list(SHAPES_CLS_CLASSES),
    )
