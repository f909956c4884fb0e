"""Which runs a comparison takes: from which config each rule starts, and what is done already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from tabulate import tabulate

from ss_detectron.checkpoint.files import has_checkpoint
from ss_detectron.config import add_ss_config, find_config, flatten_config, merge_config_file
from ss_detectron.layers import FEEDBACK_REGISTRY, get_rule

from .metrics import ERRORS, SCORES, matching, read_metrics
from .runs import differences, read_config, rule_of_config

__all__ = ["PlannedRun", "describe_plan", "plan_runs", "starting_config"]

# Whose config a rule without one of its own starts from: that of the nearest relative, whose gain
# and learning rate were found for feedback of the same kind, following the weights' signs or not.
RELATIVES = {
    "sign_symmetry_fixed_magnitude": "sign_symmetry",
    "sign_symmetry_batchwise_magnitude": "sign_symmetry",
    "feedback_alignment_signed_init": "feedback_alignment",
    "kolen_pollack": "feedback_alignment",
}
# What a comparison sets itself.
OWN_KEYS = frozenset({"MODEL.FEEDBACK.RULE", "MODEL.FEEDBACK.SEED", "OUTPUT_DIR", "SEED"})
# What a run may change when it goes on: where and how fast it runs.
MACHINE_KEYS = frozenset({"DATALOADER.NUM_WORKERS", "MODEL.DEVICE", "OUTPUT_DIR"})


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One rule with one seed."""

    rule: str
    """Its full name."""
    seed: int
    config_file: str
    overrides: tuple[str, ...]
    """KEY VALUE ... that make the config file the rule's own."""
    options: tuple[str, ...]
    """All KEY VALUE ... on top of the config file, those among them."""
    folder: Path
    config: Mapping[str, Any]
    """The whole config that comes of it, with dotted keys."""

    @property
    def name(self) -> str:
        return self.folder.name

    def conflicts(self) -> dict[str, tuple[Any, Any]]:
        """Where the folder was started with another config: key -> value there, value here."""
        if not (self.folder / "config.yaml").is_file():
            return {}
        return differences(read_config(self.folder / "config.yaml"), self.config, MACHINE_KEYS)

    def is_finished(self) -> bool:
        """Whether the folder holds the last weights, and a row of their evaluation."""
        metrics = self.folder / "metrics.json"
        if not ((self.folder / "model_final.pth").is_file() and metrics.is_file()):
            return False
        last = self.config["SOLVER.MAX_ITER"] - 1
        return any(
            row["iteration"] >= last and matching(row, (*ERRORS, *SCORES))
            for row in read_metrics(metrics)
        )

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return has_checkpoint(str(self.folder))


def plan_runs(
    config_file: str,
    rules: Mapping[str, Sequence[int]],
    output: Path,
    options: Sequence[str] = (),
    alignment_period: int | None = None,
) -> list[PlannedRun]:
    """
    The runs of a comparison. A run's seed is that of everything random in it: SEED and
    MODEL.FEEDBACK.SEED.

    Args:
        config_file: a path, or the name of a config that ships with this package; see
            :func:`starting_config`.
        rules: name or short name -> seeds.
        output: the runs' folders are ``<output>/<short name>_seed<seed>``.
        options: KEY VALUE ... for all runs.
        alignment_period: TEST.ALIGNMENT_PERIOD; by default, ten to twenty measurements are made
            unless ``options`` say otherwise.

    Raises:
        FileNotFoundError: no such config.
        ValueError: options, rules or seeds that do not fit.
    """
    if len(options) % 2:
        raise ValueError(f"KEY VALUE ... come in pairs; got {' '.join(options)}")
    if own := OWN_KEYS.intersection(options[::2]):
        raise ValueError(f"{', '.join(sorted(own))}: the comparison sets this itself")
    _load(config_file)
    runs: list[PlannedRun] = []
    for name, seeds in rules.items():
        rule = get_rule(name)
        if any(run.rule == rule.name for run in runs):
            raise ValueError(f"rule {rule.name} is named twice")
        if not seeds:
            raise ValueError(f"rule {rule.name} has no seed")
        start, overrides = starting_config(config_file, rule.name)
        shared = [*overrides, *options]
        cfg = _load(start, shared)
        _check(cfg, start, rule.name)
        if alignment_period is not None:
            shared += ["TEST.ALIGNMENT_PERIOD", str(alignment_period)]
        elif "TEST.ALIGNMENT_PERIOD" not in options:
            shared += ["TEST.ALIGNMENT_PERIOD", str(_alignment_period(cfg.SOLVER.MAX_ITER))]
        for seed in seeds:
            folder = output / f"{rule.short_name or rule.name}_seed{seed}"
            own = {"SEED": seed, "MODEL.FEEDBACK.SEED": seed, "OUTPUT_DIR": folder}
            words = [*shared, *(str(word) for pair in own.items() for word in pair)]
            # By way of YAML, as the config.yaml that the run will write.
            config = flatten_config(yaml.safe_load(_load(start, words).dump()))
            runs.append(
                PlannedRun(rule.name, seed, start, tuple(overrides), tuple(words), folder, config)
            )
    return runs


