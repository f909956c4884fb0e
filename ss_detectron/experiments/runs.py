"""What training runs left in their output folders: metrics.json and config.yaml."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ss_detectron.config import flatten_config
from ss_detectron.layers import FEEDBACK_REGISTRY, get_rule

from .metrics import read_metrics

__all__ = [
    "Run",
    "RunGroup",
    "differences",
    "group_runs",
    "read_run",
    "read_runs",
    "rule_of_config",
    "warn_of_differences",
]

logger = logging.getLogger(__name__)

# Keys that repetitions of one experiment may differ in.
PER_RUN_KEYS = frozenset(
    {
        "DATALOADER.NUM_WORKERS",
        "MODEL.DEVICE",
        "MODEL.FEEDBACK.RULE",  # as a name or a short name
        "MODEL.FEEDBACK.SEED",
        "OUTPUT_DIR",
        "SEED",
        "SOLVER.CHECKPOINT_PERIOD",
        "TEST.ALIGNMENT_PERIOD",
        "TEST.EVAL_PERIOD",
        "VIS_PERIOD",
    }
)
# Keys in which runs do not compare if they differ.
EXPERIMENT_KEYS = (
    "MODEL.META_ARCHITECTURE",
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH",
)


@dataclass(frozen=True, eq=False)
class Run:
    """One output folder."""

    folder: Path
    rows: list[dict[str, float]]
    """Of :func:`~ss_detectron.experiments.metrics.read_metrics`."""
    config: Mapping[str, Any]
    """Of config.yaml, with dotted keys; empty where there is none."""
    rule: str | None = None
    """The feedback rule's full name, as far as the config says."""
    epochs_per_iteration: float | None = None
    """None where the folder does not say."""

    @cached_property
    def metrics(self) -> list[str]:
        """The names of all metrics, in alphabetical order."""
        return sorted({key for row in self.rows for key in row} - {"iteration"})

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """
        One metric over time.

        Returns:
            iterations and values, both (N,); empty where the run does not have the metric.
        """
        # A run that was resumed only for its last evaluation logs it one iteration late.
        end = self.config.get("SOLVER.MAX_ITER", np.inf)
        points = [(min(row["iteration"], end), row[key]) for row in self.rows if key in row]
        return tuple(np.array(points, dtype=float).reshape(-1, 2).T)

    def last(self, key: str) -> float:
        """A metric's last value; nan where the run does not have it."""
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else float("nan")


