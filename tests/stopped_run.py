"""
A run of empty steps by ss_detectron.engine.launch, to which something happens: --at RANK STEP
EVENT, a function of this file, or SIGNAL-TARGET for a signal to this process (`self`), its parent,
its workers or all of the run. Ranks wait for each other in every step, as in training, and take
batches from a worker process. What a rank saves goes to saved<RANK>, the number of its last step to
ended<RANK>.
"""

import os
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from detectron2.engine import HookBase, TrainerBase, default_argument_parser
from detectron2.utils import comm
from torch.utils.data import DataLoader

from ss_detectron.engine.launch import add_launch_options, complete_launch_options, launch
from ss_detectron.engine.preemption import PreemptionHook, stop_requested
from ss_detectron.utils.comm import any_rank


def send(name, target):
    pids = {"self": [os.getpid()], "parent": [os.getppid()], "all": [-os.getpgid(0)]}
    pids["workers"] = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert pids[target]
    # By a process outside of the run: a rank's own SIGTERM ends its workers.
    command = ["kill", "-s", name, "--", *map(str, pids[target])]
    subprocess.run(command, check=True, start_new_session=True)


def terminate_all_for_long():
    # Hundreds of times, so as to meet the processes on their way out.
    loop = "trap '' TERM; for i in $(seq 200); do kill -s TERM 0; sleep 0.02; done"
    subprocess.Popen(["sh", "-c", loop])


def interrupt_twice():
    for _ in range(2):
        send("INT", "all")
        time.sleep(1.5)
    hang()


def hang():
    threading.Event().wait()


def fail():
    raise ValueError("a step that fails")


def exit_with_3():
    os._exit(3)


class Trainer(TrainerBase):
    def __init__(self, args):
        super().__init__()
        self.args, self.folder = args, Path(args.config_file)
        self.file = self.folder / f"saved{comm.get_rank()}"
        self.checkpointer = SimpleNamespace(get_checkpoint_file=lambda: self.file)
        self.batches = DataLoader(torch.arange(100), num_workers=1)

    def meet(self, step):
        for rank, when, event in self.args.at:
            if (int(rank), when) == (comm.get_rank(), str(step)):
                name, _, target = event.partition("-")
                send(name, target) if target else globals()[name]()

    def run_step(self):
        comm.synchronize()
        self.meet(self.iter)
        if self.iter % 20 == 0:
            self.batch = iter(self.batches)
        for _ in range(5):  # more than a worker has prepared
            next(self.batch)
        self.stop_agreed = any_rank(stop_requested())

    def save_checkpoint(self):
        comm.synchronize()
        self.file.write_text(str(self.iter))


class Print(HookBase):
    def after_step(self):
        if self.trainer.iter == 5:
            print(f"rank {comm.get_rank()} is process {os.getpid()}", flush=True)


def main(args):
    torch.set_num_threads(1)
    trainer = Trainer(args)
    trainer.meet("setup")
    trainer.register_hooks([Print(), PreemptionHook()])
    try:
        trainer.train(0, args.steps)
    finally:
        (trainer.folder / f"ended{comm.get_rank()}").write_text(str(trainer.iter))


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument("--at", nargs=3, action="append", default=[])
    parser.add_argument("--steps", type=int, default=10**9)
    add_launch_options(parser)
    args = parser.parse_args()
    complete_launch_options(parser, args)
    launch(main, args)
