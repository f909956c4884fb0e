"""Figures: what is drawn, how it is labelled, and what becomes of bad input."""

import runpy
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from output_folders import CLASSIFICATION, write_rows, write_run

from ss_detectron import FEEDBACK_REGISTRY
from ss_detectron.experiments.plots import (
    depth_order,
    draw_figures,
    mean_curve,
    plot_curves,
    plot_layers,
    plot_training,
)
from ss_detectron.experiments.runs import group_runs, read_runs
from ss_detectron.experiments.styles import RULE_STYLES, style_of

TOOL = Path(__file__).parents[2] / "tools" / "plot_metrics.py"


def losses(*values: float, **more: float) -> list[dict]:
    """Rows every 20 iterations."""
    return [{"iteration": 20 * i + 19, "total_loss": v, **more} for i, v in enumerate(values)]


def groups_of(folder: Path, **options):
    return group_runs(read_runs(sorted(folder.iterdir()), **options))


def lines_of(panel) -> dict[str, list]:
    """Label -> points, of the lines with a label."""
    return {
        line.get_label(): line.get_xydata().tolist()
        for line in panel.lines
        if not line.get_label().startswith("_")
    }


# Styles ------------------------------------------------------------------------------------------


def test_every_rule_has_a_colour_dashes_and_a_marker_of_its_own():
    own = {name for name, rule in FEEDBACK_REGISTRY if rule.__module__.startswith("ss_detectron")}
    assert set(RULE_STYLES) == own
    for part in ("label", "colour", "dashes", "marker"):
        assert len({getattr(style, part) for style in RULE_STYLES.values()}) == len(RULE_STYLES)
    # Okabe and Ito's scheme for colour-blind readers.
    assert {style.colour for style in RULE_STYLES.values()} < {
        *("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
    }


def test_the_colours_are_fixed():
    assert {name: style.colour for name, style in RULE_STYLES.items()} == {
        "backpropagation": "#000000",
        "sign_symmetry": "#0072B2",
        "sign_symmetry_fixed_magnitude": "#56B4E9",
        "sign_symmetry_batchwise_magnitude": "#009E73",
        "feedback_alignment": "#D55E00",
        "feedback_alignment_signed_init": "#E69F00",
        "kolen_pollack": "#CC79A7",
    }
    assert style_of("sign_symmetry", ["anything"]) is RULE_STYLES["sign_symmetry"]


def test_other_names_have_stable_looks_that_differ():
    names = [*(f"run {i}" for i in range(7)), "sign_symmetry"]
    looks = [style_of(name, names) for name in names]
    assert looks == [style_of(name, reversed(names)) for name in names]
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == 8
    assert style_of("run 1").colour == style_of("run 1", ["sign_symmetry"]).colour
    many = [f"run {i}" for i in range(20)]  # more than there are colours
    assert {style_of(name, many).colour for name in many}.isdisjoint(
        style.colour for style in RULE_STYLES.values()
    )


# Curves ------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_with_the_samples_standard_deviation(tmp_path):
    write_run(tmp_path / "1", losses(1.0, 5.0, 7.0), SEED=1)
    write_run(tmp_path / "2", losses(3.0, 6.0), SEED=2)
    (group,) = groups_of(tmp_path)
    curve = mean_curve(group, "total_loss")
    np.testing.assert_array_equal(curve.x, [19, 39, 59])
    np.testing.assert_allclose(curve.mean, [2, 5.5, 7])
    np.testing.assert_allclose(curve.deviation, [np.sqrt(2), np.sqrt(0.5), np.nan])
    assert len(mean_curve(group, "bbox/AP").x) == 0


def test_a_curve_in_epochs(tmp_path):
    write_run(tmp_path / "1", losses(1.0, 5.0), SOLVER__IMS_PER_BATCH=8)
    (group,) = groups_of(tmp_path, images_per_epoch=160)
    np.testing.assert_allclose(mean_curve(group, "total_loss", epochs=True).x, [19 / 20, 39 / 20])


def test_curves_are_drawn_with_their_rules_colours_labels_and_bands(tmp_path):
    for seed, value in ((1, 1.0), (2, 3.0)):
        write_run(tmp_path / f"bp{seed}", losses(value, value, lr=0.1), "bp", SEED=seed)
    write_run(tmp_path / "ss", losses(4.0, 5.0, lr=0.1), "ss")
    figure = plot_curves(groups_of(tmp_path), ["total_loss", "lr"])
    left, right = figure.axes
    assert lines_of(left) == {"BP, 2 runs": [[19, 2], [39, 2]], "SS": [[19, 4], [39, 5]]}
    assert lines_of(right).keys() == lines_of(left).keys()
    bp, ss = left.lines
    assert (bp.get_color(), ss.get_color()) == ("#000000", "#0072B2")
    assert bp.get_marker() != ss.get_marker()
    assert not bp.is_dashed() and ss.is_dashed()
    (band,) = left.collections  # of the rule with two seeds
    heights = band.get_paths()[0].get_extents()
    np.testing.assert_allclose([heights.y0, heights.y1], [2 - np.sqrt(2), 2 + np.sqrt(2)])
    assert (left.get_xlabel(), left.get_ylabel()) == ("iteration", "total training loss")
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert [text.get_text() for text in figure.legends[0].texts] == ["BP, 2 runs", "SS"]
    assert [panel.get_title("left") for panel in (left, right)] == ["a", "b"]


def test_a_band_on_a_logarithmic_scale_stays_above_zero(tmp_path):
    for seed, value in ((1, 1.0), (2, 30.0)):
        write_run(tmp_path / f"bp{seed}", losses(value, value), "bp", SEED=seed)
    (panel,) = plot_curves(groups_of(tmp_path), ["total_loss"]).axes
    assert panel.collections[0].get_paths()[0].get_extents().y0 > 0


def test_two_settings_of_one_rule_share_its_colour_alone(tmp_path):
    write_run(tmp_path / "a", losses(1.0, 2.0), "ss")
    write_run(tmp_path / "b", losses(1.0, 2.0), "ss", MODEL__FEEDBACK__GAIN=1.0)
    (panel,) = plot_curves(groups_of(tmp_path), ["total_loss"]).axes
    one, other = panel.lines
    assert one.get_color() == other.get_color() == RULE_STYLES["sign_symmetry"].colour
    assert one.get_marker() != other.get_marker()
    assert {line.get_label() for line in panel.lines} == {"SS, GAIN 0.5", "SS, GAIN 1.0"}


def test_training_of_one_run():
    metrics = [
        {"iteration": 19, "total_loss": 2.0, "loss_cls": 1.5, "loss_box_reg": 0.5},
        {"iteration": 39, "total_loss": 1.0, "loss_cls": 0.5, "loss_box_reg": 0.5, "bbox/AP": 12.0},
    ]
    panels = plot_training(metrics).axes
    assert lines_of(panels[0]) == {
        "total_loss": [[19, 2.0], [39, 1.0]],
        "loss_cls": [[19, 1.5], [39, 0.5]],
        "loss_box_reg": [[19, 0.5], [39, 0.5]],
    }
    assert lines_of(panels[1]) == {"bbox/AP": [[39, 12.0]]}
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in panels)
    assert plot_training(metrics[:1]).axes[1].texts[0].get_text() == "not evaluated"


