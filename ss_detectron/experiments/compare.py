"""A whole comparison: runs what is missing and reports on what there is."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .launch import read_launches, run_all
from .metrics import label_of, main_metric
from .plan import PlannedRun
from .plots import draw_figures
from .runs import read_runs, warn_of_differences
from .styles import style_of
from .summary import RuleSummary, summarise, table

__all__ = ["compare", "write_report"]

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
        runs: of :func:`~ss_detectron.experiments.plan.plan_runs`.
        train_net, jobs, gpus_per_run: see :func:`~ss_detectron.experiments.launch.run_all`.
        output, metric, command: see :func:`write_report`.

    Returns:
        the report's table, and whether all runs are finished.
    """
    foreign = [run for run in runs if _has_another_config(run)]
    own = [run for run in runs if run not in foreign]
    to_do = [run for run in own if not run.is_finished()]
    logger.info("%d of %d runs are finished already", len(own) - len(to_do), len(runs))
    if foreign:
        logger.error("Because of the other config, no run is started")
    elif to_do:
        to_do = run_all(to_do, train_net, jobs=jobs, gpus_per_run=gpus_per_run)
    return write_report(own, output, metric=metric, command=command), not (foreign or to_do)


def _has_another_config(run: PlannedRun) -> bool:
    conflicts = run.conflicts()
    if conflicts:
        few = [f"{key} {there!r}, not {here!r}" for key, (there, here) in conflicts.items()]
        logger.error(
            "%s was started with another config: %s%s. Give the options that it was started with, "
            "choose another output folder, or remove it",
            run.folder,
            "; ".join(few[:5]),
            f"; and {len(few) - 5} more" * (len(few) > 5),
        )
    return bool(conflicts)


def write_report(
    runs: Sequence[PlannedRun], output: Path, *, metric: str | None = None, command: str = ""
) -> str:
    """
    Writes the figures of all runs that logged something, and comparison.md and comparison.json
    about those that are finished.

    Args:
        runs: of :func:`~ss_detectron.experiments.plan.plan_runs`.
        output: the folder to write into.
        metric: what to compare by, a key of metrics.json; by default top-1 error or AP of the
            first test set.
        command: that made the comparison.

    Returns:
        the table in Markdown; empty where no run is finished.
    """
    started = {run.folder: run for run in runs if (run.folder / "metrics.json").is_file()}
    found = [
        replace(run, rule=started[run.folder].rule, config=started[run.folder].config)
        for run in read_runs(started)
    ]
    warn_of_differences(found)
    pictures = [file.name for file in draw_figures(found, output) if file.suffix == ".png"]

    finished = [run for run in runs if run.is_finished()]
    folders = {run.folder for run in finished}
    results = [run for run in found if run.folder in folders]
    if metric is None and finished:
        keys = sorted({key for run in results for key in run.metrics})
        metric = main_metric(keys, finished[0].config["DATASETS.TEST"][0])
    rows = summarise(results, metric) if metric else []
    if not rows:
        logger.error("No run is finished%s: there is no table", f" with {metric}" * bool(metric))
        return ""

    launches = [launch for run in finished for launch in read_launches(run.folder)]
    text = table(rows, metric)
    about = {
        "metric": metric,
        "command": command,
        "iterations": sorted({run.config["SOLVER.MAX_ITER"] for run in finished}),
        "hardware": _distinct(launches, "hardware"),
        "runs at a time": _distinct(launches, "jobs"),
        "threads per run": _distinct(launches, "OMP_NUM_THREADS"),
        "not finished": [run.name for run in runs if run not in finished],
    }
    content = about | {
        "rules": [_describe(row, finished) for row in rows],
        "runs": [
            {"name": run.name, "rule": run.rule, "seed": run.seed, "folder": str(run.folder)}
            | {"launches": read_launches(run.folder)}
            for run in finished
        ],
    }
    (output / "comparison.json").write_text(json.dumps(_without_nan(content), indent=1) + "\n")
    (output / "comparison.md").write_text(_markdown(text, rows, about, finished, pictures))
    return text


def _markdown(
    text: str,
    rows: Sequence[RuleSummary],
    about: dict[str, Any],
    runs: Sequence[PlannedRun],
    pictures: Sequence[str],
) -> str:
    configs = [
        (style_of(row.rule).label, f"{start.config_file} {' '.join(start.overrides)}".strip())
        + (", ".join(map(str, row.seeds)),)
        for row in rows
        for start in [_start(row, runs)]
    ]
    facts = {
        "Iterations": about["iterations"],
        "Hardware": about["hardware"],
        "Runs at a time": about["runs at a time"],
        "Threads per run": about["threads per run"],
        "Not finished, and not in the table": about["not finished"],
    }
    parts = [
        f"# Feedback rules compared by {label_of(about['metric'])}",
        text,
        f"{about['metric']} at the end of training, mean ± sample standard deviation over the "
        "seeds. Time per step: the median.",
        tabulate(configs, headers=("rule", "config", "seeds"), tablefmt="pipe"),
        "\n".join(f"* {k}: {', '.join(map(str, v))}" for k, v in facts.items() if v),
        f"```sh\n{about['command']}\n```" if about["command"] else "",
        "\n".join(f"![{Path(name).stem}]({name})" for name in pictures),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _describe(row: RuleSummary, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    start = _start(row, runs)
    return asdict(row) | {"config": start.config_file, "overrides": " ".join(start.overrides)}


def _start(row: RuleSummary, runs: Sequence[PlannedRun]) -> PlannedRun:
    return next(run for run in runs if run.rule == row.rule)


def _distinct(launches: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(launch[key] for launch in launches if key in launch))


def _without_nan(content: Any) -> Any:
    """JSON has no nan."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
