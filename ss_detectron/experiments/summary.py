"""The table of a comparison: each rule's result over its seeds, beside backpropagation's."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from .metrics import label_of
from .runs import Run, group_runs
from .styles import style_of

__all__ = ["RuleSummary", "summarise", "table"]

logger = logging.getLogger(__name__)

CONTROL = "backpropagation"


@dataclass
class RuleSummary:
    """One row of the table. What cannot be said is None."""

    rule: str
    seeds: list[int]
    values: list[float]
    """The metric at the end of each run."""
    mean: float
    standard_deviation: float | None
    """Of the sample (n - 1); None for one seed."""
    ratio_to_bp: float | None
    """Of the means."""
    difference_to_bp: float | None
    """Of the means, in the metric's unit."""
    seconds_per_step: float | None
    """The median over the rows of all runs."""
    time_ratio_to_bp: float | None
    gradient_angle: float | None
    """To backpropagation's gradient, in degrees, where last measured; mean over the runs."""


def summarise(runs: Sequence[Run], metric: str) -> list[RuleSummary]:
    """
    Compares rules by a metric at the end of their runs.

    Args:
        runs: finished ones, that differ in rule and seed; those without the metric are reported
            and left out.
        metric: a key of metrics.json.
    """
    with_it = [run for run in runs if metric in run.metrics]
    for run in runs:
        if run not in with_it:
            logger.warning("%s has no %s and is not in the table", run.folder, metric)
    by_rule: dict[str, list[Run]] = {}
    for group in group_runs(with_it):
        by_rule.setdefault(group.name, []).extend(group.runs)

    rows = []
    for rule, members in by_rule.items():
        values = [run.last(metric) for run in members]
        for run, value in zip(members, values, strict=True):
            if math.isnan(value):
                logger.warning(
                    "%s ended with %s nan (Detectron2's AP where nothing was detected), and so do "
                    "the means over it",
                    run.folder,
                    metric,
                )
        rows.append(
            RuleSummary(
                rule=rule,
                seeds=[run.config.get("SEED", -1) for run in members],
                values=values,
                mean=float(np.mean(values)),
                standard_deviation=float(np.std(values, ddof=1)) if len(values) > 1 else None,
                ratio_to_bp=None,
                difference_to_bp=None,
                seconds_per_step=_median([run.series("time")[1] for run in members]),
                time_ratio_to_bp=None,
                gradient_angle=_mean([run.last("alignment/gradient_angle") for run in members]),
            )
        )
    control = next((row for row in rows if row.rule == CONTROL), None)
    if control is not None:
        for row in rows:
            row.ratio_to_bp = row.mean / control.mean if control.mean else None
            row.difference_to_bp = row.mean - control.mean
            if row.seconds_per_step and control.seconds_per_step:
                row.time_ratio_to_bp = row.seconds_per_step / control.seconds_per_step
    return rows


def table(rows: Sequence[RuleSummary], metric: str) -> str:
    """The rows of :func:`summarise` in Markdown. Columns that would be empty are left out."""
    is_error = metric.endswith("error")
    columns = {
        "rule": [style_of(row.rule).label for row in rows],
        "seeds": [str(len(row.seeds)) for row in rows],
        label_of(metric): [_with_deviation(row) for row in rows],
        "ratio to BP": [_number(row.ratio_to_bp, 2) for row in rows],
        "difference to BP, points": [
            _number(row.difference_to_bp, 1, sign=True) if is_error else "" for row in rows
        ],
        "time per step, s": [_significant(row.seconds_per_step) for row in rows],
        "time ratio to BP": [_number(row.time_ratio_to_bp, 2) for row in rows],
        "gradient angle at the end, °": [_number(row.gradient_angle, 1) for row in rows],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    align = ["left", *["right"] * (len(filled) - 1)]
    return tabulate(filled, headers="keys", tablefmt="pipe", disable_numparse=True, colalign=align)


def _with_deviation(row: RuleSummary) -> str:
    mean = _number(row.mean, 1)
    if row.standard_deviation is None:
        return mean
    return f"{mean} ± {_number(row.standard_deviation, 1)}"


def _number(value: float | None, digits: int, sign: bool = False) -> str:
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _significant(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _median(series: Sequence[np.ndarray]) -> float | None:
    values = np.concatenate(series)
    return float(np.median(values)) if len(values) else None


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else None