# Layers ------------------------------------------------------------------------------------------

LAYERS = [
    "backbone.bottom_up.stem.conv1",
    "backbone.bottom_up.res2.0.conv1",
    "backbone.bottom_up.res2.0.conv2",
    "backbone.bottom_up.res2.0.shortcut",
    "backbone.bottom_up.res2.1.conv1",
    "backbone.bottom_up.res2.10.conv1",
    "backbone.bottom_up.res3.0.conv1",
    "backbone.fpn_lateral3",
    "backbone.fpn_output3",
    "backbone.top_block.p6",
    "head.bbox_subnet.0",
    "head.cls_subnet.0",
    "head.bbox_pred",
    "head.cls_score",
]


@pytest.mark.parametrize(
    "layers",
    [
        LAYERS,
        ["backbone.stem.conv1", "backbone.res5.0.conv1", "linear"],
        ["backbone.conv1", "backbone.conv2", "backbone.fc6", "linear"],
    ],
)
def test_layers_are_ordered_from_input_to_output(layers):
    assert depth_order(sorted(layers)) == layers
    assert depth_order(reversed(layers)) == layers


def aligned(angle: float) -> list[dict]:
    """Two measurements in which the angle falls from layer to layer."""
    return [
        {"iteration": i, "total_loss": 1.0, "alignment/gradient_angle": angle}
        | {f"alignment/weight_angle/{name}": angle - k for k, name in enumerate(LAYERS)}
        for i in (0, 39)
    ]


