"""A small detection data set that is always there: drawn circles, squares and triangles.

It is written once, as PNG files and COCO JSON, below ``DETECTRON2_DATASETS`` and then read like
any other COCO data set. Bright shapes on dark textures, turned a little: a small RetinaNet learns
them from scratch within minutes on a CPU. Everything is drawn with integers and a generator seeded
per picture, so a seed gives the same bytes whatever was drawn before and whichever picture is
drawn first.
"""

import json
import logging
import math
import os
import shutil
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from PIL import Image
from tqdm import tqdm

__all__ = ["SHAPES_CLASSES", "draw_shapes", "ensure_shapes", "generate_shapes", "register_shapes"]

logger = logging.getLogger(__name__)

SHAPES_CLASSES = ("circle", "square", "triangle")
SPLITS = ("train", "val")
GENERATOR = "ss_detectron shapes"
VERSION = 1  # raise it with every change that alters a pixel or a box

SUB = 4  # shapes are drawn on a grid SUB times finer than the pixels
MIN_VISIBLE = 0.35  # of the whole shape: less would be an object that nobody can recognise
MIN_CONTRAST = 100  # summed over three channels of 0..255, against what the shape covers


# Drawing -----------------------------------------------------------------------------------------


def _smooth_noise(rng: np.random.Generator, size: int, cell: int) -> np.ndarray:
    """Bilinear noise with one random value every ``cell`` pixels: (size, size), 0..255."""
    grid = rng.integers(0, 256, (size // cell + 2,) * 2)
    i, f = np.divmod(np.arange(size), cell)
    rows = grid[i] * (cell - f)[:, None] + grid[i + 1] * f[:, None]
    return (rows[:, i] * (cell - f) + rows[:, i + 1] * f) // cell**2


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Two dark colours mixed by a pattern: (size, size, 3), 0..255."""
    y, x = np.mgrid[:size, :size]
    dx, dy = rng.integers(1, 4), rng.integers(-3, 4)
    slope, across = x * dx + y * dy, x * dy - y * dx
    width = rng.integers(8, 22)
    kind = rng.choice(("gradient", "stripes", "checker", "blobs", "noise"))
    if kind == "gradient":
        mix = (slope - slope.min()) * 255 // np.ptp(slope)
    elif kind == "stripes":
        mix = slope // width % 2 * 255
    elif kind == "checker":
        mix = (slope // width + across // width) % 2 * 255
    elif kind == "blobs":
        mix = (_smooth_noise(rng, size, width) > 127) * 255
    else:
        mix = _smooth_noise(rng, size, 2 + width // 5)
    first = rng.integers(20, 90) + rng.integers(-30, 31, 3)
    second = first + rng.integers(-25, 26, 3)
    mixed = (first * (255 - mix[..., None]) + second * mix[..., None]) // 255
    return np.clip(mixed, 0, 255)


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
    # Python's own cos and sin: NumPy's vectorised ones differ from processor to processor.
    return np.array(
        [
            (cx + round(radius * math.cos(a)), cy + round(radius * math.sin(a)))
            for a in (math.radians(int(d)) for d in degrees)
        ]
    )


def _fill(outline: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """The cells inside a convex outline.

    Returns:
        a boolean (length, length) mask of the cells inside the picture, and the number of cells
        of the whole shape, those outside the picture included.
    """
    (x0, y0), (x1, y1) = outline.min(0), outline.max(0)
    x = 2 * np.arange(x0, x1)[None, :] + 1  # twice the cell centres keeps everything whole
    y = 2 * np.arange(y0, y1)[:, None] + 1
    inside = np.ones((y1 - y0, x1 - x0), dtype=bool)
    for (ax, ay), (bx, by) in zip(outline, np.roll(outline, -1, 0), strict=True):
        inside &= (bx - ax) * (y - 2 * ay) >= (by - ay) * (x - 2 * ax)
    mask = np.zeros((length, length), dtype=bool)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, length), min(y1, length)
    mask[top:bottom, left:right] = inside[top - y0 : bottom - y0, left - x0 : right - x0]
    return mask, int(inside.sum())


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
    picture = _background(rng, size)
    owner = np.full((size * SUB,) * 2, -1)  # which shape is seen in each cell
    areas, shapes = [], []
    wanted = rng.integers(1, 4)
    for _ in range(50):  # places are tried until enough shapes fit
        if len(shapes) == wanted:
            break
        category = int(rng.integers(len(SHAPES_CLASSES)))
        outline = _outline(rng, SHAPES_CLASSES[category], size)
        colour = rng.integers(90, 256, 3)
        mask, area = _fill(outline, size * SUB)
        seen = np.where(mask, len(shapes), owner)
        visible = np.bincount(seen.ravel() + 1, minlength=len(shapes) + 2)[1:]
        if (visible < MIN_VISIBLE * np.array([*areas, area])).any():
            continue
        cover = mask.reshape(size, SUB, size, SUB).sum((1, 3))[..., None]
        covered = (picture * cover).sum((0, 1)) // cover.sum()
        if np.abs(covered - colour).sum() < MIN_CONTRAST:
            continue
        picture = (picture * (SUB**2 - cover) + colour * cover) // SUB**2
        owner = seen
        areas.append(area)
        shapes.append((category, _clip(outline, size)))
    grain = int(rng.integers(2, 12))
    picture = picture + rng.integers(-grain, grain + 1, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), shapes


# Files -------------------------------------------------------------------------------------------


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


def _write_split(folder: Path, split: str, stamp: dict) -> None:
    (folder / split).mkdir(parents=True)
    size, images, annotations = stamp["size"], [], []
    for index in tqdm(range(stamp[split]), desc=f"shapes/{split}", unit="picture", disable=None):
        rng = np.random.Generator(np.random.PCG64([stamp["seed"], SPLITS.index(split), index]))
        picture, shapes = draw_shapes(rng, size)
        name = f"{index + 1:06d}.png"
        Image.fromarray(picture).save(folder / split / name, format="PNG", compress_level=6)
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for shape in shapes:
            ids = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append({**ids, **_annotation(*shape)})
    content = {
        "info": stamp,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES_CLASSES)],
        "images": images,
        "annotations": annotations,
    }
    file = folder / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, sort_keys=True))


def _shapes_folder(root: str | os.PathLike | None) -> Path:
    # Read at every use, as tests and notebooks change it after the import.
    root = root or os.getenv("DETECTRON2_DATASETS", "datasets")
    return Path(root).expanduser() / "shapes"


def _read_stamp(folder: Path) -> dict | None:
    """What the shapes in ``folder`` were generated with; None if there is nothing yet.

    Raises:
        FileExistsError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        stamps = [
            json.loads((folder / "annotations" / f"instances_{split}.json").read_text())["info"]
            for split in SPLITS
        ]
        if stamps[0] == stamps[1] and stamps[0]["generator"] == GENERATOR:
            return stamps[0]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise FileExistsError(
        f"'{folder}' is not a complete folder of generated shapes, so it is left as it is: move "
        "it away, or set DETECTRON2_DATASETS to another folder."
    )


def generate_shapes(
    root: str | os.PathLike | None = None,
    *,
    train: int = 400,
    val: int = 100,
    size: int = 96,
    seed: int = 0,
) -> Path:
    """Write the shapes to ``<root>/shapes``, unless they are there already.

    The folder appears whole or not at all. Of several processes one writes, the others wait.

    Args:
        root: the folder of all data sets; by default that of ``DETECTRON2_DATASETS``.
        train, val: number of pictures.
        size: side of a picture in pixels, at least 64.
        seed: another seed draws other pictures.

    Returns:
        the folder ``<root>/shapes``.

    Raises:
        FileExistsError: there is a folder of that name with other contents, or with shapes
            generated otherwise. It is never overwritten.
    """
    if min(train, val) < 1 or size < 64 or seed < 0:
        raise ValueError(
            "shapes need train >= 1, val >= 1, size >= 64 and seed >= 0, got "
            f"train={train}, val={val}, size={size}, seed={seed}."
        )
    folder = _shapes_folder(root)
    stamp = {
        "generator": GENERATOR,
        "version": VERSION,
        "train": train,
        "val": val,
        "size": size,
        "seed": seed,
    }
    if (found := _read_stamp(folder)) is None:
        with file_lock(str(folder)):
            if (found := _read_stamp(folder)) is None:  # nobody wrote it while this one waited
                _write(folder, stamp)
                return folder
    if found != stamp:
        raise FileExistsError(
            f"'{folder}' holds shapes generated with {found}, wanted are {stamp}: delete that "
            "folder to generate it again, or set DETECTRON2_DATASETS to another one."
        )
    return folder


def _write(folder: Path, stamp: dict) -> None:
    logger.info("Generating the shapes data set in '%s' ...", folder)
    partial = folder.with_name(".shapes.partial")
    if partial.exists():  # the lock is ours, so whoever wrote this was interrupted
        shutil.rmtree(partial)
    for split in SPLITS:
        _write_split(partial, split, stamp)
    partial.replace(folder)


def ensure_shapes(root: str | os.PathLike | None = None) -> Path:
    """Generate the shapes with the default settings if there are none.

    Shapes that :func:`generate_shapes` wrote with other settings are used as they are.

    Returns:
        the folder ``<root>/shapes``.

    Raises:
        FileExistsError: that folder is not one of ours, or was written by another version of the
            generator, whose results do not compare.
    """
    folder = _shapes_folder(root)
    found = _read_stamp(folder)
    if found is None:
        return generate_shapes(root)
    if found.get("version") != VERSION:
        raise FileExistsError(
            f"'{folder}' was generated by version {found.get('version')} of the shapes, this is "
            f"version {VERSION}: delete that folder to generate it again, or set "
            "DETECTRON2_DATASETS to another one."
        )
    return folder


# Registration ------------------------------------------------------------------------------------


class _ShapesMetadata(Metadata):
    """Metadata whose files are generated when they are first asked for.

    COCOEvaluator opens ``json_file`` by itself, and may do so before anything was loaded.
    """

    @property
    def json_file(self) -> str:
        return str(ensure_shapes() / "annotations" / f"instances_{self.split}.json")

    @property
    def image_root(self) -> str:
        return str(ensure_shapes() / self.split)


def _load(name: str) -> list[dict]:
    metadata = MetadataCatalog.get(name)
    logger.info("%s was generated with %s.", name, _read_stamp(ensure_shapes()))
    return load_coco_json(metadata.json_file, metadata.image_root, name)


def register_shapes() -> None:
    """Register ``shapes_train`` and ``shapes_val`` with Detectron2; nothing is generated yet."""
    for split in SPLITS:
        name = f"shapes_{split}"
        DatasetCatalog.register(name, lambda name=name: _load(name))
        MetadataCatalog[name] = _ShapesMetadata(
            name=name, split=split, evaluator_type="coco", thing_classes=list(SHAPES_CLASSES)
        )
