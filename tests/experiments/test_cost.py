"""The multiply-adds of a training step by a run's config, and the figure of what they buy."""

import itertools
import math

import pytest
from image_utils import datasets_folder, write_images

from ss_detectron.experiments.cost import multiply_adds
from ss_detectron.experiments.plots import Cost, plot_costs
from ss_detectron.experiments.runs import merged_config

SIZES = (784, 256, 256, 256, 256, 256, 10)
PRODUCTS = [a * b for a, b in itertools.pairwise(SIZES)]
ALL, MIDDLE, TOP = sum(PRODUCTS), sum(PRODUCTS[1:-1]), PRODUCTS[-1]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("mnist_fc_fa.yaml", 2 * ALL + MIDDLE + TOP),
        # Of the inverses' step, a forward pass more; half of both, for they take turns.
        ("mnist_fc_dtp.yaml", (3 * ALL + 5 * MIDDLE + TOP) / 2),
    ],
)
def test_the_multiply_adds_are_those_of_a_real_step(config, expected, tmp_path, monkeypatch):
    with datasets_folder(tmp_path, monkeypatch) as folder:
        write_images(folder / "few", (28, 28), a=4, b=4)
        few = ["DATASETS.IMAGE_FOLDERS", [["few", "few"]], "DATASETS.TRAIN", ("few",)]
        few += ["DATASETS.TEST", (), "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATION_STEPS", 2]
        assert multiply_adds(merged_config(config, few)) == expected


def test_what_is_known_of_each_method_is_a_point():
    points = [
        Cost("backpropagation", "BP", 1.5, 0.1, 1.0, 0.0, 0.0),
        Cost("difference_target_propagation", "DTP, alternating", 2.0, 0.0, 1.1, math.nan, 60.0),
        Cost("difference_target_propagation", "DTP, parallel", 5.0, 0.0, 1.9, math.nan, math.nan),
    ]
    figure = plot_costs(points, "classification/top1_error")
    assert [text.get_text() for text in figure.legends[0].texts] == [p.label for p in points]
    panels = [[line.get_xydata()[0] for line in panel.lines[:3]] for panel in figure.axes]
    known = [[not math.isnan(x) for x, _ in points] for points in panels]
    assert known == [[True] * 3, [True, False, False], [True, True, False]]
    assert panels[0][2].tolist() == [1.9, 5.0]
    _, filled, hollow = (line.get_markerfacecolor() for line in figure.axes[0].lines[:3])
    assert filled != "none" and hollow == "none"