def test_layers_are_lines_coloured_by_depth_in_a_panel_per_rule(tmp_path):
    for rule, angle in (("bp", 14.0), ("fa", 90.0), ("ss", 40.0)):
        write_run(tmp_path / rule, aligned(angle), rule)
    figure = plot_layers(groups_of(tmp_path), "weight_angle")
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == ["BP", "SS", "FA"]
    lines = lines_of(panels[2])
    assert list(lines) == LAYERS
    assert lines[LAYERS[3]] == [[0, 87], [39, 87]]
    colours = [line.get_color() for line in panels[2].lines if line.get_label() in LAYERS]
    expected = matplotlib.colormaps["viridis"].resampled(len(LAYERS))(range(len(LAYERS)))
    assert [to_hex(c) for c in colours] == [to_hex(c) for c in expected]
    references = [line for line in panels[0].lines if line.get_label() not in LAYERS]
    assert [set(line.get_ydata()) for line in references] == [{90}]
    assert panels[0].get_ylabel() == "angle between W and B, °"
    assert bar.get_ylabel() == "layer, from input to output"
    names = [text.get_text() for text in bar.get_yticklabels()]
    assert (names[0], names[-1]) == ("stem.conv1", "head.cls_score")
    assert bar.yaxis_inverted()  # the input above


def test_a_layer_with_one_measurement_is_a_point(tmp_path):
    write_run(tmp_path / "fa", aligned(90.0)[:1], "fa")
    panel, _ = plot_layers(groups_of(tmp_path), "weight_angle").axes
    assert {line.get_marker() for line in panel.lines if line.get_label() in LAYERS} == {"."}


# All figures of some runs ------------------------------------------------------------------------


def detection(ap: float, **more: float) -> list[dict]:
    rows = losses(2.0, 1.0, loss_cls=1.5, loss_box_reg=0.5, **more)
    return [*rows, {"iteration": 39, "bbox/AP": ap / 2}, {"iteration": 400, "bbox/AP": ap}]


def classification(error: float, steps: int = 200) -> list[dict]:
    top = {"classification/top1_error": error, "classification/top5_error": error / 2}
    return [*losses(2.0, 1.0, loss_cls=2.0, train_top1_error=9.0), {"iteration": steps} | top]


