"""Figures of what training runs logged: losses, errors, AP and alignment, one line per rule."""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator, NullFormatter

from .metrics import ERRORS, SCORES, label_of, losses_of, matching
from .runs import Run, RunGroup, group_runs
from .styles import COLOURS, DASHES, MARKERS, RC, style_of

__all__ = [
    "FORMATS",
    "depth_order",
    "draw_figures",
    "mean_curve",
    "plot_curves",
    "plot_layers",
    "plot_training",
    "save_figure",
]

logger = logging.getLogger(__name__)

FORMATS = ("png", "pdf", "svg")
DEFAULT_FORMATS = ("png", "pdf")

_WIDTH = 7.0  # inches
_GREY = "#888888"

# What is measured in each layer, its axis' label, and the value of interest.
_BY_LAYER = {
    "weight_angle": ("angle between W and B, °", 90),
    "gradient_angle": ("gradient angle to BP, °", 90),
    "norm_ratio": ("norm of B / norm of W", 1),
    "sign_agreement": ("share of equal signs in W and B", 0.5),
}


class Curve(NamedTuple):
    """A metric of a group of runs over time."""

    x: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    """The sample standard deviation; nan where there is one run only."""


def mean_curve(group: RunGroup, key: str, epochs: bool = False) -> Curve:
    """
    The mean over the runs of a group.

    Args:
        group: of :func:`~ss_detectron.experiments.runs.group_runs`.
        key: of the metric.
        epochs: x is in epochs, not in iterations.

    Returns:
        arrays (N,) over all iterations that one of the runs logged. A run that ended early is not
        in the means after its end.
    """
    values: dict[float, list[float]] = {}
    for run in group.runs:
        scale = run.epochs_per_iteration if epochs else 1.0
        for iteration, value in zip(*run.series(key), strict=True):
            values.setdefault(iteration * scale, []).append(value)
    x = sorted(values)
    return Curve(
        np.array(x),
        np.array([np.mean(values[i]) for i in x]),
        np.array([np.std(values[i], ddof=1) if len(values[i]) > 1 else np.nan for i in x]),
    )


def plot_curves(groups: Sequence[RunGroup], keys: Sequence[str], *, epochs: bool = False) -> Figure:
    """
    One panel per metric, one line per group: the mean of its runs, in a band of one standard
    deviation where there are several.

    Args:
        groups: of :func:`~ss_detectron.experiments.runs.group_runs`.
        keys: of the metrics.
        epochs: against epochs, which all runs must know, not iterations.
    """
    with matplotlib.rc_context(RC):
        columns = 2 if len(keys) == 1 else 4  # of the legend
        legend_rows = math.ceil(len(groups) / columns)
        figure, panels = _panels(len(keys), margin=0.2 + 0.16 * legend_rows)
        for panel, key in zip(panels, keys, strict=True):
            _draw_curves(panel, groups, key, epochs)
            panel.set(xlabel="epoch" if epochs else "iteration", ylabel=label_of(key))
        _letter(panels)
        figure.align_ylabels(panels)
        handles = {}
        for panel in panels:
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns)
    return figure


