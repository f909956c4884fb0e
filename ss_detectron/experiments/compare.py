"""A whole comparison: runs what is missing and reports on what there is."""

import itertools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ss_detectron.layers.feedback import Backpropagation

from .launch import read_launches, run_all
from .plan import PlannedRun
from .plots import draw_figures
from .runs import (
    ERRORS,
    KNOWN_METRIC,
    SCORES,
    Run,
    group_runs,
    matching,
    read_runs,
    they_have,
    warn_of_differences,
)
from .styles import label_of, style_of

logger = logging.getLogger(__name__)


def compare(
    runs: Sequence[PlannedRun],
    output: Path,
    train_net: Path,
    *,
    jobs: int = 1,
    gpus_per_run: int = 1,
    metric: str | None = None,
    command: str = "",
) -> tuple[str, bool]:
    """
    Runs what is not finished, then reports on what is. Where a folder was started with another
    config, this is said and nothing is run.

    Args:
        train_net, jobs, gpus_per_run: see :func:`~ss_detectron.experiments.launch.run_all`.
        output, metric, command: see :func:`write_report`.

    Returns:
        the report's table, and whether all runs are finished.
    """
    conflicts = {run: found for run in runs if (found := run.conflicts())}
    for run, found in conflicts.items():
        how = "; ".join(f"{key} {there!r}, not {here!r}" for key, (there, here) in found.items())
        logger.error("%s was started with another config: %s", run.folder, how)
    own = [run for run in runs if run not in conflicts]
    to_do = [run for run in own if not run.is_finished()]
    logger.info("%d of %d runs are finished already", len(own) - len(to_do), len(runs))
    if conflicts:
        logger.error("No run is started: give the options of before, or another output folder")
    else:
        if to_do and metric and not KNOWN_METRIC.search(metric):
            logger.warning(
                "No evaluation gives %s, as far as is known: without it, there is no table in the "
                "end. They give AP, AP50, AP75, APs, APm, APl, top1_error, top5_error and AP-CLASS",
                metric,
            )
        to_do = run_all(to_do, train_net, jobs=jobs, gpus_per_run=gpus_per_run)
    text = write_report(own, output, metric=metric, command=command)
    return text, not conflicts and not to_do


