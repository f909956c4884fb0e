"""Figures of what training runs logged: losses, errors, AP and alignment, one line per rule."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator, NullFormatter

from .runs import ERRORS, SCORES, Run, RunGroup, group_runs, matching, they_have
from .styles import DASHES, MARKERS, RC, label_of, style_of

logger = logging.getLogger(__name__)

FORMATS = ("png", "pdf", "svg")
DEFAULT_FORMATS = ("png", "pdf")

_WIDTH = 7.0  # inches
_REFERENCE = {"color": "#888888", "linestyle": (0, (2, 2)), "linewidth": 0.8, "zorder": 0}

# What is measured in each layer: its axis' label, the value of interest, the range that is shown.
_BY_LAYER = {
    "weight_angle": ("angle between W and B, °", 90, (-3, 99)),
    "gradient_angle": ("gradient angle to BP, °", 90, (-3, 99)),
    "norm_ratio": ("norm of B / norm of W", 1, (0.4, 2.5)),
    "sign_agreement": ("share of equal signs in W and B", 0.5, (-0.02, 1.02)),
}


def mean_curve(
    group: RunGroup, key: str, epochs: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Averages a metric over the runs of a group. A run that ended early is not in the means after its
    end.

    Returns:
        the iterations, or epochs, that any of the runs logged; the means; the sample standard
        deviations, nan where there is one run only; each (N,).
    """
    values: dict[float, list[float]] = defaultdict(list)
    for run in group.runs:
        scale = run.epochs_per_iteration if epochs else 1.0
        for iteration, value in zip(*run.series(key), strict=True):
            values[iteration * scale].append(value)
    x = sorted(values)
    deviations = [np.std(values[i], ddof=1) if len(values[i]) > 1 else np.nan for i in x]
    return np.array(x), np.array([np.mean(values[i]) for i in x]), np.array(deviations)


def plot_curves(groups: Sequence[RunGroup], keys: Sequence[str], *, epochs: bool = False) -> Figure:
    """
    Draws one panel per metric, one line per group: the mean of its runs, in a band of one standard
    deviation where there are several; against iterations, or epochs, which all runs must know.
    """
    with matplotlib.rc_context(RC):
        columns = 2 + (len(groups) > 6) if len(keys) == 1 else 4  # of the legend
        legend_rows = math.ceil(len(groups) / columns)
        figure, panels = _panels(len(keys), margin=0.2 + 0.16 * legend_rows)
        for panel, key in zip(panels, keys, strict=True):
            _draw_curves(panel, groups, key, epochs)
            panel.set(xlabel="epoch" if epochs else "iteration", ylabel=label_of(key))
        figure.align_ylabels(panels)
        named = panels[0].get_legend_handles_labels()
        figure.legend(*named, loc="outside upper center", ncols=columns)
    return figure


def plot_layers(groups: Sequence[RunGroup], quantity: str) -> Figure:
    """
    Draws weight_angle, gradient_angle, norm_ratio or sign_agreement: one panel per group, one line
    per layer, coloured by its depth, the mean of the group's runs.
    """
    prefix = f"alignment/{quantity}/"
    layers = depth_order(key.removeprefix(prefix) for key in _keys(groups) if prefix in key)
    label, reference, (low, high) = _BY_LAYER[quantity]
    with matplotlib.rc_context(RC):
        figure, panels = _panels(len(groups), sharey=True)
        colours = matplotlib.colormaps["viridis"].resampled(max(len(layers), 2))
        for panel, group in zip(panels, groups, strict=True):
            panel.axhline(reference, **_REFERENCE)
            for depth, layer in enumerate(layers):
                x, mean, _ = mean_curve(group, prefix + layer)
                look = {"color": colours(depth), "linewidth": 0.8}
                if len(x):
                    panel.plot(x, mean, label=layer, marker="." if len(x) == 1 else "", **look)
            panel.set(title=_title(group, groups), xlabel="iteration")
            _from_zero(panel)
            if panel.get_subplotspec().is_first_col():
                panel.set_ylabel(label)
        shared = panels[0]
        shared.set_ylim(min(low, shared.get_ylim()[0]), max(high, shared.get_ylim()[1]))
        if quantity == "norm_ratio":
            _logarithmic(shared)
        elif reference == 90:
            shared.yaxis.set_major_locator(MultipleLocator(30))
        _depth_bar(figure, panels, layers, colours)
    return figure


class Cost(NamedTuple):
    """What a rule or learner reached, and by what means. nan is what it does not have."""

    name: str
    label: str
    value: float
    deviation: float
    multiply_adds: float
    """Of a training step, as a multiple of backpropagation's."""
    weight_angle: float
    gradient_angle: float


