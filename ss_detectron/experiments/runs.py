"""What training runs left in their output folders: metrics.json and config.yaml."""

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode, get_cfg

from ss_detectron.config import add_ss_config, find_config, flatten_config, merge_config_file
from ss_detectron.layers import FEEDBACK_REGISTRY, FeedbackRule, get_rule
from ss_detectron.layers.feedback import Backpropagation
from ss_detectron.learners import LEARNER_REGISTRY, Learner

logger = logging.getLogger(__name__)

# What an evaluation gives. With several test sets, a set's name and a slash stand before it.
ERRORS = ("classification/top1_error", "classification/top5_error")
SCORES = ("bbox/AP", "segm/AP", "keypoints/AP")
METRICS = (*ERRORS, *SCORES)
# Of what evaluations give and every training logs, what comes last in the name.
KNOWN_METRIC = re.compile(
    r"(^|/)(AP(50|75|[sml]|-.+)?|top[15]_error(-.+)?|train_top1_error|time|lr)$|loss|alignment/"
)

# Keys that a run may change when it goes on: where and how fast it runs.
MACHINE_KEYS = frozenset({"DATALOADER.NUM_WORKERS", "MODEL.DEVICE", "OUTPUT_DIR"})
# Keys that a comparison sets itself.
OWN_KEYS = frozenset(
    {"MODEL.FEEDBACK.RULE", "MODEL.FEEDBACK.SEED", "MODEL.LEARNER.NAME", "OUTPUT_DIR", "SEED"}
)
PERIODS = {"SOLVER.CHECKPOINT_PERIOD", "TEST.ALIGNMENT_PERIOD", "TEST.EVAL_PERIOD", "VIS_PERIOD"}
# Keys that repetitions of one experiment may differ in.
PER_RUN_KEYS = MACHINE_KEYS | OWN_KEYS | PERIODS
# Keys in which runs do not compare if they differ.
EXPERIMENT_KEYS = ("MODEL.META_ARCHITECTURE", "DATASETS.TRAIN", "DATASETS.TEST")
EXPERIMENT_KEYS += ("SOLVER.MAX_ITER", "SOLVER.EPOCHS", "SOLVER.IMS_PER_BATCH")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """
    Reads the rows of a Detectron2 metrics.json, one dict per iteration, in their order.

    A row that was cut off, because the run was killed while writing, is reported and left out. Rows
    that a resumed run wrote again count once, as it wrote them last.

    Raises:
        FileNotFoundError: there is no such file.
    """
    text = Path(path).read_text(errors="replace")
    found = re.findall(r"\{[^{}]*\}", text)  # rows are flat
    if len(found) < text.count("{"):
        logger.warning("%s has a row that is not complete, which is left out", path)
    rows: dict[float, dict[str, float]] = defaultdict(dict)
    for row in map(json.loads, found):
        rows[row["iteration"]] |= row
    return [rows[iteration] for iteration in sorted(rows)]


def matching(keys: Iterable[str], bases: Iterable[str]) -> list[str]:
    """Selects those of ``keys`` that are one of ``bases``, be it of a named test set."""
    keys = list(keys)
    return [key for base in bases for key in keys if key == base or key.endswith("/" + base)]


def they_have(keys: Iterable[str]) -> str:
    """Writes which metrics there are to choose from."""
    return f"they have {', '.join(k for k in keys if not k.startswith('alignment/')) or 'none'}"


@dataclass(frozen=True, eq=False)
class Run:
    """One output folder."""

    folder: Path
    rows: list[dict[str, float]]
    """Of :func:`read_metrics`."""
    config: Mapping[str, Any]
    """Of config.yaml, with dotted keys; empty where there is none."""
    label: str | None = None
    """
    What is compared: the full name of a feedback rule or learner; None where the config does not
    say it.
    """
    epochs_per_iteration: float | None = None

    @cached_property
    def metrics(self) -> list[str]:
        """The names of all metrics, in alphabetical order."""
        return sorted({key for row in self.rows for key in row} - {"iteration", "epoch"})

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns a metric's iterations and values, both (N,); empty where the run lacks it."""
        # A run that was resumed only for its last evaluation logs it one iteration late. MAX_ITER
        # is no bound: scaling and SOLVER.EPOCHS change it.
        late = self.config.get("SOLVER.MAX_ITER", np.inf) + 1
        points = [
            (row["iteration"] - (row["iteration"] == late), row[key])
            for row in self.rows
            if key in row
        ]
        return tuple(np.array(points, dtype=float).reshape(-1, 2).T)

    def last(self, key: str) -> float:
        """Returns a metric's last value; nan where the run does not have it."""
        return next((row[key] for row in reversed(self.rows) if key in row), float("nan"))


def read_run(folder: str | Path) -> Run:
    """
    Reads the OUTPUT_DIR of tools/train_net.py, or of anything else that writes Detectron2's
    metrics.json.

    Raises:
        FileNotFoundError: no metrics.json is there.
        ValueError: metrics.json holds no complete row.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").is_file():
        raise FileNotFoundError(f"{folder} is no output folder of a training: no metrics.json")
    rows = read_metrics(folder / "metrics.json")
    if not rows:
        raise ValueError(f"{folder}/metrics.json is empty: the run logged nothing, at least so far")
    config = read_config(folder / "config.yaml")
    epochs = [row["epoch"] / (row["iteration"] + 1) for row in rows if "epoch" in row]
    return Run(folder, rows, config, method_of_config(config), epochs[-1] if epochs else None)


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Reads each folder once. Those that cannot be read are reported and left out."""
    runs = []
    for folder in {Path(folder).resolve(): folder for folder in folders}.values():
        try:
            runs.append(read_run(folder))
        except (OSError, ValueError) as error:
            logger.warning("%s; left out", error)
    return runs


def merged_config(config_file: str, options: Sequence[str] = ()) -> CfgNode:
    """
    Reads a config, by path or as one that ships with this package, and merges KEY VALUE ...

    Raises:
        FileNotFoundError: no such config.
        ValueError: a key that there is not, or a value that does not fit.
    """
    cfg = get_cfg()
    add_ss_config(cfg)
    merge_config_file(cfg, config_file)
    cfg.merge_from_list(list(options))
    return cfg


