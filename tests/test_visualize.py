"""Pictures of a run, from its metrics and its detections."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg

from ss_detectron import add_ss_config, find_config
from ss_detectron.data import generate_shapes
from ss_detectron.visualize import draw_detections, plot_training, read_metrics

TOOL = Path(__file__).parents[1] / "tools" / "report_run.py"


def test_a_line_cut_off_is_reported_and_the_rest_read(tmp_path, caplog):
    file = tmp_path / "metrics.json"
    file.write_text('{"iteration": 19, "total_loss": 2.0}\n{"iteration": 39, "total_l')
    with caplog.at_level(logging.WARNING, "ss_detectron"):
        assert read_metrics(file) == [{"iteration": 19, "total_loss": 2.0}]
    assert "line 2 is not complete" in caplog.text


def test_rows_written_again_by_a_resumed_run_count_once(tmp_path):
    file = tmp_path / "metrics.json"
    rows = [(39, 1.0), (19, 2.0), (39, 1.5)]
    file.write_text("".join(f'{{"iteration": {i}, "total_loss": {v}}}\n' for i, v in rows))
    assert [row["total_loss"] for row in read_metrics(file)] == [2.0, 1.5]


def test_curves_hold_the_metrics():
    metrics = [
        {"iteration": 19, "total_loss": 2.0, "loss_cls": 1.5},
        {"iteration": 39, "total_loss": 1.0, "loss_cls": 0.5, "bbox/AP": 12.0},
    ]
    losses, scores = plot_training(metrics).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines + scores.lines}
    assert lines == {
        "total_loss": [[19, 2.0], [39, 1.0]],
        "loss_cls": [[19, 1.5], [39, 0.5]],
        "bbox/AP": [[39, 12.0]],
    }
    for axes in (losses, scores):
        assert axes.get_xlabel() and axes.get_ylabel()


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate_shapes(tmp_path, train=2, val=3)
    return json.loads((tmp_path / "shapes/annotations/instances_val.json").read_text())


def test_detections_are_drawn_where_they_are(shapes):
    true = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": s}
        for a, s in zip(shapes["annotations"], [0.9] * len(shapes["annotations"]), strict=True)
    ]
    drawn, faint, none = (
        [np.asarray(axes.images[0].get_array()) for axes in draw_detections("shapes_val", r).axes]
        for r in (true, [{**t, "score": 0.1} for t in true], [])
    )
    count = len(drawn) // 2
    assert count == 3
    for i in range(count, 2 * count):
        assert (drawn[i] != none[i]).any()
        np.testing.assert_array_equal(faint[i], none[i])


def test_the_tool_reports_on_a_run(tmp_path, shapes):
    run = tmp_path / "run"
    (run / "inference").mkdir(parents=True)
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.merge_from_file(find_config("quick/shapes_retinanet_ss.yaml"))
    (run / "config.yaml").write_text(cfg.dump())
    (run / "metrics.json").write_text('{"iteration": 9, "total_loss": 1.0}\n')

    def report():
        command = [sys.executable, "-W", "ignore", str(TOOL), str(run)]
        return subprocess.run(command, capture_output=True, text=True)

    unfinished = report()
    assert unfinished.returncode != 0
    assert "coco_instances_results.json is not there" in unfinished.stderr

    (run / "inference" / "coco_instances_results.json").write_text("[]")
    unevaluated = report()
    assert unevaluated.returncode != 0
    assert "has no bbox/AP" in unevaluated.stderr

    with (run / "metrics.json").open("a") as file:
        file.write('{"iteration": 19, "total_loss": 1.0, "bbox/AP": 12.34, "bbox/AP50": 45.67}\n')
    finished = report()
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"\|\s+12\.3 \|\s+45\.7 \|", finished.stdout)
    for name in ("detections.png", "training.png"):
        assert (run / name).stat().st_size > 10_000
