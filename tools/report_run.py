#!/usr/bin/env python
"""
What came of a detector's training: prints its AP table and writes two pictures into its folder,
detections.png (ground truth above, predictions below) and training.png (AP and losses).

    tools/report_run.py output/demo
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from tabulate import tabulate

from ss_detectron.data import register_coco_from_config
from ss_detectron.experiments.plots import losses_of, plot_curves
from ss_detectron.experiments.runs import group_runs, merged_config, read_run
from ss_detectron.experiments.visualize import draw_detections
from ss_detectron.utils.usage import add_traceback_option, one_line_errors


def main(folder: Path, count: int, score_threshold: float) -> None:
    """Reads the run's config.yaml, metrics.json and inference results; writes the pictures."""
    if classified := sorted((folder / "inference").glob("*/classification_results.json")):
        sys.exit(
            f"{folder} is a run of classification: tools/plot_metrics.py draws it, and its errors "
            f"by class are in {classified[0]}"
        )
    run = read_run(folder)
    cfg = merged_config(str(folder / "config.yaml"))
    register_coco_from_config(cfg)
    name = "".join(cfg.DATASETS.TEST[:1])
    results = folder / "inference" / name / "coco_instances_results.json"
    if not results.is_file():
        sys.exit(f"{folder} is no finished detection run: {results} is not there")
    rule = run.label or cfg.MODEL.BACKBONE.NAME
    # With several test sets, Detectron2 puts a set's name before its metrics.
    prefix = "bbox/" if len(cfg.DATASETS.TEST) == 1 else f"{name}/bbox/"
    if prefix + "AP" not in run.metrics:
        sys.exit(f"{folder} is no finished detection run: metrics.json has no {prefix}AP")

    detections = json.loads(results.read_text())
    options = {"count": count, "score_threshold": score_threshold, "title": f"{name}, {rule}"}
    drawn = draw_detections(name, detections, **options)
    drawn.savefig(folder / "detections.png", dpi=150, bbox_inches="tight")
    curves = plot_curves(group_runs([run]), [prefix + "AP", *losses_of(run.metrics)])
    curves.savefig(folder / "training.png", dpi=150)

    last = next(row for row in reversed(run.rows) if prefix + "AP" in row)
    table = {k.removeprefix(prefix): [v] for k, v in last.items() if k.startswith(prefix)}
    print(f"\nCOCO box AP of {rule} on {name}, %:\n")
    print(tabulate(table, headers="keys", floatfmt=".1f", tablefmt="pipe"))
    print(f"""
Everything lies in {folder}:
  detections.png   ground truth and predictions
  training.png     AP and losses against iterations
  model_final.pth  weights; model_best.pth those of the best evaluation
  metrics.json     all figures, one row per line; TensorBoard reads the folder as well
  log.txt          the log, with the rule of each layer
  config.yaml      the whole config""")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="OUTPUT_DIR of a run of tools/train_net.py")
    parser.add_argument("--count", type=int, default=6, help="number of images (default: 6)")
    parser.add_argument("--score", type=float, default=0.4, help="least score drawn (default: 0.4)")
    add_traceback_option(parser)
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with one_line_errors(args.traceback):
        main(args.run, args.count, args.score)
