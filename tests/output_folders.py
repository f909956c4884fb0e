"""Output folders of trainings, written by hand."""

import json
from pathlib import Path

from detectron2.config import get_cfg

from ss_detectron import add_ss_config, find_config

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
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.merge_from_file(find_config(config_file))
    cfg.MODEL.FEEDBACK.RULE = rule
    cfg.OUTPUT_DIR = str(folder)
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    write_rows(folder, rows)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder
