import numpy as np
import pytest
from matplotlib.path import Path as Polygon

from ss_detectron.data.drawing import SUB, add_grain, background, fill, paint, polygon


def test_polygon_goes_from_right_to_down():
    corners = polygon(100, 50, 40, (0, 90, 180, 270))
    assert corners.tolist() == [[140, 50], [100, 90], [60, 50], [100, 10]]


@pytest.mark.parametrize("centre", [(20, 20), (3, 38), (0, 0)])
def test_fill_takes_the_cells_whose_centre_is_inside(centre):
    outline = polygon(*centre, 15, (10, 100, 170, 290))
    mask, area = fill(outline, 40)
    y, x = np.mgrid[-40:80, -40:80]
    centres = np.stack([x.ravel(), y.ravel()], -1) + 0.5
    # A little more, as cells on the line itself belong to the shape.
    whole = Polygon(outline).contains_points(centres, radius=1e-6).reshape(120, 120)
    np.testing.assert_array_equal(mask, whole[40:80, 40:80])
    assert area == whole.sum()


def test_paint_mixes_by_the_part_of_a_pixel_that_is_covered():
    picture = np.full((3, 3, 3), 17)
    mask = np.zeros((3 * SUB, 3 * SUB), dtype=bool)
    mask[SUB : 2 * SUB, SUB : 2 * SUB] = True  # the middle pixel
    mask[0, :SUB] = True  # one row of cells of the first
    painted = paint(picture, mask, np.array([217, 17, 0]), 0)
    assert painted[1, 1].tolist() == [217, 17, 0]
    assert painted[0, 0].tolist() == [17 + 200 // SUB, 17, 12]  # 12.75 of the last, rounded down
    assert (painted != picture).any(-1).sum() == 2
    assert (picture == 17).all()


def test_paint_refuses_less_contrast():
    """It is measured where the shape will be, whatever is beside it."""
    picture = np.full((2, 2, 3), 250)
    picture[0, 0] = (10, 20, 30)
    mask = np.zeros((2 * SUB, 2 * SUB), dtype=bool)
    mask[:SUB, :SUB] = True
    colour = np.array([40, 10, 90])  # differs by 30 + 10 + 60
    assert paint(picture, mask, colour, 101) is None
    assert paint(picture, mask, colour, 100)[0, 0].tolist() == [40, 10, 90]


def test_background_and_grain_stay_in_range():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        texture = background(rng, 48)
        assert texture.shape == (48, 48, 3)
        assert texture.min() >= 0 and texture.max() < 160
        for extreme in (0, 255):
            picture = add_grain(rng, np.full((48, 48, 3), extreme))
            assert picture.dtype == np.uint8
            assert 0 < np.abs(picture.astype(int) - extreme).max() < 12
