#!/usr/bin/env python
"""
Draws what trained models see in pictures or a video: one panel per checkpoint, side by side.

    tools/demo.py --config-file output/bp/config.yaml output/ss/config.yaml \\
        --input datasets/shapes/val --output drawn
    tools/demo.py --config-file retinanet_ss.yaml --weights ss.pth fa.pth --labels SS FA \\
        --input "photos/*.jpg" --score 0.5 --output drawn MODEL.DEVICE cpu
    tools/demo.py --config-file output/ss/config.yaml --video street.mp4 --output drawn

Detectors' boxes are drawn with class and score, of classifiers the five most probable classes are
named. A checkpoint is drawn below the rule that it was trained by. Its weights are, by default,
model_final.pth beside the config, or else the config's MODEL.WEIGHTS.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
from detectron2.utils.logger import setup_logger
from PIL import Image

from ss_detectron.data import UnreadableImageError
from ss_detectron.experiments import demo
from ss_detectron.utils.usage import add_traceback_option, one_line_errors

logger = logging.getLogger("ss_detectron.experiments.demo")


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, loads the models, draws."""
    weights = args.weights or [None] * len(args.config_file)
    configs = args.config_file * (len(weights) if len(args.config_file) == 1 else 1)
    with one_line_errors(args.traceback):
        files = demo.find_files(args.video or args.input, recursive=args.recursive)
        targets = demo.output_paths(files, args.output, ".mp4" if args.video else ".png")
        args.output.mkdir(parents=True, exist_ok=True)
        cfgs = [demo.load_config(f, args.opts, w) for f, w in zip(configs, weights, strict=True)]
        predictors = [demo.build_predictor(cfg, args.score) for cfg in cfgs]
    labels = args.labels or demo.titles(predictors, [cfg.MODEL.WEIGHTS for cfg in cfgs])

    def draw(image: np.ndarray) -> np.ndarray:
        drawn = [predictor.draw(image) for predictor in predictors]
        return demo.side_by_side(labels, *zip(*drawn, strict=True))

    unreadable = 0
    for file, target in zip(files, targets, strict=True):
        try:
            if args.video:
                demo.draw_video(file, target, draw)
            else:
                Image.fromarray(draw(demo.read_picture(file))).save(target)
        except UnreadableImageError as error:
            logger.error("%s. It is left out.", error)
            unreadable += 1
        else:
            print(f"{file} -> {target}")
    if unreadable:
        sys.exit(f"demo.py: {unreadable} of {len(files)} files could not be read")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line, and refuses what cannot work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    configs = "a run's config.yaml or the name of a config; one for all checkpoints, or one each"
    add("--config-file", nargs="+", required=True, metavar="CONFIG", help=configs)
    add("--weights", nargs="+", metavar="W", help="checkpoints")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="IMAGE", help="files, patterns, folders")
    source.add_argument("--video", nargs="+", metavar="FILE", help="videos; MP4 comes out")
    add("--recursive", action="store_true", help="look for images in folders' folders, too")
    add("--labels", nargs="+", metavar="LABEL", help="titles instead of the rules")
    add("--score", type=float, default=0.4, help="least score drawn (default: 0.4)")
    add("--output", type=Path, required=True, help="folder to write into")
    add_traceback_option(parser)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides, after --output")
    args = parser.parse_args()
    count = len(args.weights or args.config_file)
    if len(args.config_file) not in (1, count):
        parser.error(f"{len(args.config_file)} configs, but {count} weights: give one for each")
    if args.labels and len(args.labels) != count:
        parser.error(f"{len(args.labels)} labels, but {count} checkpoints: give one for each")
    return args


if __name__ == "__main__":
    arguments = parse_arguments()
    for name in ("fvcore", "detectron2", "ss_detectron"):
        setup_logger(name=name).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of what Detectron2 does
    main(arguments)
