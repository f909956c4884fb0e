"""What the generated data sets draw with: textures and filled convex outlines, in integers alone.

So a generator with the same seed draws the same bytes on every machine.
"""

import math
from collections.abc import Iterable

import numpy as np

SUB = 4  # shapes are drawn on a grid SUB times finer than the pixels


def _smooth_noise(rng: np.random.Generator, size: int, cell: int) -> np.ndarray:
    # Bilinear, with one random value every ``cell`` pixels: (size, size), 0..255.
    grid = rng.integers(0, 256, (size // cell + 2,) * 2)
    i, f = np.divmod(np.arange(size), cell)
    rows = grid[i] * (cell - f)[:, None] + grid[i + 1] * f[:, None]
    return (rows[:, i] * (cell - f) + rows[:, i + 1] * f) // cell**2


def background(rng: np.random.Generator, size: int) -> np.ndarray:
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


def polygon(cx: int, cy: int, radius: int, degrees: Iterable[int]) -> np.ndarray:
    """Corners in these directions from a centre, in 1/SUB pixels: (n, 2) integers, x and y.

    The directions increase, from right (0) to down (90).
    """
    # Python's own cos and sin: NumPy's vectorised ones differ from processor to processor.
    return np.array(
        [
            (cx + round(radius * math.cos(a)), cy + round(radius * math.sin(a)))
            for a in (math.radians(int(d)) for d in degrees)
        ]
    )


def fill(outline: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """Return the (length, length) mask of the cells inside a convex outline, and their number.

    The number counts the cells outside the picture, too.
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


def paint(
    picture: np.ndarray, mask: np.ndarray, colour: np.ndarray, min_contrast: int
) -> np.ndarray | None:
    """Return a picture with one colour, its edge smooth, where a mask of cells is true.

    None where the colour differs by less than ``min_contrast``, summed over the channels, from the
    mean of what it covers.
    """
    size = len(picture)
    cover = mask.reshape(size, SUB, size, SUB).sum((1, 3))[..., None]
    covered = (picture * cover).sum((0, 1)) // cover.sum()
    if np.abs(covered - colour).sum() < min_contrast:
        return None
    return (picture * (SUB**2 - cover) + colour * cover) // SUB**2


def add_grain(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """The finished picture: uint8, every value moved a little at random."""
    grain = int(rng.integers(2, 12))
    picture = picture + rng.integers(-grain, grain + 1, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)
