#!/usr/bin/env python
"""
Trains and evaluates detectors and classifiers by backpropagation, sign-symmetry, feedback alignment
and relatives.

    tools/train_net.py --config-file imagenet_resnet18_ss.yaml --num-gpus 8
    tools/train_net.py --config-file retinanet_ss.yaml --num-gpus 8
    tools/train_net.py --config-file retinanet_ss.yaml --num-gpus 8 --resume
    tools/train_net.py --config-file retinanet_ss.yaml --eval-only MODEL.WEIGHTS model_best.pth
    tools/train_net.py --config-file retinanet_ss.yaml --num-gpus 1 MODEL.FEEDBACK.RULE frsf

--config-file takes a path, or the name of a config that ships with ss_detectron. On a machine
without a GPU it trains on the CPU, in as many processes as --num-gpus says.
"""

import argparse
import sys
from typing import Any

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.engine import Trainer, argument_parser, setup
from ss_detectron.engine.launch import add_launch_options, complete_launch_options, launch


def main(args: argparse.Namespace) -> Any:
    """One process of the run: trains, or evaluates only."""
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    checkpointer = FeedbackCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        weights_except=cfg.MODEL.WEIGHTS_EXCEPT,
        trusted_weights=cfg.MODEL.TRUSTED_WEIGHTS,
    )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


if __name__ == "__main__":
    parser = argument_parser()
    add_launch_options(parser)
    args = parser.parse_args()
    complete_launch_options(parser, args)
    if options := [word for word in args.opts if word.startswith("--")]:
        parser.error(f"{' '.join(options)}: give options before the first KEY VALUE")
    print("Command line:", " ".join(sys.argv))
    launch(main, args)