def plot_costs(points: Sequence[Cost], metric: str) -> Figure:
    """
    Draws a metric against the multiply-adds of a training step, the angle between W and B, and the
    angle between gradients: one point per rule or learner, with its standard deviation.
    """
    axes = {
        "multiply_adds": "multiply-adds of a step / BP's",
        "weight_angle": "angle between W and B, °",
        "gradient_angle": label_of("alignment/gradient_angle"),
    }
    with matplotlib.rc_context(RC):
        figure, panels = _panels(len(axes), 0.2 + 0.16 * math.ceil(len(points) / 5), sharey=True)
        for panel, (field, label) in zip(panels, axes.items(), strict=True):
            for place, point in enumerate(points):
                look = style_of(point.name, [other.name for other in points])
                again = point.name in [other.name for other in points[:place]]
                panel.errorbar(
                    getattr(point, field),
                    point.value,
                    point.deviation,
                    color=look.colour,
                    marker=look.marker,
                    markerfacecolor="none" if again else look.colour,
                    linestyle="none",
                    label=point.label,
                )
            panel.set(xlabel=label, xlim=(0, 1.1 * max(point.multiply_adds for point in points)))
            if field != "multiply_adds":
                panel.axvline(90, **_REFERENCE)
                panel.set_xlim(-3, 99)
                panel.xaxis.set_major_locator(MultipleLocator(30))
        panels[0].set_ylabel(label_of(metric))
        values = [point.value for point in points]
        if matching([metric], ERRORS) and max(values) > 3 * min(values):
            _logarithmic(panels[0])
        named = panels[0].get_legend_handles_labels()
        figure.legend(*named, loc="outside upper center", ncols=5)
    return figure


