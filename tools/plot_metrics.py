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
from ss_detectron.utils.usage import add_traceback_option, one_line_errors


def main(words: list[str] | None = None) -> None:
    """Reads, warns, draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="output folders")
    add("--output", type=Path, default="figures", metavar="DIR", help="default: figures")
    metrics = "of metrics.json, such as AP50 (default: AP, or top-1 and top-5 error)"
    add("--metric", nargs="+", default=(), metavar="KEY", help=metrics)
    add("--format", nargs="+", default=DEFAULT_FORMATS, choices=FORMATS, help="default: png pdf")
    add_traceback_option(parser)
    args = parser.parse_args(words)
    with one_line_errors(args.traceback):
        runs = read_runs(args.runs)
        warn_of_differences(runs)
        files = draw_figures(runs, args.output, metrics=args.metric, formats=args.format)
    if not files:
        sys.exit("Nothing could be drawn.")
    print("Written:", *files, sep="\n  ")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("ss_detectron").setLevel(logging.INFO)
    main()