def plot_layers(groups: Sequence[RunGroup], quantity: str) -> Figure:
    """
    One panel per group, one line per layer, coloured by its depth: the mean of the group's runs.

    Args:
        groups: of :func:`~ss_detectron.experiments.runs.group_runs`.
        quantity: weight_angle, gradient_angle, norm_ratio or sign_agreement.
    """
    prefix = f"alignment/{quantity}/"
    layers = depth_order(key.removeprefix(prefix) for key in _keys(groups) if prefix in key)
    label, reference = _BY_LAYER[quantity]
    with matplotlib.rc_context(RC):
        figure, panels = _panels(len(groups), sharey=True)
        colours = matplotlib.colormaps["viridis"].resampled(max(len(layers), 2))
        names = [group.name for group in groups]
        for panel, group in zip(panels, groups, strict=True):
            panel.axhline(reference, color=_GREY, linestyle=(0, (2, 2)), linewidth=0.8)
            for depth, layer in enumerate(layers):
                curve = mean_curve(group, prefix + layer)
                if len(curve.x):
                    marker = "." if len(curve.x) == 1 else ""
                    look = {"color": colours(depth), "linewidth": 0.8, "marker": marker}
                    panel.plot(curve.x, curve.mean, label=layer, **look)
            panel.set(title=_title(group, names), xlabel="iteration")
            _from_zero(panel)
            if panel.get_subplotspec().is_first_col():
                panel.set_ylabel(label)
        shared = panels[0]
        if quantity == "norm_ratio":
            low, high = shared.get_ylim()
            shared.set_ylim(min(low, 0.4), max(high, 2.5))
            _logarithmic(shared)
        elif quantity == "sign_agreement":
            shared.set_ylim(-0.02, 1.02)
        else:
            _in_degrees(shared)
        _depth_bar(figure, panels, layers, colours)
    return figure


def depth_order(layers: Iterable[str]) -> list[str]:
    """
    Layers from a network's input to its output, as far as Detectron2's names say it: a metrics.json
    has them in alphabetical order.
    """
    first = {"backbone": 0, "bottom_up": 0, "stem": 0}
    last = {"cls_score": 2, "bbox_pred": 2, "linear": 2, "predictor": 2}

    def key(layer: str) -> list[tuple]:
        return [
            ((first | last).get(part, 1), [_natural(p) for p in re.findall(r"\d+|\D+", part)])
            for part in layer.split(".")
        ]

    return sorted(set(layers), key=key)


def _natural(piece: str) -> tuple[int, int, str]:
    return (0, int(piece), "") if piece.isdigit() else (1, 0, piece)


