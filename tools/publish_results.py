#!/usr/bin/env python
"""
Keeps what runs measured as docs/results/NAME.json, and writes the tables of docs/results.md and of
README.md from all such files, beside what docs/results/tables.yaml has as published.

    tools/publish_results.py --name mnist_fc output/compare_mnist_fc_bp/*/
    tools/publish_results.py --name mnist_fc --count --figure mnist_fc    # and what steps cost
    tools/publish_results.py    # only the tables

The folders are those of tools/compare_rules.py. Runs may still go on: their row says how far they
are, and the same command brings it up to date.
"""

import argparse
import json
import logging
import math
import re
import shlex
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tabulate import tabulate

from ss_detectron.config import flatten_config
from ss_detectron.experiments.cost import multiply_adds
from ss_detectron.experiments.launch import LAUNCHES, read_launches
from ss_detectron.experiments.plan import starting_config
from ss_detectron.experiments.plots import Cost, plot_costs
from ss_detectron.experiments.runs import (
    ERRORS,
    MACHINE_KEYS,
    PERIODS,
    SCORES,
    differences,
    get_method,
    matching,
    merged_config,
    method_of_config,
    read_run,
)
from ss_detectron.experiments.styles import label_of, style_of
from ss_detectron.learners import LEARNER_REGISTRY
from ss_detectron.utils.usage import add_traceback_option, one_line_errors

logger = logging.getLogger("ss_detectron.publish_results")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
# Where a run was, its seeds, and where data lie: what changes no figure, or is told elsewhere.
UNTOLD = {"SEED", "MODEL.FEEDBACK.SEED", "DATASETS.COCO_INSTANCES", "DATASETS.IMAGE_FOLDERS"}
# What makes a config that of another rule or learner.
METHOD_KEYS = {"MODEL.FEEDBACK.RULE", "MODEL.LEARNER.NAME", "MODEL.FEEDBACK.LAST_LAYER_RULE"}
# Keys that change nothing for backpropagation begin so.
OF_METHODS = "MODEL.FEEDBACK.", "MODEL.LEARNER."
OVERVIEW = ("bp", "ss", "fa", "kp", "dfa", "dtp")
POINTS = 20  # of a curve

Summary = dict[str, Any]


# What a run measured -----------------------------------------------------------------------------


def summarise(folder: Path) -> Summary:
    """
    What is kept of a run: the metric of its first test set at the end and at best, its curve, how
    it was trained, and the angles that were measured last.

    Raises:
        FileNotFoundError, ValueError: it is no run of tools/compare_rules.py, or has no figure yet.
    """
    run, launches = read_run(folder), read_launches(folder)
    if not launches:
        raise ValueError(f"{folder} is no run of tools/compare_rules.py: it has no {LAUNCHES}")
    test = run.config["DATASETS.TEST"][0]
    found = matching(run.metrics, (ERRORS[0], *SCORES))
    if not found:
        raise ValueError(f"{folder} has no evaluation yet")
    metric = min(found, key=lambda key: not key.startswith(test + "/"))
    iterations, values = run.series(metric)
    if np.isnan(values).all():
        raise ValueError(f"{folder} has {metric} nan alone, as where nothing is found")
    best = int(np.nanargmin(values) if metric.endswith("error") else np.nanargmax(values))
    # Passes over the training images where the schedule is in them, else iterations.
    epochs = bool(run.config.get("SOLVER.EPOCHS"))
    goal = run.config["SOLVER.EPOCHS" if epochs else "SOLVER.MAX_ITER"]
    unit = run.epochs_per_iteration if epochs else 1
    # The evaluation at the end comes one iteration late.
    trained = [min(goal, round((i + 1) * unit, 1)) for i in iterations]
    some = sorted({*np.linspace(0, len(values) - 1, POINTS).round().astype(int), best})

    words = shlex.split(launches[0]["command"])
    config = re.sub(r"^.*configs/", "", words[words.index("--config-file") + 1])
    shipped = flatten_config(yaml.safe_load(merged_config(config).dump()))
    changed = differences(shipped, run.config, MACHINE_KEYS | PERIODS | UNTOLD)
    angles = [run.last(key) for key in run.metrics if key.startswith("alignment/weight_angle/")]
    gradient_angle = run.last("alignment/gradient_angle")
    logged, seconds = run.series("time")
    return {
        "rule": run.label,
        "seed": run.config["SEED"],
        "config": config,
        "overrides": {key: value for key, (_, value) in changed.items()},
        "test_set": test,
        "metric": metric.removeprefix(test + "/"),
        "last": round(values[-1], 3),
        "best": round(values[best], 3),
        "best_at": trained[best],
        "trained": trained[-1],
        "goal": goal,
        "unit": "epochs" if epochs else "iterations",
        "iterations": int(logged[-1]) + 1,
        "curve": [[trained[i], round(values[i], 3)] for i in some],
        "gradient_angle": None if np.isnan(gradient_angle) else round(gradient_angle, 2),
        "weight_angles": [round(angle, 2) for angle in angles],
        "training_hours": round(float(np.sum(seconds * np.diff(logged, prepend=-1))) / 3600, 3),
        "date": time.strftime("%Y-%m-%d", time.gmtime((folder / "metrics.json").stat().st_mtime)),
        "hardware": list(dict.fromkeys(launch["hardware"] for launch in launches)),
        "threads": launches[-1].get("OMP_NUM_THREADS"),
        "runs_at_a_time": launches[-1]["jobs"],
    }


def write_summaries(folders: Iterable[Path], file: Path, count: bool = False) -> None:
    """
    Writes the summaries of runs, one a line, into a file whose other runs stay; what is no run with
    a figure is said and left out. With ``count``, all in the file have the multiply-adds per image
    of a training step.
    """
    runs: dict[str, Summary] = {}
    if file.exists():
        runs = {_identity(run): run for run in json.loads(file.read_text())}
    found = count and bool(runs)
    for folder in folders:
        try:
            run = summarise(folder)
        except (FileNotFoundError, ValueError) as error:
            logger.warning("%s; left out", error)
            continue
        counted = runs.get(_identity(run), {}).get("multiply_adds")
        runs[_identity(run)] = run | ({"multiply_adds": counted} if counted else {})
        found = True
    if not found:
        raise ValueError(f"there is nothing for {file}")
    if count:
        counts: dict[str, float] = {}
        for run in runs.values():
            words = [str(word) for pair in run["overrides"].items() for word in pair]
            start = shlex.join([run["config"], *words])
            if start not in counts:
                counts[start] = multiply_adds(merged_config(run["config"], words))
            run["multiply_adds"] = counts[start]
    file.write_text("[\n" + ",\n".join(map(json.dumps, runs.values())) + "\n]\n")


def _identity(run: Summary) -> str:
    """What two summaries of one run have in common."""
    return json.dumps([run[key] for key in ("config", "rule", "overrides", "goal", "seed")])


def read_summaries(folder: Path = RESULTS) -> list[Summary]:
    """Reads all that was kept, in the order of the files' names."""
    return [run for file in sorted(folder.glob("*.json")) for run in json.loads(file.read_text())]


# Tables ------------------------------------------------------------------------------------------


class Row:
    """A config with KEY VALUE ..., what is published for it, and the runs of it, in groups."""

    def __init__(self, start: str, published: float | list[float] | None) -> None:
        self.config, *words = start.split()
        self.overrides = dict(zip(words[::2], words[1::2], strict=True))
        cfg = merged_config(self.config, words)
        self.rule = method_of_config(flatten_config(cfg))
        self.name = style_of(self.rule).label
        if "DTP" in self.name:
            self.name += f", {cfg.MODEL.LEARNER.SCHEDULE}"
        self.published = published if isinstance(published, list) else [published or None]
        self.groups: list[Group] = []

    def fits(self, run: Summary) -> bool:
        overrides = {(key, str(value)) for key, value in run["overrides"].items()}
        return (self.config, self.rule) == (run["config"], run["rule"]) and (
            self.overrides.items() <= overrides
        )


class Group:
    """
    Runs that differ in their seeds alone. Means are over those that are as far as the farthest.
    """

    def __init__(self, runs: Sequence[Summary]) -> None:
        seeds = [run["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"docs/results has seeds {seeds} of {runs[0]['config']}: one is there twice"
            )
        self.trained = max(run["trained"] for run in runs)
        self.runs = [run for run in runs if run["trained"] == self.trained]
        self.behind = [run for run in runs if run not in self.runs]
        first = runs[0]
        self.overrides, self.metric = first["overrides"], first["metric"]
        self.is_error = self.metric.endswith("error")
        # Those that are not the rule's own.
        self.options = words_of({k: v for k, v in self.overrides.items() if k not in METHOD_KEYS})
        self.settings = {k: v for k, v in self.overrides.items() if not k.startswith(OF_METHODS)}
        self.is_finished = self.trained >= first["goal"]
        goal = "" if self.is_finished else f" of {first['goal']:g}"
        self.how_far = f"{'at ' * bool(goal)}{self.trained:g}{goal} {first['unit']}"

    def has(self, key: str) -> bool:
        return all(run.get(key) is not None for run in self.runs)

    def mean(self, key: str) -> float:
        return statistics.mean(run[key] for run in self.runs)

    def measured(self, key: str) -> str:
        values = [run[key] for run in self.runs]
        digits = 2 if self.is_error else 1
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{self.mean(key):.{digits}f}{deviation}"

    def seeds(self) -> str:
        behind = "".join(f", another {run['trained']:g} {run['unit']} far" for run in self.behind)
        return f"{len(self.runs)}{behind}"


def read_tables(runs: Sequence[Summary], folder: Path = RESULTS) -> dict[str, Mapping[str, Any]]:
    """
    Reads tables.yaml; the rows have their runs.

    Raises:
        FileNotFoundError, ValueError: a config that there is not.
        ValueError: a run that no row is for.
    """
    tables = yaml.safe_load((folder / "tables.yaml").read_text())
    for table in tables.values():
        table["rows"] = [Row(*row) for row in table["rows"].items()]
    rows = [row for table in tables.values() for row in table["rows"]]
    found: dict[Row, dict[str, list[Summary]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        fitting = [row for row in rows if row.fits(run)]
        if not fitting:
            start = " ".join([run["config"], *words_of(run["overrides"])])
            raise ValueError(f"docs/results/tables.yaml has no row for {run['rule']} by {start}")
        alike = json.dumps([run["overrides"], run["goal"]])
        found[max(fitting, key=lambda row: len(row.overrides))][alike].append(run)
    for row, groups in found.items():
        row.groups = sorted(map(Group, groups.values()), key=lambda group: -group.trained)
    return tables


def words_of(overrides: Mapping[str, Any]) -> list[str]:
    """KEY VALUE ..., as a shell takes them."""
    return [word for key, value in overrides.items() for word in (key, shlex.quote(str(value)))]


def render_table(rows: Sequence[Row], compare: str = "last", **_: Any) -> str:
    """Writes a table, then on what it was measured, and by which commands."""
    control = next((row for row in rows if row.rule == "backpropagation"), None)
    lines = []
    for row in rows:
        published = " / ".join(f"{p:g}" for p in row.published if p is not None)
        start = {
            "rule": row.name,
            "config": f"`{' '.join([row.config, *words_of(row.overrides)])}`",
        }
        if not row.groups:
            lines.append(start | {"last": "not run", "published": published})
        for group in row.groups:
            line = start | {"config": f"`{' '.join([row.config, *words_of(group.overrides)])}`"}
            line |= {
                "last": group.measured("last"),
                "best": group.measured("best"),
                "to BP": _to_control(group, control),
                "seeds": group.seeds(),
                "trained": group.how_far,
                "published": published,
            }
            if published:
                line["difference"] = f"{group.mean(compare) - row.published[-1]:+.2f}"
            lines.append(line)
    names = ("rule", "config", "last", "best", "to BP", "seeds", "trained", "published")
    columns = {
        name: column
        for name in (*names, "difference")
        if any(column := [line.get(name, "") for line in lines])
    }
    text = tabulate(columns, headers="keys", tablefmt="pipe", disable_numparse=True)
    groups = [(row, group) for row in rows for group in row.groups]
    return "\n\n".join([text, *_hardware(groups), *_commands(groups)])


def _to_control(group: Group, row: Row | None) -> str:
    """Beside backpropagation with the same settings, as far: points of error, or a ratio."""
    for control in row.groups if row else ():
        if (control.settings, control.trained) == (group.settings, group.trained):
            mean, other = group.mean("last"), control.mean("last")
            return f"{mean - other:+.2f}" if group.is_error else f"{mean / other:.2f}"
    return ""


def _hardware(groups: Sequence[tuple[Row, Group]]) -> list[str]:
    """One paragraph for each machine and way to use it."""
    found: dict[str, list[tuple[str, Summary]]] = defaultdict(list)
    for row, group in groups:
        for run in (*group.runs, *group.behind):
            how = [*run["hardware"], f"runs at a time: {run['runs_at_a_time']}"]
            how += [f"OMP_NUM_THREADS {run['threads']}"] * bool(run["threads"])
            found["; ".join(how)].append((row.name, run))
    texts = []
    for how, runs in found.items():
        dates = sorted({run["date"] for _, run in runs})
        hours = sum(run["training_hours"] for _, run in runs)
        names = f"{', '.join(dict.fromkeys(name for name, _ in runs))}: " * (len(found) > 1)
        texts.append(
            f"{names}{how}; {' to '.join(dates[:: len(dates) - 1 or 1])}; {hours:.1f} h of steps."
        )
    return texts


def _commands(groups: Sequence[tuple[Row, Group]]) -> list[str]:
    """The commands of tools/compare_rules.py that these runs come of, as few as do."""
    commands: list[tuple[str, list[str], list[str]]] = []  # config, options, rules
    for row, group in groups:
        seeds = sorted(run["seed"] for run in (*group.runs, *group.behind))
        short = get_method(row.rule).short_name or row.rule
        rule = short + (f":{','.join(map(str, seeds))}," if seeds != [1] else "")
        for config, others, rules in commands:
            if others == group.options and starting_config(config, row.rule)[0] == row.config:
                rules.append(rule)
                break
        else:
            commands.append((row.config, group.options, [rule]))
    lines = [
        f"tools/compare_rules.py --config-file {config} --rules {' '.join([*rules, *words])}\n"
        for config, words, rules in commands
    ]
    return [f"```\n{''.join(lines)}```"] * bool(lines)


def render_overview(tables: Iterable[Mapping[str, Any]]) -> str:
    """
    Writes one row per table that has finished runs: those with the options that most rules were
    trained with, at their end.
    """
    methods = [get_method(short).name for short in OVERVIEW]
    lines = []
    for table in tables:
        found: dict[str, dict[str, Group]] = defaultdict(dict)
        for row in table["rows"]:
            for group in row.groups:
                if group.is_finished and row.rule in methods:
                    options = f", `{' '.join(group.options)}`" * bool(group.options)
                    how = f"{label_of(group.metric)}, {group.how_far}{options}"
                    found[how].setdefault(row.rule, group)
        if found:
            how, groups = max(found.items(), key=lambda item: len(item[1]))
            cells = [groups[m].measured("last") if m in groups else "" for m in methods]
            lines.append([f"{table['title']}: {how}", *cells])
    headers = ["", *(style_of(method).label for method in methods)]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)


def costs(rows: Sequence[Row]) -> list[Cost]:
    """
    Of each row's longest runs that are finished, for :func:`plot_costs`. The angle between W and B
    is the mean over the layers whose B is another than W; learners other than backpropagation have
    no B.

    Raises:
        ValueError: nothing is there for backpropagation, or its multiply-adds were not counted.
    """
    counted = {
        row: group
        for row in rows
        for group in row.groups[:1]
        if group.is_finished and group.has("multiply_adds")
    }
    control = next((g for row, g in counted.items() if row.rule == "backpropagation"), None)
    if not control:
        raise ValueError("docs/results has no multiply-adds of finished backpropagation: --count")
    points = []
    for row, group in counted.items():
        angles = [angle for run in group.runs for angle in run["weight_angles"] if angle]
        if row.rule == "backpropagation":
            angles = [0.0]
        elif row.rule in LEARNER_REGISTRY:
            angles = []
        values = [run["last"] for run in group.runs]
        points.append(
            Cost(
                row.rule,
                row.name,
                group.mean("last"),
                statistics.stdev(values) if len(values) > 1 else 0.0,
                group.mean("multiply_adds") / control.mean("multiply_adds"),
                statistics.mean(angles) if angles else math.nan,
                group.mean("gradient_angle") if group.has("gradient_angle") else math.nan,
            )
        )
    return points


def render(page: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Writes the tables of a page anew, each between <!-- results: NAME --> and <!-- end -->; that of
    the name "overview" is over all tables.

    Raises:
        KeyError: there is no table of a name.
    """

    def replace(mark: re.Match) -> str:
        name = mark[2]
        table = tables[name] if name != "overview" else None
        text = render_table(**table) if table else render_overview(tables.values())
        return f"{mark[1]}\n\n{text}\n\n{mark[3]}"

    return re.sub(r"(<!-- results: (\w+) -->).*?(<!-- end -->)", replace, page, flags=re.DOTALL)


def main(words: list[str] | None = None) -> None:
    """Keeps what is named, then writes the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="folders of runs; none: only the tables")
    add("--name", help="of the file in docs/results; other runs in it stay")
    count = "of a training step, of all in the file: takes the data sets, and a minute a rule"
    add("--count", action="store_true", help=f"the multiply-adds {count}")
    add("--figure", metavar="TABLE", help="draw docs/results/TABLE.png: what steps cost")
    add_traceback_option(parser)
    args = parser.parse_args(words)
    if bool(args.runs or args.count) != bool(args.name):
        parser.error("--name goes with RUN ... or --count, and they with it")
    with one_line_errors(args.traceback):
        if args.name:
            write_summaries(args.runs, RESULTS / f"{args.name}.json", args.count)
        tables = read_tables(read_summaries())
        for page in PAGES:
            page.write_text(render(page.read_text(), tables))
        if args.figure:
            rows = tables[args.figure]["rows"]
            metric = next(row.groups[0].metric for row in rows if row.groups)
            plot_costs(costs(rows), metric).savefig(RESULTS / f"{args.figure}.png", dpi=150)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    main()
