"""Pictures of detections, and the report on a run."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg

from ss_detectron import add_ss_config, find_config
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


def test_the_tool_reports_on_a_run(tmp_path, shapes, capsys):
    run = tmp_path / "run"
    (run / "inference").mkdir(parents=True)
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.merge_from_file(find_config("quick/shapes_retinanet_ss.yaml"))
    (run / "config.yaml").write_text(cfg.dump())
    (run / "metrics.json").write_text('{"iteration": 9, "total_loss": 1.0}\n')

    report = runpy.run_path(str(TOOL))["main"]
    with pytest.raises(SystemExit, match=r"coco_instances_results\.json is not there"):
        report(run, 6, 0.4)

    (run / "inference" / "coco_instances_results.json").write_text("[]")
    with pytest.raises(SystemExit, match="has no bbox/AP"):
        report(run, 6, 0.4)

    with (run / "metrics.json").open("a") as file:
        file.write('{"iteration": 19, "total_loss": 1.0, "bbox/AP": 12.34, "bbox/AP50": 45.67}\n')
    report(run, 6, 0.4)
    assert re.search(r"\|\s+12\.3 \|\s+45\.7 \|", capsys.readouterr().out)
    for name in ("detections.png", "training.png"):
        assert (run / name).stat().st_size > 10_000
