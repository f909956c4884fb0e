"""Figures: what is drawn, how it is labelled, and what becomes of bad input."""

import runpy
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from output_folders import CLASSIFICATION, write_rows, write_run

from ss_detectron import FEEDBACK_REGISTRY, LEARNER_REGISTRY
from ss_detectron.experiments.plots import (
    depth_order,
    draw_figures,
    mean_curve,
    plot_curves,
    plot_layers,
)
from ss_detectron.experiments.runs import group_runs, read_runs
from ss_detectron.experiments.styles import RULE_STYLES, style_of

TOOL = Path(__file__).parents[2] / "tools" / "plot_metrics.py"


def losses(*values: float, **more: float) -> list[dict]:
    """Rows every 20 iterations."""
    return [{"iteration": 20 * i + 19, "total_loss": v, **more} for i, v in enumerate(values)]


def groups_of(folder: Path):
    return group_runs(read_runs(sorted(folder.iterdir())))


def lines_of(panel) -> dict[str, list]:
    """Label -> points, of the lines with a label."""
    return {
        line.get_label(): line.get_xydata().tolist()
        for line in panel.lines
        if not line.get_label().startswith("_")
    }


# Styles ------------------------------------------------------------------------------------------


def test_every_rule_and_other_name_has_a_look_of_its_own():
    registered = [*FEEDBACK_REGISTRY, *LEARNER_REGISTRY]
    own = {name for name, kind in registered if kind.__module__.startswith("ss_detectron")}
    assert set(RULE_STYLES) == own
    names = [*RULE_STYLES, *(f"run {i}" for i in range(7))]
    looks = [style_of(name, names) for name in names]
    assert looks == [style_of(name, reversed(names)) for name in names]
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == 20
    assert len({look.dashes for look in RULE_STYLES.values()}) == len(RULE_STYLES)


# Curves ------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_with_the_samples_standard_deviation(tmp_path):
    epoch = {"iteration": 59, "epoch": 3.0}
    write_run(tmp_path / "1", [*losses(1.0, 5.0, 7.0), epoch], SEED=1)
    write_run(tmp_path / "2", [*losses(3.0, 6.0), epoch], SEED=2)
    (group,) = groups_of(tmp_path)
    x, mean, deviation = mean_curve(group, "total_loss")
    np.testing.assert_array_equal(x, [19, 39, 59])
    np.testing.assert_allclose(mean, [2, 5.5, 7])
    np.testing.assert_allclose(deviation, [np.sqrt(2), np.sqrt(0.5), np.nan])
    assert [len(part) for part in mean_curve(group, "bbox/AP")] == [0, 0, 0]
    np.testing.assert_allclose(mean_curve(group, "total_loss", epochs=True)[0], x / 20)


def test_curves_are_drawn_with_their_rules_looks_labels_and_bands(tmp_path):
    for seed, value in ((1, 1.0), (2, 3.0)):
        write_run(tmp_path / f"bp{seed}", losses(value, value, lr=0.1), "bp", SEED=seed)
    write_run(tmp_path / "ss", losses(4.0, 5.0, lr=0.1), "ss")
    write_run(tmp_path / "fa", [{"iteration": 19, "lr": 0.1}], "fa")
    figure = plot_curves(groups_of(tmp_path), ["total_loss", "lr"])
    left, right = figure.axes
    points = {"BP, 2 runs": [[19, 2], [39, 2]], "SS": [[19, 4], [39, 5]], "FA": []}
    assert lines_of(left) == points and lines_of(right)["FA"] == [[19, 0.1]]
    assert [text.get_text() for text in figure.legends[0].texts] == list(points)
    rules = ("backpropagation", "sign_symmetry", "feedback_alignment")
    for line, style in zip(left.lines, map(RULE_STYLES.get, rules), strict=True):
        assert (line.get_color(), line.get_marker()) == (style.colour, style.marker)
    (band,) = left.collections  # of the rule with two seeds
    heights = band.get_paths()[0].get_extents()
    np.testing.assert_allclose([heights.y0, heights.y1], [2 - np.sqrt(2), 2 + np.sqrt(2)])
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")


@pytest.mark.parametrize(("end", "scale"), [(5.0, "linear"), (4.9, "log"), (0.0, "linear")])
def test_errors_far_from_where_they_begin_are_drawn_on_a_logarithmic_scale(tmp_path, end, scale):
    key = "classification/top1_error"
    rows = [{"iteration": i, key: error} for i, error in enumerate((50.0, end))]
    write_run(tmp_path / "bp", rows)
    (panel,) = plot_curves(groups_of(tmp_path), [key]).axes
    assert panel.get_yscale() == scale


