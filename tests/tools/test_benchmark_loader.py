"""tools/benchmark_loader.py: what it makes, measures and writes."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools/benchmark_loader.py"))


def run(tmp_path, *options):
    threads, file = torch.get_num_threads(), tmp_path / "figures.json"
    try:
        TOOL["main"](["--count", "2", "--repeats", "2", "--json", str(file), *map(str, options)])
    finally:
        torch.set_num_threads(threads)
    return json.loads(file.read_text())["sets"]


def test_figures_of_both_sets(tmp_path, capsys):
    found = run(tmp_path, "--quick")
    usual, large = found["usual in ImageNet"], found["large"]
    assert usual["share_reduced"] == 0 and usual["mean_difference_where_reduced"] == 0
    assert large["share_reduced"] > 0 and 0 < large["mean_difference_where_reduced"] < 3
    printed = capsys.readouterr().out
    for name, figures in usual["pipelines"].items():
        assert printed.count(f"| {name} ") == 2
        low, ratio, high = figures["ratio_quartiles"]
        assert 0 < low <= ratio <= high and figures["images_per_second"] > 0
        assert figures["ratio_quartiles_where_reduced"] is None
        assert len(large["pipelines"][name]["ratio_quartiles_where_reduced"]) == 3
    assert len(usual["pipelines"]) == 5
    for figures in found.values():
        assert figures["pipelines"]["torchvision"]["ratio_quartiles"] == [1, 1, 1]


def test_own_images(tmp_path):
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for index in range(6):
        Image.new("RGB", (30 + index, 20)).save(folder / f"{index}.{['JPEG', 'png'][index % 2]}")
    (found,) = run(tmp_path, "--images", tmp_path / "images").values()
    assert (found["images"], found["mean_width"], found["mean_height"]) == (2, 31, 20)


def test_a_mapper_that_is_not_torchvisions_is_refused(monkeypatch, tmp_path):
    pipelines = TOOL["build_pipelines"]()
    Image.new("RGB", (30, 20), (9, 9, 9)).save(tmp_path / "a.jpg")
    records = TOOL["describe"]([tmp_path / "a.jpg"])
    TOOL["compare"](pipelines, records)
    pipelines["ours, every pixel"] = lambda record: torch.zeros(3, 224, 224, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="a.jpg, ours is not torchvision's tensor"):
        TOOL["compare"](pipelines, records)


def test_generated_photos_are_used_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    first, second = TOOL["load_photos"]()
    assert first.shape == (640, 640, 3) and first.dtype == np.uint8
    assert 20 < first.std() < 80 and (first != second).any()
    # Smooth, as photographs are: what lies side by side is alike.
    assert np.abs(np.diff(first.astype(int), axis=1)).mean() < first.std() / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "1"], "--repeats: a median and quartiles need 2"),
        (["--count", "0"], "--count: 1 image"),
        (["--images", "nowhere"], "--images: there are no JPEGs in nowhere"),
    ],
)
def test_options_out_of_range_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        TOOL["main"](options)
    assert message in capsys.readouterr().err
