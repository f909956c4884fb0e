"""What is read from output folders, and which runs belong together."""

import logging

import numpy as np
import pytest
from output_folders import CLASSIFICATION, write_rows, write_run

from ss_detectron.config import flatten_config
from ss_detectron.experiments.metrics import label_of, losses_of, main_metric, read_metrics
from ss_detectron.experiments.runs import (
    differences,
    group_runs,
    read_run,
    read_runs,
    rule_of_config,
    warn_of_differences,
)

ROWS = [{"iteration": 19, "total_loss": 2.0}, {"iteration": 39, "total_loss": 1.0}]


# metrics.json ------------------------------------------------------------------------------------


def test_a_line_cut_off_is_reported_once_and_the_rest_read(tmp_path, caplog):
    file = tmp_path / "metrics.json"
    file.write_text('{"iteration": 19, "total_loss": 2.0}\n{"iteration": 39, "total_l')
    for _ in range(2):
        assert read_metrics(file) == [{"iteration": 19, "total_loss": 2.0}]
    assert caplog.text.count("line 2 is not complete") == 1


def test_the_row_that_a_resumed_run_wrote_behind_a_line_cut_off_is_read(tmp_path, caplog):
    file = tmp_path / "metrics.json"
    file.write_text('{"iteration": 19, "total_l{"iteration": 39, "total_loss": 1.0}\n')
    assert read_metrics(file) == [{"iteration": 39, "total_loss": 1.0}]
    assert "line 1 is not complete" in caplog.text


@pytest.mark.parametrize("line", ["3", '{"total_loss": 1.0}', "\x00\x00", "[]", ""])
def test_lines_that_are_no_rows_are_left_out(line, tmp_path, caplog):
    file = tmp_path / "metrics.json"
    file.write_text(f'{line}\n{{"iteration": 19, "total_loss": 2.0}}\n')
    assert read_metrics(file) == [{"iteration": 19, "total_loss": 2.0}]
    assert "line 1 is not complete" in caplog.text


def test_rows_written_again_by_a_resumed_run_count_once(tmp_path):
    file = tmp_path / "metrics.json"
    rows = [(39, 1.0), (19, 2.0), (39, 1.5)]
    file.write_text("".join(f'{{"iteration": {i}, "total_loss": {v}}}\n' for i, v in rows))
    assert [row["total_loss"] for row in read_metrics(file)] == [2.0, 1.5]


def test_rows_of_one_iteration_are_one(tmp_path):
    write_rows(tmp_path, [{"iteration": 3, "total_loss": 1.0}, {"iteration": 3, "bbox/AP": 5.0}])
    assert read_metrics(tmp_path / "metrics.json") == [
        {"iteration": 3, "total_loss": 1.0, "bbox/AP": 5.0}
    ]


def test_metrics_are_labelled_with_their_units_and_test_set():
    assert label_of("bbox/AP") == "box AP, %"
    assert label_of("my_val/bbox/AP") == "box AP, % (my_val)"
    assert label_of("something/else") == "something/else"


def test_one_part_of_a_loss_is_the_total():
    assert losses_of(["loss_cls", "lr", "total_loss", "train_top1_error"]) == [
        "total_loss",
        "train_top1_error",
    ]
    assert losses_of(["loss_a", "loss_b", "total_loss"]) == ["total_loss", "loss_a", "loss_b"]
    assert losses_of(["loss_a"]) == ["loss_a"]
    assert losses_of(["lr"]) == []


def test_the_metric_of_a_comparison_is_the_first_test_sets():
    assert main_metric(["bbox/AP", "bbox/AP50"]) == "bbox/AP"
    assert main_metric(["classification/top1_error", "train_top1_error"], "x") == (
        "classification/top1_error"
    )
    assert main_metric(["a/bbox/AP", "b/bbox/AP"], "b") == "b/bbox/AP"
    assert main_metric(["lr"]) is None


# A folder ----------------------------------------------------------------------------------------


