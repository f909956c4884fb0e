#!/usr/bin/env python
"""
What came of a training run: prints its AP table and writes two pictures into its folder,
detections.png (ground truth above, predictions below) and training.png (losses and AP).

    tools/report_run.py output/demo
"""

import argparse
import json
import sys
from pathlib import Path

from detectron2.config import get_cfg
from tabulate import tabulate

from ss_detectron import add_ss_config
from ss_detectron.config import merge_config_file
from ss_detectron.data import register_coco_from_config
from ss_detectron.experiments import read_metrics
from ss_detectron.experiments.plots import plot_training
from ss_detectron.experiments.visualize import draw_detections


def main(run: Path, count: int, score_threshold: float) -> None:
    """Reads the run's config.yaml, metrics.json and inference results; writes the pictures."""
    needed = [run / "config.yaml", run / "metrics.json", run / "inference"]
    needed[2] /= "coco_instances_results.json"
    for path in needed:
        if not path.is_file():
            sys.exit(f"{run} is no finished detection run: {path} is not there")
    cfg = get_cfg()
    add_ss_config(cfg)
    merge_config_file(cfg, str(needed[0]))
    register_coco_from_config(cfg)
    rule = cfg.MODEL.FEEDBACK.RULE or cfg.MODEL.BACKBONE.NAME
    metrics = read_metrics(needed[1])

    pictures = {
        "detections.png": draw_detections(
            cfg.DATASETS.TEST[0],
            json.loads(needed[2].read_text()),
            count=count,
            score_threshold=score_threshold,
            title=f"{cfg.DATASETS.TEST[0]}, {rule}",
        ),
        "training.png": plot_training(metrics, title=rule),
    }
    for name, figure in pictures.items():
        figure.savefig(run / name, dpi=150)

    # With several test sets, Detectron2 puts a set's name before its metrics.
    evaluated = cfg.DATASETS.TEST[0]
    prefix = "bbox/" if len(cfg.DATASETS.TEST) == 1 else f"{evaluated}/bbox/"
    rows = [row for row in metrics if prefix + "AP" in row]
    if not rows:
        sys.exit(f"{needed[1]} has no {prefix}AP: the pictures are written, there is no table")
    table = [(k.removeprefix(prefix), v) for k, v in rows[-1].items() if k.startswith(prefix)]
    print(f"\nCOCO box AP of {rule} on {evaluated}, %:\n")
    print(tabulate(zip(*table, strict=True), headers="firstrow", floatfmt=".1f", tablefmt="pipe"))
    print("\nEverything lies in", run)
    for name, what in {
        "detections.png": "ground truth and predictions",
        "training.png": "losses and AP against iterations",
        "model_final.pth": "weights; model_best.pth those of the best evaluation",
        "metrics.json": "all figures, one row per line; TensorBoard reads the folder as well",
        "log.txt": "the log, with the rule of each layer",
        "config.yaml": "the whole config",
    }.items():
        print(f"  {name:16} {what}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="OUTPUT_DIR of a run of tools/train_net.py")
    parser.add_argument("--count", type=int, default=6, help="number of images (default: 6)")
    parser.add_argument("--score", type=float, default=0.4, help="least score drawn (default: 0.4)")
    args = parser.parse_args()
    main(args.run, args.count, args.score)