def draw_figures(
    runs: Sequence[Run],
    folder: str | Path,
    *,
    metrics: Sequence[str] = (),
    formats: Sequence[str] = DEFAULT_FORMATS,
) -> list[Path]:
    """
    Draws what the runs have of these, and says what is missing:

        losses            the total loss, its parts and the training error
        error             classification: top-1 and top-5 error (Xiao et al. 2019, figure 1)
        detection         detection: AP and the losses
        <metric>          each of ``metrics``, in the place of error and detection
        gradient_angle    the angle between the rule's gradients and backpropagation's
        weight_angle, layer_gradient_angle, norm_ratio, sign_agreement
                          alignment layer by layer

    Classification is drawn against epochs where all runs know them, all else against iterations.

    Args:
        runs: of :func:`~ss_detectron.experiments.runs.read_runs`.
        folder: to write into; it is made.
        metrics: keys of metrics.json.
        formats: file types.

    Returns:
        the files.
    """
    if not runs:
        return []
    groups = group_runs(runs)
    files: list[Path] = []

    def draw(name: str, figure: Figure) -> None:
        files.extend(save_figure(figure, Path(folder) / name, formats))

    def curves(name: str, keys: Sequence[str]) -> None:
        with_it = _having(groups, keys)
        draw(name, plot_curves(with_it, keys, epochs=_by_epochs(name, with_it)))

    _warn_of_short_runs(groups)
    keys = _keys(groups)
    losses = losses_of(keys)
    if losses:
        curves("losses", losses)
    else:
        logger.warning("No run has a loss: no loss curves")
    if metrics:
        for key in metrics:
            if key in keys:
                curves(re.sub(r"\W+", "_", key), [key])
            else:
                _say_missing(key, groups)
    else:
        errors, scores = matching(keys, ERRORS), matching(keys, SCORES)
        if errors:
            curves("error", errors)
        if scores:
            detection = _having(groups, scores)
            parts = [key for key in losses if key in _keys(detection)]
            draw("detection", plot_curves(detection, [*scores, *parts]))
        if not errors + scores:
            logger.warning("No run was evaluated: no curves of AP or error")
    if "alignment/gradient_angle" in keys:
        curves("gradient_angle", ["alignment/gradient_angle"])
    for quantity in _BY_LAYER:
        with_it = [
            group
            for group in groups
            if any(key.startswith(f"alignment/{quantity}/") for key in _keys([group]))
        ]
        if with_it:
            name = f"layer_{quantity}" if quantity == "gradient_angle" else quantity
            draw(name, plot_layers(with_it, quantity))
    if not any(key.startswith("alignment/") for key in keys):
        logger.info("No run measured its alignment (TEST.ALIGNMENT_PERIOD): no curves of it")
    return files


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = DEFAULT_FORMATS) -> list[Path]:
    """Writes ``<path>.<format>`` for each format, whose folder is made; returns the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{kind}") for kind in formats]
    with matplotlib.rc_context(RC):
        for file in files:
            figure.savefig(file, dpi=200)
            figure.set_layout_engine("none")  # once found, a layout does for every format
    return files


def plot_training(metrics: Sequence[dict[str, float]], title: str = "") -> Figure:
    """
    One run: the losses against the iteration and, where there was an evaluation, box AP beside
    them.

    Args:
        metrics: rows of :func:`~ss_detectron.experiments.runs.read_metrics`.
        title: above the figure.
    """
    with matplotlib.rc_context(RC):
        figure = _figure(_WIDTH, 2.8)
        losses, scores = figure.subplots(1, 2, sharex=True)
        every = sorted({key for row in metrics for key in row})
        drawn = [
            (losses, [key for key in losses_of(every) if key != "train_top1_error"], ""),
            (scores, [key for key in every if key.endswith(("bbox/AP", "bbox/AP50"))], "o"),
        ]
        for panel, keys, marker in drawn:
            for i, key in enumerate(keys):
                points = [(row["iteration"], row[key]) for row in metrics if key in row]
                colour = COLOURS[i % len(COLOURS)]
                panel.plot(*zip(*points, strict=True), marker=marker, color=colour, label=key)
            if keys:
                panel.legend()
        losses.set(xlabel="iteration", ylabel="training loss")
        _logarithmic(losses)
        scores.set(xlabel="iteration", ylabel="AP, %", ylim=(0, 100))
        if not drawn[1][1]:
            scores.text(0.5, 0.5, "not evaluated", ha="center", transform=scores.transAxes)
        figure.suptitle(title)
    return figure


# Parts of a figure -------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(
    count: int, width: float = _WIDTH, margin: float = 0.3, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Equal panels, as near to a square as three columns allow; sizes in inches."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = math.ceil(count / columns)
    figure = _figure(width if count > 1 else min(width, 4.5), rows * 2.1 + margin)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def _draw_curves(panel: Axes, groups: Sequence[RunGroup], key: str, epochs: bool) -> None:
    names = [group.name for group in groups]
    is_loss = key.rpartition("/")[2].startswith(("loss", "total_loss"))
    for place, group in enumerate(groups):
        curve = mean_curve(group, key, epochs)
        if not len(curve.x):
            continue
        style = style_of(group.name, names)
        # Of one rule, further groups keep the colour.
        dashes, marker = style.dashes, style.marker
        if group.variant:
            dashes = DASHES[group.variant % len(DASHES)]
            marker = MARKERS[group.variant % len(MARKERS)]
        # Few markers on a long line, and not those of all lines in one place.
        every = max(1, len(curve.x) // 8)
        start = place * every // max(len(groups), 1)
        panel.plot(
            curve.x,
            curve.mean,
            color=style.colour,
            linestyle=dashes,
            marker=marker,
            markevery=(start, every),
            label=_title(group, names),
        )
        low, high = curve.mean - curve.deviation, curve.mean + curve.deviation
        if is_loss:  # on a logarithmic scale, a band ends above zero
            low = np.where(low > 0, low, curve.mean / 10)
        if np.isfinite(curve.deviation).any():
            panel.fill_between(curve.x, low, high, color=style.colour, alpha=0.2, linewidth=0)
    if is_loss:
        _logarithmic(panel)
    elif key == "alignment/gradient_angle":
        panel.axhline(90, color=_GREY, linestyle=(0, (2, 2)), linewidth=0.8, zorder=0)
        _in_degrees(panel)
    else:
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    _from_zero(panel)


def _logarithmic(panel: Axes) -> None:
    """A logarithmic ordinate with plain numbers."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    locator = LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4)
    panel.yaxis.set_major_locator(locator)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _in_degrees(panel: Axes) -> None:
    panel.set_ylim(-3, max(99, panel.get_ylim()[1]))
    panel.yaxis.set_major_locator(MultipleLocator(30))


def _from_zero(panel: Axes) -> None:
    end = panel.get_xlim()[1]
    panel.set_xlim(-0.03 * end, end)
    panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _letter(panels: Sequence[Axes]) -> None:
    """a, b, c at the panels' corners."""
    if len(panels) > 1:
        for letter, panel in zip("abcdefghijklmnopqrstuvwxyz", panels, strict=False):
            panel.set_title(letter, loc="left", fontweight="bold", fontsize=9)


def _depth_bar(figure: Figure, panels: Sequence[Axes], layers: Sequence[str], colours) -> None:
    """The colours of the layers; a few of them are named."""
    count = len(layers)
    edges = np.arange(max(count, 2) + 1) - 0.5
    mappable = ScalarMappable(BoundaryNorm(edges, colours.N), colours)
    rows = panels[0].get_gridspec().nrows
    bar = figure.colorbar(mappable, ax=list(panels), pad=0.02, aspect=15 * rows)
    named = np.unique(np.linspace(0, count - 1, min(count, 7 * rows)).round().astype(int))
    bar.set_ticks(named, labels=[_short(layers[i]) for i in named], fontsize=6)
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()
    bar.set_label("layer, from input to output")


def _short(layer: str) -> str:
    return layer.removeprefix("backbone.").removeprefix("bottom_up.")


def _title(group: RunGroup, names: Sequence[str]) -> str:
    parts = [style_of(group.name, names).label, group.detail]
    if len(group.runs) > 1:
        parts.append(f"{len(group.runs)} runs")
    return ", ".join(filter(None, parts))


# What is there to draw ---------------------------------------------------------------------------


def _keys(groups: Sequence[RunGroup]) -> list[str]:
    return sorted({key for group in groups for run in group.runs for key in run.metrics})


def _having(groups: Sequence[RunGroup], keys: Sequence[str]) -> list[RunGroup]:
    """The groups with those of their runs that have one of the metrics; the others are named."""
    found = []
    for group in groups:
        runs = [run for run in group.runs if any(key in run.metrics for key in keys)]
        for run in group.runs:
            if run not in runs:
                logger.warning("%s has no %s; left out", run.folder, " and no ".join(keys))
        if runs:
            found.append(RunGroup(group.name, group.detail, group.variant, runs))
    return found


def _say_missing(key: str, groups: Sequence[RunGroup]) -> None:
    known = [k for k in _keys(groups) if not k.startswith("alignment/") or k.count("/") == 1]
    logger.error("No run has the metric %s; they have %s", key, ", ".join(known))


def _by_epochs(name: str, groups: Sequence[RunGroup]) -> bool:
    runs = [run for group in groups for run in group.runs]
    if not all(any(key.endswith("top1_error") for key in run.metrics) for run in runs):
        return False
    unknown = [run for run in runs if run.epochs_per_iteration is None]
    if unknown:
        logger.warning(
            "%s is drawn against iterations, for what they are in epochs is not known of %s: give "
            "the number of training images",
            name,
            ", ".join(str(run.folder) for run in unknown),
        )
    return not unknown


def _warn_of_short_runs(groups: Sequence[RunGroup]) -> None:
    for group in groups:
        ends = [run.rows[-1]["iteration"] for run in group.runs]
        for run, end in zip(group.runs, ends, strict=True):
            if end + 1 < max(ends):
                logger.warning(
                    "%s ends at iteration %d, others of its rule go on to %d: from there, the mean "
                    "is over fewer runs",
                    run.folder,
                    end,
                    max(ends),
                )