def test_a_run_of_this_package(tmp_path):
    run = read_run(write_run(tmp_path / "x", ROWS, "kp", SEED=7))
    assert run.rule == "kolen_pollack"
    assert run.config["SEED"] == 7
    assert run.metrics == ["total_loss"]
    np.testing.assert_array_equal(run.series("total_loss"), [[19, 39], [2, 1]])
    assert run.last("total_loss") == 1
    assert np.isnan(run.last("bbox/AP"))
    assert [len(x) for x in run.series("bbox/AP")] == [0, 0]


def test_a_run_of_stock_detectron2_needs_metrics_alone(tmp_path):
    write_rows(tmp_path, ROWS)
    run = read_run(tmp_path)
    assert (run.rule, run.config, run.epochs_per_iteration) == (None, {}, None)
    (tmp_path / "config.yaml").write_text(
        "MODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}\nSEED: 3\n"
    )
    assert read_run(tmp_path).rule is None
    assert read_run(tmp_path).config["SEED"] == 3


@pytest.mark.parametrize("text", ["a: !!python/object:x.y {}\n", "a: [\n", "- 1\n", "\xff"])
def test_a_config_that_cannot_be_read_is_none(text, tmp_path):
    write_rows(tmp_path, ROWS)
    (tmp_path / "config.yaml").write_bytes(text.encode("latin1"))
    assert read_run(tmp_path).config == {}


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"MODEL.FEEDBACK.RULE": "frsf"}, "sign_symmetry_fixed_magnitude"),
        ({"MODEL.FEEDBACK.RULE": "one_of_their_own"}, "one_of_their_own"),
        ({"MODEL.BACKBONE.NAME": "build_ss_resnet_backbone"}, "sign_symmetry"),
        (
            {"MODEL.FEEDBACK.RULE": "", "MODEL.BACKBONE.NAME": "build_fa_resnet_fpn_backbone"},
            "feedback_alignment",
        ),
        ({"MODEL.BACKBONE.NAME": "build_resnet_backbone"}, None),
        ({"MODEL.BACKBONE.NAME": "build_feedback_resnet_backbone"}, None),
        ({}, None),
    ],
)
def test_rule_of_a_config(config, rule):
    assert rule_of_config(config) == rule


def test_a_run_resumed_for_its_evaluation_alone_ends_where_the_others_do(tmp_path):
    rows = [{"iteration": 399, "total_loss": 1.0}, {"iteration": 401, "bbox/AP": 5.0}]
    run = read_run(write_run(tmp_path, rows, SOLVER__MAX_ITER=400))
    np.testing.assert_array_equal(run.series("bbox/AP"), [[400], [5]])


def test_epochs_are_known_from_the_metrics_the_log_or_the_caller(tmp_path):
    write_run(tmp_path, ROWS, SOLVER__IMS_PER_BATCH=8)
    assert read_run(tmp_path).epochs_per_iteration is None
    assert read_run(tmp_path, images_per_epoch=400).epochs_per_iteration == 8 / 400
    (tmp_path / "log.txt").write_text(
        "[time ss_detectron.engine]: SOLVER.MAX_ITER: 40 steps of 8 images are 1 epochs of 320 "
        "images; SOLVER.STEPS: none.\n"
        "[time ss_detectron.engine]: SOLVER.MAX_ITER: 40 steps of 8 images are 2 epochs of 160 "
        "images; SOLVER.STEPS: none.\n"
    )
    assert read_run(tmp_path).epochs_per_iteration == 8 / 160
    assert read_run(tmp_path, images_per_epoch=400).epochs_per_iteration == 8 / 400
    write_rows(tmp_path, [{"iteration": 39, "epoch": 3.0}])
    assert read_run(tmp_path).epochs_per_iteration == 3 / 40


def test_folders_that_hold_no_run_are_named_and_left_out(tmp_path, caplog):
    good = write_run(tmp_path / "good", ROWS)
    (tmp_path / "no_metrics").mkdir()
    write_rows(tmp_path / "empty", [])
    (tmp_path / "file").touch()
    names = ["missing", "no_metrics", "empty", "file", "good", "good/../good"]
    runs = read_runs(tmp_path / name for name in names)
    assert [run.folder.resolve() for run in runs] == [good]
    for message in (
        "missing is not there",
        "no_metrics is no output folder of a training: no metrics.json",
        "empty/metrics.json is empty",
        "file is not there, or no folder",
    ):
        assert message in caplog.text


