"""Which runs a comparison takes: from which config each rule starts, and what is done already."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from ss_detectron.checkpoint.files import has_checkpoint
from ss_detectron.config import find_config, flatten_config
from ss_detectron.layers import FEEDBACK_REGISTRY, get_rule
from ss_detectron.layers.feedback import Backpropagation
from ss_detectron.learners import LEARNER_REGISTRY, Learner

from .runs import (
    MACHINE_KEYS,
    METRICS,
    OWN_KEYS,
    differences,
    get_method,
    matching,
    merged_config,
    method_of_config,
    read_config,
    read_metrics,
)

# Whose config a rule without one of its own starts from: that of the nearest relative, whose gain
# and learning rate were found for feedback of the same kind, following the weights' signs or not.
RELATIVES = {
    "sign_symmetry_fixed_magnitude": "sign_symmetry",
    "sign_symmetry_batchwise_magnitude": "sign_symmetry",
    "feedback_alignment_signed_init": "feedback_alignment",
    "kolen_pollack": "feedback_alignment",
    "weight_mirror": "feedback_alignment",
    "information_alignment": "feedback_alignment",
}


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A config with overrides, which is one side of a comparison, and a seed."""

    label: str
    """What is compared: the full name of a feedback rule or learner."""
    seed: int
    config_file: str
    overrides: tuple[str, ...]
    """KEY VALUE ... that belong to the label."""
    options: tuple[str, ...]
    """All KEY VALUE ... on top of the config file, those among them."""
    folder: Path
    config: Mapping[str, Any]
    """The whole config that comes of it, with dotted keys."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def start(self) -> str:
        """The config file and what makes it the label's."""
        return " ".join((self.config_file, *self.overrides))

    def conflicts(self) -> dict[str, tuple[Any, Any]]:
        """Finds where the folder was started with another config: key -> value there, here."""
        if not (self.folder / "config.yaml").is_file():
            return {}
        return differences(read_config(self.folder / "config.yaml"), self.config, MACHINE_KEYS)

    def is_finished(self) -> bool:
        """Tells whether the folder holds the last weights, and a row of their evaluation."""
        metrics = self.folder / "metrics.json"
        if not ((self.folder / "model_final.pth").is_file() and metrics.is_file()):
            return False
        # Not by SOLVER.MAX_ITER, which scaling and SOLVER.EPOCHS change.
        return any(matching(row, METRICS) for row in read_metrics(metrics)[-1:])

    def has_checkpoint(self) -> bool:
        """Tells whether there is something to go on from."""
        return has_checkpoint(str(self.folder))


def plan_runs(
    config_file: str,
    rules: Mapping[str, Sequence[int]],
    output: Path,
    options: Sequence[str] = (),
) -> list[PlannedRun]:
    """
    Plans the runs of a comparison. A run's seed is that of everything random in it: SEED and
    MODEL.FEEDBACK.SEED. Alignment is measured ten to twenty times, unless the options say
    otherwise (TEST.ALIGNMENT_PERIOD).

    Args:
        config_file: a path, or the name of a config that ships with this package; see
            :func:`starting_config`.
        rules: name or short name of a rule or learner -> seeds.
        output: the runs' folders are ``<output>/<short name>_seed<seed>``.
        options: KEY VALUE ... for all runs.

    Raises:
        FileNotFoundError: no such config.
        ValueError: options or rules that do not fit.
    """
    if own := OWN_KEYS.intersection(options[::2]):
        raise ValueError(f"{', '.join(sorted(own))}: the comparison sets this itself")
    runs = {}
    for name, seeds in rules.items():
        rule = get_method(name)
        start, overrides = starting_config(config_file, rule.name)
        cfg = merged_config(start, [*overrides, *options])
        if not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: there is nothing to compare the rules by")
        # A metrics.json gets a row every 20 iterations. With a period of 40 at least, the
        # measurement of iteration 0 is in the first, and not yet overtaken by the next. How many
        # iterations SOLVER.EPOCHS are depends on the data.
        period = 40 if cfg.SOLVER.EPOCHS else 20 * max(2, round(cfg.SOLVER.MAX_ITER / 400))
        for seed in seeds:
            folder = output / f"{rule.short_name or rule.name}_seed{seed}"
            own = ["SEED", seed, "MODEL.FEEDBACK.SEED", seed, "OUTPUT_DIR", folder]
            words = [*overrides, "TEST.ALIGNMENT_PERIOD", str(period), *options, *map(str, own)]
            # By way of YAML, as the config.yaml that the run will write.
            config = flatten_config(yaml.safe_load(merged_config(start, words).dump()))
            runs[folder] = PlannedRun(
                rule.name, seed, start, tuple(overrides), tuple(words), folder, config
            )
    return list(runs.values())


def starting_config(config_file: str, method: str) -> tuple[str, list[str]]:
    """
    Finds the config file of a rule or learner, and the KEY VALUE ... that make it its own.

    Where ``config_file`` is named after one, as retinanet_ss.yaml, that is the one named after
    this, as retinanet_fa.yaml; if there is none, the one of the nearest relative (sign-symmetry's
    for frSF and brSF, feedback alignment's for other feedback that does not follow the weights,
    backpropagation's for learners); else ``config_file`` itself. Where it has another
    MODEL.LEARNER.NAME or MODEL.FEEDBACK.RULE, that is changed, and so is the LAST_LAYER_RULE of a
    config whose last layers learn as the others do.

    Args:
        config_file: a path, or the name of a config that ships with this package.
        method: full name of the rule or learner.
    """
    is_learner = issubclass(get_method(method), Learner)
    known = [known for registry in (FEEDBACK_REGISTRY, LEARNER_REGISTRY) for _, known in registry]
    shorts = "|".join(sorted({k.short_name for k in known if k.short_name}))
    folder, slash, file = config_file.rpartition("/")
    start = config_file
    relative = Backpropagation.name if is_learner else RELATIVES.get(method)
    for name in filter(None, (relative, method)):
        renamed = re.sub(rf"^(.*_)({shorts})(?=[_.])", rf"\g<1>{get_method(name).short_name}", file)
        with suppress(FileNotFoundError):
            find_config(folder + slash + renamed)
            start = folder + slash + renamed
    cfg = merged_config(start)
    if method_of_config(flatten_config(cfg)) == method:
        return start, []
    if is_learner:
        return start, ["MODEL.LEARNER.NAME", method]
    overrides = ["MODEL.FEEDBACK.RULE", method]
    if get_method(cfg.MODEL.LEARNER.NAME) is not Backpropagation:
        overrides += ["MODEL.LEARNER.NAME", Backpropagation.name]
    before = method_of_config(flatten_config(cfg) | {"MODEL.LEARNER.NAME": ""})
    last = cfg.MODEL.FEEDBACK.LAST_LAYER_RULE
    if before != Backpropagation.name and before == get_rule(last).name:
        overrides += ["MODEL.FEEDBACK.LAST_LAYER_RULE", method]
    return start, overrides


def describe_plan(runs: Sequence[PlannedRun]) -> str:
    """Makes a table of what there is and what would be done."""

    def state(run: PlannedRun) -> str:
        if conflicts := run.conflicts():
            return f"has another config: {', '.join(conflicts)}"
        if run.is_finished():
            return "finished"
        return "goes on" if run.has_checkpoint() else "new"

    rows = [(str(run.folder), run.start, state(run)) for run in runs]
    return tabulate(rows, headers=("run", "config", "state"), tablefmt="pipe")
