"""Pictures of detections, and the report on a run."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from detectron2.structures import Boxes, Instances, pairwise_ioa
from output_folders import DETECTION, write_run
from PIL import Image
from torch import tensor

from ss_detectron.data import generate_shapes
from ss_detectron.experiments.visualize import ClassVisualizer, draw_detections

TOOL = Path(__file__).parents[2] / "tools" / "report_run.py"


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate_shapes(tmp_path, train=2, val=3)
    return json.loads((tmp_path / "shapes/annotations/instances_val.json").read_text())


def test_detections_are_drawn_where_they_are(shapes):
    true = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in shapes["annotations"]
    ]
    faint = [{**detection, "score": 0.1} for detection in true]
    drawn, hidden, none = (
        np.array([axes.images[0].get_array() for axes in draw_detections("shapes_val", r).axes])
        for r in (true, faint, [])
    )
    assert len(drawn) == 2 * 3  # truth above, predictions below
    np.testing.assert_array_equal(hidden, none)
    np.testing.assert_array_equal(drawn[:3], none[:3])
    # The boxes are the true ones; only the labels differ, by their scores.
    from_truth, from_nothing = ((drawn[3:] != o).any(-1).mean() for o in (drawn[:3], none[3:]))
    assert 0 < from_truth < from_nothing


@pytest.mark.parametrize(
    "sizes",
    [[(64, 48)] * 3, [(48, 64)] * 3, [(300, 100), (64, 64), (30, 90)]],
    ids=["landscape", "portrait", "mixed"],
)
def test_rows_of_pictures_are_as_high_as_these_are(sizes, shapes, tmp_path):
    for file, size in zip(sorted((tmp_path / "shapes/val").iterdir()), sizes, strict=True):
        Image.new("RGB", size).save(file)
    figure = draw_detections("shapes_val", [], title="title")
    figure.draw_without_rendering()
    places = [axes.get_window_extent().extents / figure.dpi for axes in figure.axes]
    left, bottom, right, top = np.reshape(places, (2, 3, 4)).transpose(2, 0, 1)  # in inches
    high = top - bottom
    assert high == pytest.approx(np.full((2, 3), high.mean()), rel=0.02)
    assert ((right - left) / high)[0] == pytest.approx([w / h for w, h in sizes], rel=0.02)
    assert (left[:, 1:] - right[:, :-1] < 0.15).all()
    assert 0.1 < (bottom[0] - top[1]).min() < 0.4  # a line of text


def test_labels_and_lines_leave_small_boxes_to_be_seen():
    large = [[40.0, 60, 440, 460]]
    small = [[250.0, 0, 280, 30], [610, 10, 640, 40], [0, 440, 40, 480], [200, 250, 230, 280]]
    looks = []
    for scale in (1, 2):
        found = Instances((480 * scale, 640 * scale))
        found.pred_boxes = Boxes(scale * tensor(large + small))
        found.pred_classes, found.scores = tensor([0, 1, 1, 1, 1]), tensor([0.5] * 5)
        picture = np.zeros((*found.image_size, 3), np.uint8)
        output = ClassVisualizer(picture, ["cell", "platelets"]).draw_instance_predictions(found)
        renderer = output.canvas.get_renderer()
        extents = [text.get_window_extent(renderer).extents for text in output.ax.texts]
        labels = tensor(
            [[x0, 480 * scale - y1, x1, 480 * scale - y0] for x0, y0, x1, y1 in extents]
        )
        assert len(labels) == 5
        assert Boxes(labels).inside_box(found.image_size).all()
        assert not pairwise_ioa(Boxes(labels), found.pred_boxes[1:]).any()
        assert not pairwise_ioa(Boxes(labels), Boxes(labels)).fill_diagonal_(0).any()
        widths = np.array([box.get_linewidth() for box in output.ax.patches])
        assert (widths[1:] < widths[0] / 2).all()
        looks.append((widths[0], *(text.get_size() for text in output.ax.texts)))
    assert looks[1] == pytest.approx(2 * np.array(looks[0]))


def test_the_tool_reports_on_a_run(tmp_path, shapes, capsys):
    losses = {"total_loss": 1.0, "loss_cls": 0.5, "loss_box_reg": 0.5}
    run = write_run(tmp_path / "run", [{"iteration": 9, **losses}], "ss", DETECTION)
    report = runpy.run_path(str(TOOL))["main"]
    (tmp_path / "cls" / "inference" / "val").mkdir(parents=True)
    (tmp_path / "cls" / "inference" / "val" / "classification_results.json").write_text("{}")
    with pytest.raises(SystemExit, match="is a run of classification: tools/plot_metrics.py draws"):
        report(tmp_path / "cls", 6, 0.4)
    results = run / "inference" / "shapes_val" / "coco_instances_results.json"
    with pytest.raises(SystemExit, match=f"{results} is not there"):
        report(run, 6, 0.4)
    results.parent.mkdir(parents=True)
    results.write_text("[]")
    with pytest.raises(SystemExit, match="has no bbox/AP"):
        report(run, 6, 0.4)

    with (run / "metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": 19, "bbox/AP": 12.34, "bbox/AP50": 45.67, **losses}))
    results.write_text(json.dumps([{"image_id": 99}]))
    with pytest.raises(ValueError, match="another data set than 'shapes_val', .* image of id 99"):
        report(run, 6, 0.4)
    assert not (run / "detections.png").exists()
    results.write_text("[]")
    report(run, 6, 0.4)
    assert re.search(r"\|\s+12\.3 \|\s+45\.7 \|", capsys.readouterr().out)
    for name in ("detections.png", "training.png"):
        assert (run / name).stat().st_size > 10_000