# Runs beside each other --------------------------------------------------------------------------


def test_differences_are_of_keys_that_both_have():
    one = flatten_config({"A": {"B": 1, "C": [1, 2]}, "D": 3, "OLD": 1})
    other = flatten_config({"A": {"B": 2, "C": [1, 2]}, "D": 4, "NEW": {"X": 1}})
    assert differences(one, other) == {"A.B": (1, 2), "D": (3, 4)}
    assert differences(one, other, ignored=["D"]) == {"A.B": (1, 2)}


def test_seeds_are_one_group_and_rules_come_in_their_order(tmp_path):
    for rule in ("kp", "ss", "bp"):
        for seed in (1, 2):
            keys = {"SEED": seed, "MODEL__FEEDBACK__SEED": seed}
            write_run(tmp_path / f"{rule}{seed}", ROWS, rule, **keys)
    groups = group_runs(read_runs(sorted(tmp_path.iterdir(), reverse=True)))
    assert [group.name for group in groups] == ["backpropagation", "sign_symmetry", "kolen_pollack"]
    assert [[run.folder.name for run in group.runs] for group in groups] == [
        ["bp2", "bp1"],
        ["ss2", "ss1"],
        ["kp2", "kp1"],
    ]
    assert {(group.detail, group.variant) for group in groups} == {("", 0)}


def test_one_rule_with_two_settings_is_two_groups_told_apart_by_them(tmp_path):
    write_run(tmp_path / "a", ROWS, "ss")
    write_run(tmp_path / "b", ROWS, "sign_symmetry", MODEL__FEEDBACK__GAIN=1.0)
    write_run(tmp_path / "c", ROWS, "ss", SEED=2)
    groups = group_runs(read_runs(tmp_path / name for name in "abc"))
    assert [(group.detail, group.variant, len(group.runs)) for group in groups] == [
        ("GAIN 0.5", 0, 2),
        ("GAIN 1.0", 1, 1),
    ]


def test_one_rule_on_two_tasks_is_told_apart_by_the_folders(tmp_path):
    write_run(tmp_path / "detection", ROWS)
    write_run(tmp_path / "classification", ROWS, config_file=CLASSIFICATION)
    groups = group_runs(read_runs([tmp_path / "detection", tmp_path / "classification"]))
    assert [group.detail for group in groups] == ["detection", "classification"]


def test_runs_whose_rule_is_not_known_go_by_their_folders(tmp_path):
    for name in ("a/output", "b/output", "other"):
        write_rows(tmp_path / name, ROWS)
    groups = group_runs(read_runs(tmp_path / name for name in ("other", "a/output", "b/output")))
    assert [group.name for group in groups] == ["other", "a/output", "b/output"]


def test_a_folder_that_is_only_named_after_a_rule_is_no_run_of_it(tmp_path):
    write_run(tmp_path / "a", ROWS, "ss")
    write_rows(tmp_path / "sign_symmetry", ROWS)
    groups = group_runs(read_runs([tmp_path / "a", tmp_path / "sign_symmetry"]))
    assert [len(group.runs) for group in groups] == [1, 1]


def test_runs_of_other_experiments_are_warned_of(tmp_path, caplog):
    write_run(tmp_path / "a", ROWS)
    write_run(tmp_path / "b", ROWS, SOLVER__MAX_ITER=800)
    write_run(tmp_path / "c", ROWS, "ss")
    write_rows(tmp_path / "stock", ROWS)
    runs = read_runs(tmp_path / name for name in ("a", "b", "c", "stock"))
    with caplog.at_level(logging.WARNING):
        warn_of_differences(runs)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= 30]
    assert message == (
        f"The runs do not compare, for SOLVER.MAX_ITER differs: 400 in {tmp_path}/a, {tmp_path}/c; "
        f"800 in {tmp_path}/b"
    )