def stems(files: list[Path]) -> list[str]:
    return list(dict.fromkeys(file.stem for file in files))


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The keys, and whether in epochs, of the curves that are drawn."""
    calls = []

    def spy(groups, keys, *, epochs=False):
        calls.append((keys, epochs))
        return plot_curves(groups, keys, epochs=epochs)

    monkeypatch.setattr("ss_detectron.experiments.plots.plot_curves", spy)
    return calls


def test_detection_is_ap_and_losses_against_iterations(tmp_path, drawn, caplog):
    for rule in ("bp", "ss"):
        write_run(tmp_path / "runs" / rule, detection(50.0), rule)
    runs = read_runs((tmp_path / "runs").iterdir(), images_per_epoch=100)
    files = draw_figures(runs, tmp_path / "figures" / "new", formats=["png", "pdf", "svg"])
    assert stems(files) == ["losses", "detection"]
    parts = ["total_loss", "loss_box_reg", "loss_cls"]
    assert drawn == [(parts, False), (["bbox/AP", *parts], False)]
    kinds = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert {file.suffix for file in files} == kinds.keys()
    for file in files:
        assert file.read_bytes().startswith(kinds[file.suffix])
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_classification_is_top_1_and_top_5_error_against_epochs(tmp_path, drawn):
    for rule in ("bp", "ss"):
        write_run(tmp_path / rule, classification(50.0), rule, CLASSIFICATION)
    runs = read_runs(tmp_path.iterdir(), images_per_epoch=2000)
    assert stems(draw_figures(runs, tmp_path / "figures", formats=["png"])) == ["losses", "error"]
    assert drawn == [
        (["total_loss", "train_top1_error"], True),
        (["classification/top1_error", "classification/top5_error"], True),
    ]


def test_where_epochs_are_not_known_iterations_are_drawn_and_that_is_said(tmp_path, drawn, caplog):
    write_run(tmp_path / "bp", classification(50.0), "bp", CLASSIFICATION)
    draw_figures(read_runs([tmp_path / "bp"]), tmp_path / "figures", formats=["png"])
    assert [epochs for _, epochs in drawn] == [False, False]
    assert "error is drawn against iterations" in caplog.text
    assert f"not known of {tmp_path}/bp" in caplog.text


def test_alignment_is_drawn_where_it_was_measured(tmp_path):
    rows = [
        row | {f"alignment/{q}/{LAYERS[0]}": 1.0 for q in ("norm_ratio", "sign_agreement")}
        for row in aligned(50.0)
    ]
    write_run(tmp_path / "fa", [row | {"alignment/gradient_angle/x": 3.0} for row in rows], "fa")
    write_run(tmp_path / "ss", losses(1.0), "ss")
    files = draw_figures(read_runs(tmp_path.iterdir()), tmp_path / "figures", formats=["png"])
    assert stems(files) == [
        "losses",
        "gradient_angle",
        "weight_angle",
        "layer_gradient_angle",
        "norm_ratio",
        "sign_agreement",
    ]


def test_a_metric_that_some_runs_lack_is_drawn_of_the_others(tmp_path, drawn, caplog):
    write_run(tmp_path / "bp", detection(50.0), "bp")
    write_run(tmp_path / "fa", losses(1.0, 2.0), "fa")
    write_run(tmp_path / "cls", classification(50.0), "bp", CLASSIFICATION)
    runs = read_runs(tmp_path / name for name in ("bp", "fa", "cls"))
    files = draw_figures(runs, tmp_path / "x", formats=["png"])
    assert stems(files) == ["losses", "error", "detection"]
    assert f"{tmp_path}/fa has no bbox/AP; left out" in caplog.text
    assert f"{tmp_path}/bp has no classification/top1_error and no classif" in caplog.text

    wanted = ["bbox/AP", "nonsense"]
    files = draw_figures(runs, tmp_path / "y", metrics=wanted, formats=["png"])
    assert stems(files) == ["losses", "bbox_AP"]
    assert "No run has the metric nonsense; they have bbox/AP, classification/" in caplog.text


def test_a_run_that_ended_early_is_drawn_and_named(tmp_path, caplog):
    write_run(tmp_path / "1", losses(1.0, 2.0, 3.0), SEED=1)
    write_run(tmp_path / "2", losses(1.0), SEED=2)
    draw_figures(read_runs(tmp_path / name for name in "12"), tmp_path / "x", formats=["png"])
    assert f"{tmp_path}/2 ends at iteration 19, others of its rule go on to 59" in caplog.text


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    write_run(tmp_path / "bp", losses(1.0, float("nan"), float("inf"), 2.0))
    (panel,) = plot_curves(groups_of(tmp_path), ["total_loss"]).axes
    np.testing.assert_array_equal(panel.lines[0].get_ydata(), [1.0, np.nan, np.inf, 2.0])
    assert draw_figures(read_runs([tmp_path / "bp"]), tmp_path / "figures", formats=["png"])


# The tool ----------------------------------------------------------------------------------------


def plot_metrics(*words) -> int:
    tool = runpy.run_path(str(TOOL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plot_metrics.py", *map(str, words)])
        return tool["main"](tool["parse_arguments"]())


def test_the_tool_draws_what_can_be_drawn_and_says_the_rest(tmp_path, capsys, caplog):
    write_run(tmp_path / "good", detection(50.0))
    write_rows(tmp_path / "empty", [])
    write_run(tmp_path / "longer", detection(50.0), "ss", SOLVER__MAX_ITER=800)
    with (tmp_path / "longer" / "metrics.json").open("a") as file:
        file.write('{"iteration": 599, "tot')
    names = ("missing", "empty", "good", "longer")
    figures = tmp_path / "figures"
    folders = [tmp_path / name for name in names]
    assert plot_metrics(*folders, "--output", figures, "--format", "svg") == 0
    assert {file.name for file in figures.iterdir()} == {"losses.svg", "detection.svg"}
    assert "detection.svg" in capsys.readouterr().out
    for message in (
        "missing is not there",
        "empty/metrics.json is empty",
        "longer/metrics.json, line 5 is not complete",
        "SOLVER.MAX_ITER differs",
    ):
        assert message in caplog.text
    text = (figures / "detection.svg").read_text()
    assert all(f">{word}</text>" in text for word in ("BP", "SS", "box AP, %", "iteration"))


def test_the_tool_fails_where_there_is_nothing_to_draw(tmp_path, capsys):
    assert plot_metrics(tmp_path / "missing", "--output", tmp_path / "figures") == 1
    assert "Nothing could be drawn" in capsys.readouterr().err
    write_rows(tmp_path / "run", [{"iteration": 3, "lr": 0.1}])
    assert plot_metrics(tmp_path / "run", "--output", tmp_path / "figures") == 1
    assert not (tmp_path / "figures").exists()
