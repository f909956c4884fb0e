#!/usr/bin/env python
"""
Writes a trained detector for tools that know nothing of ss_detectron:

  model.pth    the weights under stock Detectron2's names
  config.yaml  the config for stock Detectron2, with MODEL.WEIGHTS pointing at them
  model.pt2    with --program: a torch.export program, image in, class logits and box deltas of
               every pyramid level out (RetinaNet only; torch.export.load reads it)

    tools/export.py --config-file output/demo/config.yaml --output exported \\
        MODEL.WEIGHTS output/demo/model_final.pth
"""

import argparse
import sys
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import RetinaNet, build_model

from ss_detectron import add_ss_config
from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.config import merge_config_file
from ss_detectron.export import DenseRetinaNet, plain_config, plain_state_dict


def main(args: argparse.Namespace) -> None:
    """Loads, converts back to stock layers and writes."""
    cfg = get_cfg()
    add_ss_config(cfg)
    merge_config_file(cfg, args.config_file)
    cfg.merge_from_list(args.opts)
    if not Path(cfg.MODEL.WEIGHTS).is_file():
        sys.exit(f"MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS!r}: give the trained checkpoint's path")
    plain = plain_config(cfg)
    cfg.MODEL.DEVICE = "cpu"  # here, not in the exported config

    model = build_model(cfg).eval()
    trusted = cfg.MODEL.TRUSTED_WEIGHTS
    FeedbackCheckpointer(model, trusted_weights=trusted).load(cfg.MODEL.WEIGHTS)
    args.output.mkdir(parents=True, exist_ok=True)
    weights = args.output / "model.pth"
    torch.save({"model": plain_state_dict(model)}, weights)
    plain.MODEL.WEIGHTS = str(weights.resolve())
    (args.output / "config.yaml").write_text(plain.dump())
    written = [weights, args.output / "config.yaml"]

    if args.program:
        if not isinstance(model, RetinaNet):
            sys.exit(f"--program knows RetinaNet only, this is {type(model).__name__}")
        divisor = max(model.backbone.size_divisibility, 1)
        height, width = (-(-side // divisor) * divisor for side in args.size)
        with torch.no_grad():
            program = torch.export.export(
                DenseRetinaNet(model), (torch.zeros(1, 3, height, width),), strict=False
            )
        torch.export.save(program, args.output / "model.pt2")
        written.append(args.output / "model.pt2")
        print(f"The program takes an image of (1, 3, {height}, {width}), {cfg.INPUT.FORMAT}.")
    print("Written:", ", ".join(map(str, written)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the run's config.yaml, or its config")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--program", action="store_true", help="write a torch.export program too")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(800, 1344),
        metavar=("H", "W"),
        help="image size of the program, rounded up to what the backbone divides (800 1344)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    main(parser.parse_args())
