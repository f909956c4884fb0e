#!/usr/bin/env python
"""
Draws what training runs logged: losses, AP or error, and alignment, one line per feedback rule.

    tools/plot_metrics.py output/retinanet_bp output/retinanet_ss output/retinanet_fa
    tools/plot_metrics.py output/compare/*/ --output figures --metric bbox/AP50 --format pdf

A run is an output folder of tools/train_net.py, or of any training by Detectron2: metrics.json is
enough. Runs that differ in their seeds alone are one line, their mean, in a band of one standard
deviation. A run whose config.yaml names no feedback rule goes by its folder's name.
"""

import argparse
import logging
import sys
from pathlib import Path

from ss_detectron.experiments.plots import DEFAULT_FORMATS, FORMATS, draw_figures
from ss_detectron.experiments.runs import read_runs, warn_of_differences


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folders")
    parser.add_argument(
        "--output", type=Path, default=Path("figures"), metavar="DIR", help="default: figures"
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        default=(),
        metavar="KEY",
        help="of metrics.json, such as bbox/AP50 (default: AP, or top-1 and top-5 error)",
    )
    parser.add_argument(
        "--format", nargs="+", default=DEFAULT_FORMATS, choices=FORMATS, help="default: png pdf"
    )
    parser.add_argument(
        "--images-per-epoch",
        type=int,
        metavar="N",
        help="the number of training images, where a run's folder does not say it",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    """Reads, warns, draws; the exit code."""
    runs = read_runs(args.runs, args.images_per_epoch)
    warn_of_differences(runs)
    files = draw_figures(runs, args.output, metrics=args.metric, formats=args.format)
    if not files:
        print("Nothing could be drawn.", file=sys.stderr)
        return 1
    print("Written:", *files, sep="\n  ")
    return 0


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("ss_detectron").setLevel(logging.INFO)
    sys.exit(main(parse_arguments()))