def trained_config(name: str, options: Sequence[str] = (), weights: str | None = None) -> CfgNode:
    """
    Reads the config of a trained model.

    MODEL.WEIGHTS is, in this order: ``weights``; what ``options`` say; ``model_final.pth`` beside
    the file, for a run's config.yaml names the weights that the run started from; the file's.

    Args:
        name: a path, or the name of a config that ships with this package.
        options: KEY VALUE ...
        weights: path or URL of a checkpoint.

    Raises:
        FileNotFoundError: no such config, or no such checkpoint.
        ValueError: see :func:`merged_config`.
    """
    cfg = merged_config(name, options)
    final = Path(find_config(name)).with_name("model_final.pth")
    if weights is None and final.is_file() and "MODEL.WEIGHTS" not in options[::2]:
        weights = str(final)
    path = cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS if weights is None else weights
    if not path or ("://" not in path and not os.path.isfile(path.partition("?")[0])):
        raise FileNotFoundError(
            f"there are no weights {path!r} for {name}: name them (MODEL.WEIGHTS)"
        )
    return cfg


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config.yaml as dotted keys; one that cannot be read is reported, and empty."""
    try:
        return flatten_config(yaml.safe_load(path.read_text()) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        logger.warning("What %s trained with is not known: %s", path.parent, reason)
        return {}


def get_method(name: str) -> type[FeedbackRule] | type[Learner]:
    """
    Finds a feedback rule or a learner by one of its names; "backpropagation", which is both, is
    the rule.

    Raises:
        ValueError: there is neither.
    """
    if name in FEEDBACK_REGISTRY or name not in LEARNER_REGISTRY:
        try:
            return get_rule(name)
        except ValueError as error:
            learners = (
                f"{n} ({c.short_name})" for n, c in LEARNER_REGISTRY if n != "backpropagation"
            )
            raise ValueError(f"{error}; or a learner: {', '.join(learners)}") from None
    return LEARNER_REGISTRY.get(name)


def method_of_config(config: Mapping[str, Any]) -> str | None:
    """
    Tells the full name of what a config with dotted keys trains by: MODEL.LEARNER.NAME or, where
    that is backpropagation, MODEL.FEEDBACK.RULE or the rule of a builder of sign-symmetry or
    feedback alignment; None where it names none.
    """
    found = re.match(r"build_(ss|fa)_", config.get("MODEL.BACKBONE.NAME", ""))
    rule = config.get("MODEL.FEEDBACK.RULE") or (found and found[1])
    for name in (config.get("MODEL.LEARNER.NAME"), rule):
        if name and name not in LEARNER_REGISTRY and name not in FEEDBACK_REGISTRY:
            return name  # one that the project of the run registered
        if name and (name == rule or get_method(name) is not Backpropagation):
            return get_method(name).name
    return None


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], ignored: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """
    Finds where two configs with dotted keys differ: key -> both values. Keys that only one of them
    has come from another version of the software, and do not count.
    """
    shared = (one.keys() & other.keys()).difference(ignored)
    return {key: (one[key], other[key]) for key in sorted(shared) if one[key] != other[key]}


def warn_of_differences(runs: Sequence[Run]) -> None:
    """Logs where runs are of different experiments: another task, data set or schedule."""
    for key in EXPERIMENT_KEYS:
        values = defaultdict(list)
        for run in runs:
            if key in run.config:
                values[str(run.config[key])].append(str(run.folder))
        if len(values) > 1:
            said = "; ".join(f"{value} in {', '.join(where)}" for value, where in values.items())
            logger.warning("The runs do not compare, for %s differs: %s", key, said)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seeds alone."""

    name: str
    """The runs' label; where it is not known, what tells the folder from the others."""
    detail: str
    """What tells these runs from others of that label; empty where there are none."""
    variant: int
    """Their place among the label's groups: 0, 1, ..."""
    runs: list[Run]


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """
    Groups runs by label, in the order of the registry, then those without one, each by itself.
    Runs of one label with different configs are different groups.
    """
    by_name: dict[str, list[list[Run]]] = defaultdict(list)
    folders = _short_names([run.folder for run in runs if run.label is None])
    for run in runs:
        alike = by_name[run.label or folders[run.folder]]
        for group in alike:
            differ = differences(group[0].config, run.config, PER_RUN_KEYS)
            if run.label and group[0].label and not differ:
                group.append(run)
                break
        else:
            alike.append([run])

    order = [name for registry in (FEEDBACK_REGISTRY, LEARNER_REGISTRY) for name, _ in registry]
    names = sorted(by_name, key=lambda name: order.index(name) if name in order else len(order))
    return [
        RunGroup(name, detail, variant, group)
        for name in names
        for variant, (group, detail) in enumerate(
            zip(by_name[name], _details(by_name[name]), strict=True)
        )
    ]


def _details(groups: list[list[Run]]) -> list[str]:
    """What tells groups of one label from each other: one or two settings, or else the folder."""
    configs = [group[0].config for group in groups]
    keys = sorted({key for c in configs for key in differences(configs[0], c, PER_RUN_KEYS)})
    details = [", ".join(f"{k.rpartition('.')[2]} {c.get(k)}" for k in keys) for c in configs]
    if len(keys) > 2 or len(set(details)) < len(details):
        return list(_short_names([group[0].folder for group in groups]).values())
    return details


def _short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder without what all of them lie in."""
    parents = [folder.resolve().parent for folder in folders]
    top = os.path.commonpath(parents) if parents else ""
    return {folder: os.path.relpath(folder.resolve(), top) for folder in folders}
