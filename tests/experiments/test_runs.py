"""What is read from output folders, and which runs belong together."""

import numpy as np
import pytest
from output_folders import CLASSIFICATION, write_rows, write_run

from ss_detectron.experiments.runs import (
    group_runs,
    method_of_config,
    read_metrics,
    read_run,
    read_runs,
    warn_of_differences,
)

ROWS = [{"iteration": 19, "total_loss": 2.0}, {"iteration": 39, "total_loss": 1.0}]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"iteration": 19, "loss": 2.0}\n{"iteration": 39, "lo', {19: 2.0}),
        ('{"iteration": 19, "lo{"iteration": 39, "loss": 1.0}\n', {39: 1.0}),  # by a resumed run
        ('\0\0\n{"iteration": 19, "loss": NaN}\n', {19: pytest.approx(np.nan, nan_ok=True)}),
        ("", {}),
    ],
)
def test_rows_that_were_cut_off_are_left_out_and_reported(text, values, tmp_path, caplog):
    (tmp_path / "metrics.json").write_text(text)
    rows = read_metrics(tmp_path / "metrics.json")
    assert {row["iteration"]: row["loss"] for row in rows} == values
    assert ("not complete" in caplog.text) == ('"lo{' in text or text.endswith('"lo'))


def test_rows_of_one_iteration_are_one_as_a_resumed_run_wrote_them_last(tmp_path):
    again = {"iteration": 39, "total_loss": 3.0}
    write_rows(tmp_path, [*ROWS[::-1], again, {"iteration": 39, "lr": 5.0}])
    assert read_metrics(tmp_path / "metrics.json") == [ROWS[0], again | {"lr": 5.0}]


def test_a_run_of_this_package(tmp_path):
    rows = [*ROWS, {"iteration": 401, "bbox/AP": 5.0}]  # resumed for its evaluation alone
    run = read_run(write_run(tmp_path / "x", rows, "kp", SEED=7, SOLVER__MAX_ITER=400))
    assert (run.label, run.config["SEED"]) == ("kolen_pollack", 7)
    assert run.metrics == ["bbox/AP", "total_loss"]
    np.testing.assert_array_equal(run.series("total_loss"), [[19, 39], [2, 1]])
    np.testing.assert_array_equal(run.series("bbox/AP"), [[400], [5]])
    assert run.last("total_loss") == 1
    assert np.isnan(run.last("segm/AP"))
    assert [len(x) for x in run.series("segm/AP")] == [0, 0]


def test_a_run_of_stock_detectron2_needs_metrics_alone(tmp_path):
    write_rows(tmp_path, ROWS)
    run = read_run(tmp_path)
    assert (run.label, run.config, run.epochs_per_iteration) == (None, {}, None)
    write_rows(tmp_path, [*ROWS, {"iteration": 39, "epoch": 3.0}])
    assert read_run(tmp_path).epochs_per_iteration == 3 / 40
    backbone = "MODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}\nSEED: 3\n"
    (tmp_path / "config.yaml").write_text(backbone)
    assert read_run(tmp_path).label is None
    assert read_run(tmp_path).config["SEED"] == 3


@pytest.mark.parametrize("text", ["a: !!python/object:x.y {}\n", "a: [\n", "\xff"])
def test_a_config_that_cannot_be_read_is_none_and_reported(text, tmp_path, caplog):
    write_rows(tmp_path, ROWS)
    (tmp_path / "config.yaml").write_bytes(text.encode("latin1"))
    assert read_run(tmp_path).config == {}
    assert str(tmp_path) in caplog.text


@pytest.mark.parametrize(
    ("rule", "backbone", "expected"),
    [
        ("frsf", "build_fa_resnet_backbone", "sign_symmetry_fixed_magnitude"),
        ("one_of_their_own", "", "one_of_their_own"),
        ("", "build_fa_resnet_fpn_backbone", "feedback_alignment"),
        ("", "build_feedback_resnet_backbone", None),
    ],
)
def test_rule_of_a_config(rule, backbone, expected):
    config = {"MODEL.FEEDBACK.RULE": rule, "MODEL.BACKBONE.NAME": backbone}
    assert method_of_config(config) == expected
    assert method_of_config({**config, "MODEL.LEARNER.NAME": "bp"}) == expected
    for learner, full in (("dfa", "direct_feedback"), ("hebb", "hebb")):
        assert method_of_config({**config, "MODEL.LEARNER.NAME": learner}) == full


def test_folders_that_hold_no_run_are_named_and_left_out(tmp_path, caplog):
    good = write_run(tmp_path / "good", ROWS)
    write_rows(tmp_path / "empty", [])
    (tmp_path / "file").touch()
    runs = read_runs(tmp_path / n for n in ("missing", "empty", "file", "good", "good/../good"))
    assert [run.folder.resolve() for run in runs] == [good]
    for message in ("missing is no output folder", "empty/metrics.json is empty", "file is no out"):
        assert message in caplog.text


def test_seeds_are_one_group_and_rules_come_in_their_order(tmp_path):
    for rule in ("kp", "ss", "bp"):
        for seed in (1, 2):
            keys = {"SEED": seed, "MODEL__FEEDBACK__SEED": seed}
            write_run(tmp_path / f"{rule}{seed}", ROWS, rule, **keys)
    groups = group_runs(read_runs(sorted(tmp_path.iterdir(), reverse=True)))
    assert [(g.name, g.detail, [run.folder.name for run in g.runs]) for g in groups] == [
        ("backpropagation", "", ["bp2", "bp1"]),
        ("sign_symmetry", "", ["ss2", "ss1"]),
        ("kolen_pollack", "", ["kp2", "kp1"]),
    ]


def test_one_rule_with_two_settings_is_two_groups_told_apart_by_them(tmp_path):
    write_run(tmp_path / "a", ROWS, "ss")
    write_run(tmp_path / "b", ROWS, "sign_symmetry", MODEL__FEEDBACK__GAIN=1.0)
    write_run(tmp_path / "c", ROWS, "ss", SEED=2)
    groups = group_runs(read_runs(tmp_path / name for name in "abc"))
    assert [(group.detail, group.variant, len(group.runs)) for group in groups] == [
        ("GAIN 0.5", 0, 2),
        ("GAIN 1.0", 1, 1),
    ]
    # More than two settings: by the folders.
    write_run(tmp_path / "d", ROWS, "ss", config_file=CLASSIFICATION)
    groups = group_runs(read_runs(tmp_path / name for name in "bd"))
    assert [group.detail for group in groups] == ["b", "d"]


def test_runs_whose_rule_is_not_known_go_by_their_folders(tmp_path):
    names = ["kolen_pollack", "a/output", "b/output"]  # which does not make it a run of that rule
    for name in names:
        write_rows(tmp_path / name, ROWS)
    write_run(tmp_path / "kp", ROWS, "kp")
    groups = group_runs(read_runs(tmp_path / name for name in [*names, "kp"]))
    assert [group.name for group in groups] == ["kolen_pollack", "kolen_pollack", *names[1:]]


def test_runs_of_other_experiments_are_warned_of(tmp_path, caplog):
    write_run(tmp_path / "a", ROWS)
    write_run(tmp_path / "b", ROWS, SOLVER__MAX_ITER=800)
    write_rows(tmp_path / "stock", ROWS)
    runs = read_runs(tmp_path / name for name in ("a", "b", "stock"))
    caplog.clear()
    warn_of_differences(runs)
    (record,) = caplog.records
    assert f"SOLVER.MAX_ITER differs: 400 in {tmp_path}/a; 800 in {tmp_path}/b" in record.message
