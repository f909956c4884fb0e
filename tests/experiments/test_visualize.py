"""Pictures of detections, and the report on a run."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from output_folders import DETECTION, write_run

from ss_detectron.data import generate_shapes
from ss_detectron.experiments.visualize import draw_detections

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