def read_run(folder: str | Path, images_per_epoch: int | None = None) -> Run:
    """
    A run of tools/train_net.py, or of anything else that writes Detectron2's metrics.json.

    Args:
        folder: OUTPUT_DIR.
        images_per_epoch: the number of training images. By default it is known from the run: from
            "epoch" in its metrics or from its log.txt.

    Raises:
        FileNotFoundError: no such folder, or no metrics.json in it.
        ValueError: metrics.json holds no complete row.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there, or no folder")
    path = folder / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no output folder of a training: no metrics.json")
    rows = read_metrics(path)
    if not rows:
        raise ValueError(f"{path} is empty: the run logged nothing, at least so far")
    config = read_config(folder / "config.yaml")
    return Run(
        folder,
        rows,
        config,
        rule_of_config(config),
        _epochs_per_iteration(folder, rows, config, images_per_epoch),
    )


def read_runs(folders: Iterable[str | Path], images_per_epoch: int | None = None) -> list[Run]:
    """:func:`read_run` of each folder, once. Those that cannot be read are reported, left out."""
    runs = []
    for folder in {Path(folder).resolve(): folder for folder in folders}.values():
        try:
            runs.append(read_run(folder, images_per_epoch))
        except (OSError, ValueError) as error:
            logger.warning("%s; left out", error)
    return runs


def read_config(path: Path) -> dict[str, Any]:
    """A config.yaml by dotted keys; empty, and reported, where there is none or it is no YAML."""
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        logger.info("%s is not there: what the run trained with is not known", path)
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read (%s)", path, str(error).partition("\n")[0])
        return {}
    return flatten_config(config) if isinstance(config, dict) else {}


def rule_of_config(config: Mapping[str, Any]) -> str | None:
    """
    The full name of the rule that a config with dotted keys trains by: MODEL.FEEDBACK.RULE, or
    that of a builder of sign-symmetry or feedback alignment; None where it names none.
    """
    if rule := config.get("MODEL.FEEDBACK.RULE"):
        try:
            return get_rule(rule).name
        except ValueError:  # one that the project of the run registered
            return rule
    builder = config.get("MODEL.BACKBONE.NAME", "")
    found = re.match(r"build_(ss|fa)_", builder)
    return get_rule(found[1]).name if found else None


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], ignored: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """
    Where two configs with dotted keys differ: key -> both values. Keys that only one of them has
    come from another version of the software, and do not count.
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
            logger.warning(
                "The runs do not compare, for %s differs: %s",
                key,
                "; ".join(f"{value} in {', '.join(where)}" for value, where in values.items()),
            )


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seeds alone."""

    name: str
    """The rule's full name; where it is not known, what tells the folder from the others."""
    detail: str
    """What tells these runs from others of that rule; empty where there are none."""
    variant: int
    """Their place among the rule's groups: 0, 1, ..."""
    runs: list[Run]


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """
    The runs by rule, in the order of the registry, then those whose rule is not known, each by
    itself. Runs of one rule with different configs are different groups.
    """
    by_name: dict[str, list[list[Run]]] = defaultdict(list)
    unknown = _distinct_names([run.folder for run in runs if run.rule is None])
    for run in runs:
        alike = by_name[run.rule or unknown[run.folder]]
        for group in alike:
            if run.rule and not differences(group[0].config, run.config, PER_RUN_KEYS):
                group.append(run)
                break
        else:
            alike.append([run])

    order = {name: place for place, (name, _) in enumerate(FEEDBACK_REGISTRY)}
    names = sorted(by_name, key=lambda name: order.get(name, len(order)))
    return [
        RunGroup(name, detail, variant, group)
        for name in names
        for variant, (group, detail) in enumerate(
            zip(by_name[name], _details(by_name[name]), strict=True)
        )
    ]


def _details(groups: list[list[Run]]) -> list[str]:
    """What tells groups of one rule from each other: one or two settings, or else the folder."""
    if len(groups) == 1:
        return [""]
    configs = [group[0].config for group in groups]
    keys = sorted({key for c in configs for key in differences(configs[0], c, PER_RUN_KEYS)})
    details = [
        ", ".join(f"{key.rpartition('.')[2]} {config.get(key)}" for key in keys)
        for config in configs
    ]
    if len(keys) > 2 or len(set(details)) < len(details):
        names = _distinct_names([group[0].folder for group in groups])
        return [names[group[0].folder] for group in groups]
    return details


def _distinct_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder's last parts, as many as tell it from the others."""
    names = {}
    for folder in folders:
        parts = folder.resolve().parts
        others = [other.resolve().parts for other in folders if other != folder]
        length = 1
        while any(other[-length:] == parts[-length:] for other in others) and length < len(parts):
            length += 1
        names[folder] = "/".join(parts[-length:])
    return names


def _epochs_per_iteration(
    folder: Path, rows: list[dict], config: Mapping[str, Any], images_per_epoch: int | None
) -> float | None:
    epochs = [row["epoch"] / (row["iteration"] + 1) for row in rows if "epoch" in row]
    if epochs and images_per_epoch is None:
        return epochs[-1]
    if images_per_epoch is None and (folder / "log.txt").is_file():
        # As the trainer of this package says it.
        log = (folder / "log.txt").read_text(errors="replace")
        said = re.findall(r"SOLVER\.MAX_ITER: .* epochs of (\d+) images", log)
        images_per_epoch = int(said[-1]) if said else None
    batch = config.get("SOLVER.IMS_PER_BATCH")
    return batch / images_per_epoch if batch and images_per_epoch else None
