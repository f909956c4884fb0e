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
import os
import sys
from pathlib import Path

import numpy as np
from detectron2.utils.logger import setup_logger
from PIL import Image

from ss_detectron.data import UnreadableImageError
from ss_detectron.experiments.demo import (
    Panel,
    Predictor,
    build_predictor,
    check_same_classes,
    draw_video,
    find_files,
    load_config,
    output_paths,
    read_picture,
    render,
    side_by_side,
    titles,
)

logger = logging.getLogger("ss_detectron.experiments.demo")


def load(args: argparse.Namespace) -> tuple[list[Predictor], list[str]]:
    """The models, and what is written above their panels."""
    files, weights = args.config_file, args.weights or [None] * len(args.config_file)
    if len(files) == 1:
        files = files * len(weights)
    cfgs = [load_config(f, args.opts, w) for f, w in zip(files, weights, strict=True)]
    predictors = [build_predictor(cfg, args.score) for cfg in cfgs]
    check_same_classes(predictors, files)
    return predictors, args.labels or titles(predictors, [cfg.MODEL.WEIGHTS for cfg in cfgs])


def draw(image: np.ndarray, predictors: list[Predictor], labels: list[str]) -> np.ndarray:
    """All panels of one picture."""
    drawn = (predictor.draw(image) for predictor in predictors)
    panels = [Panel(label, *panel) for label, panel in zip(labels, drawn, strict=True)]
    return render(side_by_side(panels))


def make_folder(folder: Path) -> None:
    """Makes sure that one can write to the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise OSError(f"the folder '{folder}' cannot be written to: {error}") from error


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, loads the models, draws."""
    try:
        files = find_files(args.video or args.input)
        targets = output_paths(files, args.output, ".mp4" if args.video else ".png")
        make_folder(args.output)
        predictors, labels = load(args)
    except (KeyError, OSError, ValueError) as error:
        sys.exit(f"demo.py: {error}")

    unreadable = 0
    for file, target in zip(files, targets, strict=True):
        try:
            if args.video:
                draw_video(file, target, lambda frame: draw(frame, predictors, labels))
            else:
                Image.fromarray(draw(read_picture(file), predictors, labels)).save(target)
        except UnreadableImageError as error:
            logger.error("%s. It is left out.", error)
            unreadable += 1
        else:
            print(f"{file} -> {target}")
    if unreadable:
        sys.exit(f"demo.py: {unreadable} of {len(files)} files could not be read")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        nargs="+",
        required=True,
        metavar="CONFIG",
        help="a run's config.yaml or a config that ships with ss_detectron; one for all "
        "checkpoints, or one each",
    )
    parser.add_argument("--weights", nargs="+", metavar="W", help="checkpoints")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="IMAGE", help="files, patterns, folders")
    source.add_argument("--video", nargs="+", metavar="FILE", help="videos; MP4 comes out")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="titles instead of the rules")
    parser.add_argument("--score", type=float, default=0.4, help="least score drawn (default: 0.4)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides, after an option of one value such as --output",
    )
    args = parser.parse_args()
    count = len(args.weights or args.config_file)
    if len(args.config_file) not in (1, count):
        parser.error(f"{len(args.config_file)} configs, but {count} weights: give one for each")
    if args.labels and len(args.labels) != count:
        parser.error(f"{len(args.labels)} labels, but {count} checkpoints: give one for each")
    if not 0 <= args.score <= 1:
        parser.error(f"--score {args.score}: choose a number from 0 to 1")
    if options := [word for word in args.opts if word.startswith("--")]:
        parser.error(f"{' '.join(options)}: give options before the first KEY VALUE")
    if len(args.opts) % 2:
        parser.error(f"{' '.join(args.opts)}: a KEY or a VALUE is missing")
    setup_logger(name="fvcore")
    setup_logger()
    setup_logger(name="ss_detectron")
    main(args)