def starting_config(config_file: str, rule: str) -> tuple[str, list[str]]:
    """
    The config file of a rule, and the KEY VALUE ... that make it the rule's own.

    Where ``config_file`` is named after a rule, as retinanet_ss.yaml, that is its sibling named
    after this one, as retinanet_fa.yaml. If there is none, MODEL.FEEDBACK.RULE is changed: in the
    sibling of the nearest relative (sign-symmetry's for frSF and brSF, feedback alignment's for FA
    with signed initialisation and Kolen-Pollack), and else in ``config_file`` itself. A
    LAST_LAYER_RULE that is the config's own rule changes with it.

    Args:
        config_file: a path, or the name of a config that ships with this package.
        rule: full name.
    """
    sibling = _sibling(config_file, rule)
    if sibling is not None:
        return sibling, []
    relative = RELATIVES.get(rule)
    start = (relative and _sibling(config_file, relative)) or config_file
    overrides = ["MODEL.FEEDBACK.RULE", rule]
    feedback = _load(start).MODEL.FEEDBACK
    if feedback.RULE and get_rule(feedback.RULE) is get_rule(feedback.LAST_LAYER_RULE):
        overrides += ["MODEL.FEEDBACK.LAST_LAYER_RULE", rule]
    return start, overrides


def describe_plan(runs: Sequence[PlannedRun]) -> str:
    """A table of what there is and what would be done."""

    def state(run: PlannedRun) -> str:
        if conflicts := run.conflicts():
            return f"has another config: {', '.join(conflicts)}"
        if run.is_finished():
            return "finished"
        return "goes on" if run.has_checkpoint() else "new"

    rows = [(str(run.folder), run.config_file, " ".join(run.overrides), state(run)) for run in runs]
    return tabulate(rows, headers=("run", "config", "with", "state"), tablefmt="pipe")


def _sibling(config_file: str, rule: str) -> str | None:
    path = PurePath(config_file)
    words = path.stem.split("_")
    short_names = {known.short_name for _, known in FEEDBACK_REGISTRY if known.short_name}
    places = [i for i, word in enumerate(words) if word in short_names]
    if not places or not get_rule(rule).short_name:
        return None
    words[places[-1]] = get_rule(rule).short_name
    name = str(path.with_name("_".join(words) + path.suffix))
    try:
        find_config(name)
    except FileNotFoundError:
        return None
    return name


def _load(config_file: str, options: Sequence[str] = ()) -> CfgNode:
    cfg = get_cfg()
    add_ss_config(cfg)
    merge_config_file(cfg, config_file)
    try:
        cfg.merge_from_list(list(options))
    except AssertionError as error:  # yacs, of a key that is not there
        raise ValueError(str(error)) from None
    return cfg


def _check(cfg: CfgNode, config_file: str, rule: str) -> None:
    learns_by = rule_of_config(flatten_config(cfg))
    if learns_by != rule:
        raise ValueError(
            f"{config_file} should learn by {rule}, as its name says, but MODEL.FEEDBACK.RULE is "
            f"{cfg.MODEL.FEEDBACK.RULE!r} and MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r}"
        )
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: there is nothing to compare the rules by")


def _alignment_period(max_iter: int) -> int:
    # A metrics.json gets a row every 20 iterations. With a period of 40 at least, the measurement
    # of iteration 0 is in the first one, and not yet overtaken by the next.
    return 20 * max(2, round(max_iter / 400))