def depth_order(layers: Iterable[str]) -> list[str]:
    """
    Sorts layers from a network's input to its output, as far as Detectron2's names say it: a
    metrics.json has them in alphabetical order.
    """
    # Before and after the other parts on their level.
    places = dict.fromkeys(("backbone", "bottom_up", "stem"), 0)
    places |= dict.fromkeys(("cls_score", "bbox_pred", "linear", "predictor"), 2)

    def key(layer: str) -> list[tuple]:
        parts = layer.split(".")
        return [
            (places.get(p, 1), re.sub(r"\d+", lambda number: number[0].zfill(9), p)) for p in parts
        ]

    return sorted(set(layers), key=key)


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
        folder: to write into; it is made.
        metrics: keys of metrics.json, or what comes last in them, as AP50 of bbox/AP50.

    Returns:
        the files.

    Raises:
        ValueError: a metric that no run has; names those there are.
    """
    groups = group_runs(runs)
    for group in groups:
        ends = {run.folder: run.rows[-1]["iteration"] for run in group.runs}
        if short := [str(folder) for folder, end in ends.items() if end + 1 < max(ends.values())]:
            logger.warning("From where %s ended, means are over fewer runs", ", ".join(short))
    keys = _keys(groups)
    losses = losses_of(keys)
    curves = {"error": matching(keys, ERRORS), "detection": matching(keys, SCORES)}
    if metrics:
        if unknown := [metric for metric in metrics if not matching(keys, [metric])]:
            raise ValueError(f"no run has the metric {', '.join(unknown)}; {they_have(keys)}")
        curves = {re.sub(r"\W+", "_", key): [key] for key in matching(keys, metrics)}
    curves = {"losses": losses, **curves}
    curves["gradient_angle"] = matching(keys, ["alignment/gradient_angle"])
    figures = {}
    for name, needed in curves.items():
        if having := _having(groups, needed):
            parts = [k for k in losses if k in _keys(having)] if name == "detection" else []
            figures[name] = plot_curves(having, [*needed, *parts], epochs=_by_epochs(having))
    for quantity in _BY_LAYER:
        prefix = f"alignment/{quantity}/"
        if having := [g for g in groups if any(prefix in key for key in _keys([g]))]:
            name = f"layer_{quantity}" if quantity == "gradient_angle" else quantity
            figures[name] = plot_layers(having, quantity)
    return [
        file
        for name, figure in figures.items()
        for file in _save(figure, Path(folder) / name, formats)
    ]


def losses_of(keys: Sequence[str]) -> list[str]:
    """Selects the total loss, its parts where there are several, and the training error."""
    parts = [key for key in keys if key.startswith("loss")]
    if "total_loss" in keys and len(parts) == 1:  # which is the total
        parts = []
    return [key for key in ("total_loss", *parts, "train_top1_error") if key in keys]


def _save(figure: Figure, path: Path, formats: Sequence[str]) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{kind}") for kind in formats]
    with matplotlib.rc_context(RC):
        for file in files:
            figure.savefig(file, dpi=200)
            figure.set_layout_engine("none")  # once found, a layout does for every format
    return files


# Parts of a figure -------------------------------------------------------------------------------


def _panels(count: int, margin: float = 0.3, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Equal panels, as near to a square as three columns allow; ``margin`` in inches."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = math.ceil(count / columns)
    size = (_WIDTH if count > 1 else 4.5, rows * 2.1 + margin)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def _draw_curves(panel: Axes, groups: Sequence[RunGroup], key: str, epochs: bool) -> None:
    is_loss = key.rpartition("/")[2].startswith(("loss", "total_loss"))
    crowded = {"markersize": 3, "linewidth": 0.9} if len(groups) > 6 else {}
    curves = [mean_curve(group, key, epochs) for group in groups]
    means = np.concatenate([mean for _, mean, _ in curves])
    # Errors that end near each other, and begin far from there, show their order on such a scale.
    logarithmic = is_loss or bool(matching([key], ERRORS) and 0 < 10 * means.min() < means.max())
    for place, (group, (x, mean, deviation)) in enumerate(zip(groups, curves, strict=True)):
        style = style_of(group.name, [group.name for group in groups])
        if group.variant:  # of one rule, further groups keep the colour
            dashes = DASHES[group.variant % len(DASHES)]
            style = style._replace(dashes=dashes, marker=MARKERS[group.variant % len(MARKERS)])
        # Few markers on a long line, and not those of all lines in one place.
        every = max(1, len(x) // (5 if crowded else 8))
        panel.plot(
            x,
            mean,
            color=style.colour,
            linestyle=style.dashes,
            marker=style.marker,
            markevery=(place * every // len(groups), every),
            label=_title(group, groups),
            **crowded,
        )
        low, high = mean - deviation, mean + deviation
        if logarithmic:  # on a logarithmic scale, a band ends above zero
            low = np.where(low > 0, low, mean / 10)
        if np.isfinite(deviation).any():
            panel.fill_between(x, low, high, color=style.colour, alpha=0.2, linewidth=0)
    if logarithmic:
        _logarithmic(panel)
    elif key == "alignment/gradient_angle":
        panel.axhline(90, **_REFERENCE)
        panel.set_ylim(-3, max(99, panel.get_ylim()[1]))
        panel.yaxis.set_major_locator(MultipleLocator(30))
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


def _from_zero(panel: Axes) -> None:
    end = panel.get_xlim()[1]
    panel.set_xlim(-0.03 * end, end)
    panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _depth_bar(figure: Figure, panels: Sequence[Axes], layers: Sequence[str], colours) -> None:
    """The colours of the layers; a few of them are named."""
    count = len(layers)
    edges = np.arange(max(count, 2) + 1) - 0.5
    mappable = ScalarMappable(BoundaryNorm(edges, colours.N), colours)
    rows = panels[0].get_gridspec().nrows
    bar = figure.colorbar(mappable, ax=list(panels), pad=0.02, aspect=15 * rows)
    named = np.unique(np.linspace(0, count - 1, min(count, 7 * rows)).round().astype(int))
    names = [re.sub(r"^(backbone\.)?(bottom_up\.)?", "", layers[i]) for i in named]
    bar.set_ticks(named, labels=names, fontsize=6)
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()
    bar.set_label("layer, from input to output")


def _title(group: RunGroup, groups: Sequence[RunGroup]) -> str:
    parts = [style_of(group.name, [other.name for other in groups]).label, group.detail]
    if len(group.runs) > 1:
        parts.append(f"{len(group.runs)} runs")
    return ", ".join(filter(None, parts))


# What is there to draw ---------------------------------------------------------------------------


def _keys(groups: Sequence[RunGroup]) -> list[str]:
    return sorted({key for group in groups for run in group.runs for key in run.metrics})


def _having(groups: Sequence[RunGroup], keys: Sequence[str]) -> list[RunGroup]:
    """The groups with those of their runs that have one of the metrics; the others are named."""
    lacking = [r for group in groups for r in group.runs if not set(keys).intersection(r.metrics)]
    if keys and lacking:
        folders = ", ".join(str(run.folder) for run in lacking)
        logger.warning("No %s in %s", " and no ".join(keys), folders)
    having = (replace(g, runs=[run for run in g.runs if run not in lacking]) for g in groups)
    return [group for group in having if group.runs]


def _by_epochs(groups: Sequence[RunGroup]) -> bool:
    """Whether all are runs of classification, and know how long an epoch is."""
    runs = [run for group in groups for run in group.runs]
    classify = all(any(key.endswith("top1_error") for key in run.metrics) for run in runs)
    return classify and all(run.epochs_per_iteration for run in runs)
