"""Output folders of trainings, written by hand."""

import json
from pathlib import Path

from ss_detectron.experiments.runs import merged_config

DETECTION = "quick/shapes_retinanet_ss.yaml"
CLASSIFICATION = "quick/shapes_resnet18_ss.yaml"


def write_rows(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in rows]  # as Detectron2 does
    (folder / "metrics.json").write_text("".join(lines))


def write_run(
    folder: Path, rows: list[dict], rule: str = "bp", config_file: str = DETECTION, **changes
) -> Path:
    """A folder of a run by a rule; ``changes`` are config keys with __ for the dots."""
    options = {"MODEL__FEEDBACK__RULE": rule, "OUTPUT_DIR": str(folder), **changes}
    words = [word for key, value in options.items() for word in (key.replace("__", "."), value)]
    cfg = merged_config(config_file, words)
    write_rows(folder, rows)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder
