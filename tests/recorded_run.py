"""
tools/train_net.py, but every step's losses are written down as they are (metrics.json has their
medians), and the run kills itself with all its processes, as kill -9 does, where it is told to:
--kill-after ITERATION, or --kill-in-evaluation NUMBER of the evaluations.
"""

import json
import os
import random
import signal

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ss_detectron.engine import Trainer, argument_parser, setup
from ss_detectron.engine.launch import add_launch_options, complete_launch_options, launch


def kill_all():
    # One rank may be ahead of another.
    comm.synchronize()
    os.killpg(0, signal.SIGKILL)


class Recorder(HookBase):
    def __init__(self, folder, kill_after):
        self.path = os.path.join(folder, f"losses.{comm.get_rank()}.json")
        self.kill_after = kill_after

    def after_step(self):
        values = {
            name: value
            for name, (value, iteration) in self.trainer.storage.latest().items()
            if "loss" in name and iteration == self.trainer.iter
        }
        # What a model with dropout or other noise would draw next.
        values["random"] = [torch.rand(1).item(), np.random.rand(), random.random()]
        with open(self.path, "a") as file:
            file.write(json.dumps({"iteration": self.trainer.iter, **values}) + "\n")
        if self.trainer.iter == self.kill_after:
            kill_all()


class RecordingTrainer(Trainer):
    kill_after = kill_in_evaluation = -1
    evaluations = 0

    def build_hooks(self):
        return [Recorder(self.cfg.OUTPUT_DIR, self.kill_after), *super().build_hooks()]

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        results = super().test(cfg, model, evaluators)
        cls.evaluations += 1
        if cls.evaluations == cls.kill_in_evaluation:
            kill_all()  # before anyone could write down the results
        return results


def main(args):
    RecordingTrainer.kill_after = args.kill_after
    RecordingTrainer.kill_in_evaluation = args.kill_in_evaluation
    trainer = RecordingTrainer(setup(args))
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    parser = argument_parser()
    add_launch_options(parser)
    parser.add_argument("--kill-after", type=int, default=-1)
    parser.add_argument("--kill-in-evaluation", type=int, default=-1)
    args = parser.parse_args()
    complete_launch_options(parser, args)
    launch(main, args)