def test_two_settings_of_one_rule_share_its_colour_alone(tmp_path):
    write_run(tmp_path / "a", losses(1.0, 2.0), "ss")
    write_run(tmp_path / "b", losses(1.0, 2.0), "ss", MODEL__FEEDBACK__GAIN=1.0)
    (panel,) = plot_curves(groups_of(tmp_path), ["total_loss"]).axes
    one, other = panel.lines
    assert one.get_color() == other.get_color() == RULE_STYLES["sign_symmetry"].colour
    assert one.get_marker() != other.get_marker()
    assert {line.get_label() for line in panel.lines} == {"SS, GAIN 0.5", "SS, GAIN 1.0"}


def test_a_band_on_a_logarithmic_scale_stays_above_zero_with_a_gap_where_there_is_nan(tmp_path):
    for seed, value in ((1, 1.0), (2, 30.0)):
        write_run(tmp_path / f"bp{seed}", losses(value, value, float("nan"), 2.0), "bp", SEED=seed)
    (panel,) = plot_curves(groups_of(tmp_path), ["total_loss"]).axes
    assert min(path.get_extents().y0 for path in panel.collections[0].get_paths()) > 0
    np.testing.assert_array_equal(panel.lines[0].get_ydata(), [15.5, 15.5, np.nan, 2.0])


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
    assert depth_order(sorted(layers)) == depth_order(reversed(layers)) == layers


def aligned(angle: float) -> list[dict]:
    """Two measurements in which the angle falls from layer to layer."""
    return [
        {"iteration": i, "total_loss": 1.0, "alignment/gradient_angle": angle}
        | {f"alignment/weight_angle/{name}": angle - k for k, name in enumerate(LAYERS)}
        for i in (0, 39)
    ]


def test_layers_are_lines_coloured_by_depth_in_a_panel_per_rule(tmp_path):
    for rule in ("bp", "ss", "fa"):
        write_run(tmp_path / rule, aligned(90.0), rule)
    *panels, bar = plot_layers(groups_of(tmp_path), "weight_angle").axes
    assert [panel.get_title() for panel in panels] == ["BP", "SS", "FA"]
    lines = lines_of(panels[2])
    assert list(lines) == LAYERS
    assert lines[LAYERS[3]] == [[0, 87], [39, 87]]
    colours = [line.get_color() for line in panels[2].lines if line.get_label() in LAYERS]
    expected = matplotlib.colormaps["viridis"].resampled(len(LAYERS))(range(len(LAYERS)))
    assert [to_hex(c) for c in colours] == [to_hex(c) for c in expected]
    names = [text.get_text() for text in bar.get_yticklabels()]
    assert (names[0], names[-1]) == ("stem.conv1", "head.cls_score")
    assert bar.yaxis_inverted()  # the input above


# All figures of some runs ------------------------------------------------------------------------


def detection(ap: float, **more: float) -> list[dict]:
    rows = losses(2.0, 1.0, loss_cls=1.5, loss_box_reg=0.5, **more)
    return [*rows, {"iteration": 39, "bbox/AP": ap / 2}, {"iteration": 400, "bbox/AP": ap}]


def classification(error: float, steps: int = 200) -> list[dict]:
    top = {"classification/top1_error": error, "classification/top5_error": error / 2}
    return [*losses(2.0, 1.0, loss_cls=2.0, train_top1_error=9.0), {"iteration": steps} | top]


@pytest.fixture
def drawn(monkeypatch):
    """Draws the figures of some runs; returns for each its abscissa and its panels' ordinates."""
    figures = {}

    def keep(figure, path, formats):
        labels = [axes.get_ylabel() for axes in figure.axes]
        figures[path.name] = figure.axes[0].get_xlabel(), labels
        return [path]

    monkeypatch.setattr("ss_detectron.experiments.plots._save", keep)

    def draw(folders, metrics=()):
        figures.clear()
        draw_figures(read_runs(folders), "figures", metrics=metrics)
        return dict(figures)

    return draw