def write_report(
    runs: Sequence[PlannedRun], output: Path, *, metric: str | None = None, command: str = ""
) -> str:
    """
    Writes the figures of all runs that logged something, and comparison.md and comparison.json
    about those that are finished.

    Args:
        output: the folder to write into.
        metric: what to compare by, a key of metrics.json or what comes last in it; by default
            top-1 error or AP of the first test set.
        command: that made the comparison.

    Returns:
        the table in Markdown; empty where no run is finished.
    """
    started = {run.folder: run for run in runs if (run.folder / "metrics.json").is_file()}
    found = [replace(run, label=started[run.folder].label) for run in read_runs(started)]
    warn_of_differences(found)
    pictures = [file for file in draw_figures(found, output) if file.suffix == ".png"]

    finished = {run.folder: run for run in runs if run.is_finished()}
    results = [run for run in found if run.folder in finished]
    keys = sorted({key for run in results for key in run.metrics})
    first = runs[0].config["DATASETS.TEST"][0] + "/"
    fitting = matching(keys, [metric] if metric else [ERRORS[0], *SCORES])
    rows = []
    if fitting:
        metric = min(fitting, key=lambda key: not key.startswith(first))
        rows = summarise(results, metric)
    if not rows:
        which = f" with {metric}; {they_have(keys)}" if metric and keys else ""
        logger.error("No run is finished%s: there is no table", which)
        return ""

    launches = {folder: read_launches(folder) for folder in finished}
    started_as = {run.label: run for run in finished.values()}

    def launched(key: str) -> list[Any]:
        every = itertools.chain(*launches.values())
        return list(dict.fromkeys(launch[key] for launch in every if key in launch))

    facts = {
        "test sets": runs[0].config["DATASETS.TEST"],
        "iterations": sorted({run.rows[-1]["iteration"] for run in results}),
        "hardware": launched("hardware"),
        "runs at a time": launched("jobs"),
        "threads per run": launched("OMP_NUM_THREADS"),
        "not finished": [run.name for run in runs if run.folder not in finished],
    }
    content = {
        "metric": metric,
        "command": command,
        **facts,
        "rules": [
            asdict(row) | {"config": run.config_file, "overrides": " ".join(run.overrides)}
            for row in rows
            for run in [started_as[row.label]]
        ],
        "runs": [
            {"name": run.name, "label": run.label, "seed": run.seed, "folder": str(folder)}
            | {"launches": launches[folder]}
            for folder, run in finished.items()
        ],
    }
    # JSON has no nan.
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    (output / "comparison.json").write_text(json.dumps(content, indent=1) + "\n")
    text = table(rows, metric)
    configs = [
        (style_of(row.label).label, started_as[row.label].start, ", ".join(map(str, row.seeds)))
        for row in rows
    ]
    parts = [
        f"# Feedback rules compared by {label_of(metric)}",
        text,
        f"{metric} at the end of training, mean ± sample standard deviation over the seeds. "
        "Time per step: the median.",
        tabulate(configs, headers=("rule", "config", "seeds"), tablefmt="pipe"),
        "\n".join(f"* {k.capitalize()}: {', '.join(map(str, v))}" for k, v in facts.items() if v),
        f"```sh\n{command}\n```" if command else "",
        "\n".join(f"![{file.stem}]({file.name})" for file in pictures),
    ]
    (output / "comparison.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    return text


@dataclass
class Summary:
    """One row of the table. What cannot be said is None."""

    label: str
    seeds: list[int]
    values: list[float]
    """The metric at the end of each run."""
    mean: float
    standard_deviation: float | None
    """Of the sample (n - 1); None for one seed."""
    seconds_per_step: float | None
    """The median over the rows of all runs."""
    gradient_angle: float | None
    """To backpropagation's gradient, in degrees, where last measured; mean over the runs."""
    ratio_to_bp: float | None = None
    """Of the means."""
    difference_to_bp: float | None = None
    """Of the means, in the metric's unit."""
    time_ratio_to_bp: float | None = None


def summarise(runs: Sequence[Run], metric: str) -> list[Summary]:
    """
    Compares rules by a metric at the end of finished runs, which differ in rule and seed. Those
    without the metric are reported and left out.
    """
    by_label: dict[str, list[Run]] = {}
    for run in (run for group in group_runs(runs) for run in group.runs):
        if metric not in run.metrics:
            logger.warning("%s has no %s and is not in the table", run.folder, metric)
            continue
        if math.isnan(run.last(metric)):
            # Detectron2's AP where nothing was detected.
            logger.warning("%s ended with %s nan, and the mean is nan", run.folder, metric)
        by_label.setdefault(run.label or run.folder.name, []).append(run)

    rows = []
    for label, members in by_label.items():
        values = [run.last(metric) for run in members]
        times = np.concatenate([run.series("time")[1] for run in members])
        angles = np.array([run.last("alignment/gradient_angle") for run in members])
        angles = angles[~np.isnan(angles)]
        rows.append(
            Summary(
                label=label,
                seeds=[run.config.get("SEED", -1) for run in members],
                values=values,
                mean=float(np.mean(values)),
                standard_deviation=float(np.std(values, ddof=1)) if len(values) > 1 else None,
                seconds_per_step=float(np.median(times)) if len(times) else None,
                gradient_angle=float(angles.mean()) if len(angles) else None,
            )
        )
    for control in [row for row in rows if row.label == Backpropagation.name]:
        for row in rows:
            row.ratio_to_bp = row.mean / control.mean if control.mean else None
            row.difference_to_bp = row.mean - control.mean
            if row.seconds_per_step and control.seconds_per_step:
                row.time_ratio_to_bp = row.seconds_per_step / control.seconds_per_step
    return rows


def table(rows: Sequence[Summary], metric: str) -> str:
    """Writes the rows of :func:`summarise` in Markdown, without the columns that are empty."""

    def column(name: str, form: str) -> list[str]:
        values = [getattr(row, name) for row in rows]
        return ["" if value is None else form.format(value) for value in values]

    means, deviations = column("mean", "{:.1f}"), column("standard_deviation", " ± {:.1f}")
    columns = {
        "rule": [style_of(row.label).label for row in rows],
        "seeds": [str(len(row.seeds)) for row in rows],
        label_of(metric): [mean + dev for mean, dev in zip(means, deviations, strict=True)],
        "ratio to BP": column("ratio_to_bp", "{:.2f}"),
        "difference to BP, points": column("difference_to_bp", "{:+.1f}"),
        "time per step, s": column("seconds_per_step", "{:.3g}"),
        "time ratio to BP": column("time_ratio_to_bp", "{:.2f}"),
        "gradient angle at the end, °": column("gradient_angle", "{:.1f}"),
    }
    if not metric.endswith("error"):
        del columns["difference to BP, points"]
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    align = ["left", *["right"] * (len(filled) - 1)]
    return tabulate(filled, headers="keys", tablefmt="pipe", disable_numparse=True, colalign=align)