def test_detection_is_ap_and_losses_against_iterations(tmp_path, drawn, caplog):
    folders = [write_run(tmp_path / rule, detection(50.0), rule) for rule in ("bp", "ss")]
    parts = ["total training loss", "training loss, boxes", "training loss, classes"]
    expected = {"losses": ("iteration", parts), "detection": ("iteration", ["box AP, %", *parts])}
    assert drawn(folders) == expected
    assert not caplog.records


def test_classification_is_top_1_and_top_5_error_against_epochs(tmp_path, drawn, caplog):
    known = [*classification(50.0), {"iteration": 200, "epoch": 4.0}]
    folder = write_run(tmp_path / "bp", known, "bp", CLASSIFICATION)
    assert drawn([folder]) == {
        # One part of a loss is the total.
        "losses": ("epoch", ["total training loss", "training top-1 error, %"]),
        "error": ("epoch", ["top-1 error, %", "top-5 error, %"]),
    }
    assert not caplog.records
    other = write_run(tmp_path / "ss", classification(50.0), "ss", CLASSIFICATION)
    assert {abscissa for abscissa, _ in drawn([folder, other]).values()} == {"iteration"}


def test_alignment_is_drawn_where_it_was_measured(tmp_path, drawn):
    quantities = ("norm_ratio", "sign_agreement", "gradient_angle")
    more = {f"alignment/{quantity}/{LAYERS[0]}": 1.0 for quantity in quantities}
    fa = write_run(tmp_path / "fa", [row | more for row in aligned(50.0)], "fa")
    names = ["losses", "gradient_angle", "weight_angle", "layer_gradient_angle", *quantities[:2]]
    assert list(drawn([fa, write_run(tmp_path / "ss", losses(1.0), "ss")])) == names


def test_a_metric_that_some_runs_lack_is_drawn_of_the_others(tmp_path, drawn, caplog):
    bp = write_run(tmp_path / "bp", detection(50.0), "bp")
    fa = write_run(tmp_path / "fa", losses(1.0, 2.0), "fa")
    cls = write_run(tmp_path / "cls", classification(50.0), "bp", CLASSIFICATION)
    assert list(drawn([bp, fa, cls])) == ["losses", "error", "detection"]
    assert f"No bbox/AP in {cls}, {fa}" in caplog.text
    for metric in ("AP", "bbox/AP"):
        assert list(drawn([bp, fa, cls], [metric])) == ["losses", "bbox_AP"]
    with pytest.raises(ValueError, match="metric nonsense; they have bbox/AP, classification/"):
        drawn([bp, fa, cls], ["bbox/AP", "nonsense"])


def test_a_run_that_ended_early_is_drawn_and_named(tmp_path, drawn, caplog):
    write_run(tmp_path / "1", losses(1.0, 2.0, 3.0), SEED=1)
    write_run(tmp_path / "2", losses(1.0), SEED=2)
    assert list(drawn([tmp_path / "1", tmp_path / "2"])) == ["losses"]
    assert f"{tmp_path}/2 ended" in caplog.text


# The tool ----------------------------------------------------------------------------------------


def test_the_tool_draws_what_can_be_drawn_and_says_the_rest(tmp_path, capsys, caplog):
    main = runpy.run_path(str(TOOL))["main"]
    write_run(tmp_path / "good", detection(50.0))
    write_run(tmp_path / "longer", detection(50.0), "ss", SOLVER__MAX_ITER=800)
    figures = tmp_path / "new" / "figures"
    words = [f"{tmp_path}/{name}" for name in ("missing", "good", "longer")]
    main([*words, "--output", str(figures), "--format", "png", "pdf", "svg"])
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        for name in ("losses", "detection"):
            assert (figures / f"{name}.{kind}").read_bytes().startswith(start)
    assert "detection.svg" in capsys.readouterr().out
    assert "missing is no output folder" in caplog.text and "SOLVER.MAX_ITER differs" in caplog.text
    text = (figures / "detection.svg").read_text()
    assert all(f">{word}</text>" in text for word in ("BP", "SS", "box AP, %", "iteration"))
    with pytest.raises(SystemExit, match="error: no run has the metric AP51; they have bbox/AP"):
        main([f"{tmp_path}/good", "--metric", "AP51", "--output", f"{tmp_path}/nowhere"])
    write_rows(tmp_path / "none", [{"iteration": 3, "lr": 0.1}])
    for name in ("missing", "none"):
        with pytest.raises(SystemExit, match="Nothing could be drawn"):
            main([f"{tmp_path}/{name}", "--output", f"{tmp_path}/nowhere"])
    assert not (tmp_path / "nowhere").exists()
