#!/usr/bin/env python
"""
What this package's Trainer costs beside Detectron2's DefaultTrainer, for RetinaNet with
backpropagation by a quick config, whose data set is generated before anything is timed.

    benchmarks/trainer.py step        a step of training, hooks included, as a multiple of theirs
    benchmarks/trainer.py start       from a process's start to the end of its first step, by parts
    benchmarks/trainer.py processes   two gloo processes against one: what ranks tell each other

Theirs, a second copy of theirs (the control), and ours take turns: in one process for steps, and in
processes of their own for starts. Theirs has Detectron2's builders and none of this package's keys.
On a busy machine, --clock cpu takes the processor time of a
process, of all its threads: set OMP_NUM_THREADS=1 then, as threads that wait for each other spin.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import CONTROL, STOCK, interleave, print_table, ratio, write_json

OURS = "ours"
CONFIG = "quick/shapes_retinanet_bp.yaml"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Nothing but steps: no checkpoint, no evaluation.
KEYS = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.CHECKPOINT_PERIOD", "1000000", "TEST.EVAL_PERIOD", "0"]
KEYS += ["MODEL.DEVICE", "cuda" if torch.cuda.is_available() else "cpu"]


def configs(folder: str, words: list[str]) -> tuple[Any, Any]:
    """Return our config and theirs, the same but for the builders and the keys they lack."""
    from detectron2.config import CfgNode, get_cfg

    from ss_detectron.config import add_ss_config, merge_config_file

    ours = get_cfg()
    add_ss_config(ours)
    merge_config_file(ours, CONFIG)
    ours.merge_from_list([*KEYS, *words, "OUTPUT_DIR", folder])

    def take(node: CfgNode, given: CfgNode) -> CfgNode:
        for key, value in node.items():
            node[key] = take(value, given[key]) if isinstance(value, CfgNode) else given[key]
        return node

    stock = take(get_cfg(), ours)
    stock.MODEL.META_ARCHITECTURE = "RetinaNet"
    stock.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    return ours, stock


# Steps -------------------------------------------------------------------------------------------


def stepping(trainer: Any) -> Callable[[], None]:
    """Return the steps of a trainer, as its ``train`` takes them."""
    from detectron2.engine import DefaultTrainer
    from detectron2.utils.events import EventStorage

    trainer.iter, trainer.storage = 0, EventStorage(0)
    with trainer.storage:
        trainer.before_train()
    theirs = type(trainer) is DefaultTrainer

    def step() -> None:
        # Our trainer does not let torch optimise what is scripted on the CPU.
        with trainer.storage, torch.jit.optimized_execution(theirs or torch.cuda.is_available()):
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        trainer.iter += 1

    return step


def compare_steps(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    from detectron2.engine import DefaultTrainer

    from ss_detectron.engine import Trainer

    ours, stock = configs(folder, args.keys)
    kinds = {
        STOCK: (DefaultTrainer, stock),
        CONTROL: (DefaultTrainer, stock),
        OURS: (Trainer, ours),
    }
    steps = {}
    for name, (kind, cfg) in kinds.items():
        torch.manual_seed(0)
        steps[name] = stepping(kind(cfg.clone()))
    clock = CLOCKS[args.clock]
    seconds = interleave(steps, args.turns, device=ours.MODEL.DEVICE, clock=clock)
    print_table([row(name, times, seconds[STOCK]) for name, times in seconds.items()])
    return seconds


def row(name: str, times: list[float], reference: list[float]) -> dict[str, str]:
    found = ratio(times, reference)
    return {
        "trainer": name,
        "time / stock": f"{found.median:.3f}",
        "quartiles": f"{found.low:.3f} - {found.high:.3f}",
        "ms": f"{1e3 * statistics.median(times):.0f}",
    }


# Starts ------------------------------------------------------------------------------------------


def compare_starts(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    from detectron2.data import MetadataCatalog

    _, stock = configs(folder, args.keys)
    file = Path(folder, "stock.yaml")
    file.write_text(stock.dump())
    data = MetadataCatalog.get(stock.DATASETS.TRAIN[0])
    coco = [data.name, data.json_file, data.image_root]  # which generates the set
    words = {
        STOCK: [STOCK, *coco, "--config-file", file, "OUTPUT_DIR", folder],
        CONTROL: [STOCK, *coco, "--config-file", file, "OUTPUT_DIR", folder],
        OURS: [OURS, "--config-file", CONFIG, *KEYS, *args.keys, "OUTPUT_DIR", folder],
    }

    def start(name: str) -> None:
        call = [sys.executable, __file__, "child", args.clock, repr(time.perf_counter())]
        done = subprocess.run([*call, *map(str, words[name])], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stdout}{done.stderr}")
        for part, seconds in json.loads(done.stdout.splitlines()[-1]).items():
            parts[name][part].append(seconds)

    parts: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in words}
    interleave({name: lambda name=name: start(name) for name in words}, args.turns, warm_up=1)
    for times in parts.values():
        times.update(
            {part: seconds[1:] for part, seconds in times.items()}
        )  # files were not cached
    totals = {name: [*map(sum, zip(*times.values(), strict=True))] for name, times in parts.items()}
    rows = []
    for part in parts[OURS]:
        medians = {name: statistics.median(parts[name].get(part, [0.0])) for name in words}
        rows.append({"part": part} | {name: f"{1e3 * s:.0f} ms" for name, s in medians.items()})
    print_table(rows)
    print_table([row(name, times, totals[STOCK]) for name, times in totals.items()])
    return parts


def child(clock: str, began: str, kind: str, *words: str) -> None:
    """Train until the end of the first step, and print the seconds of each part of the start."""
    now = CLOCKS[clock]
    last = float(began) if clock == "wall" else 0.0
    parts: dict[str, float] = {}

    def mark(part: str) -> None:
        nonlocal last
        parts[part], last = now() - last, now()

    mark("Python, torch")
    import detectron2.checkpoint
    import detectron2.data
    import detectron2.evaluation
    import detectron2.modeling  # noqa: F401
    from detectron2.engine import DefaultTrainer

    mark("Detectron2")
    if kind == OURS:
        from ss_detectron.engine import Trainer, main

        mark("ss_detectron.engine")

    class Marked(DefaultTrainer if kind == STOCK else Trainer):
        def __init__(self, cfg: Any) -> None:
            mark("config, checks, log")
            super().__init__(cfg)
            mark("trainer")

        def run_step(self) -> None:
            mark("until the first step")
            super().run_step()
            mark("first step")
            print(json.dumps(parts), flush=True)
            os._exit(0)  # without a checkpoint

    if kind == OURS:
        main(words, trainer=Marked)
    # What Detectron2's tools/plain_train_net.py and train_net.py do.
    from detectron2.config import get_cfg
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import default_argument_parser, default_setup

    name, json_file, images, *options = words
    register_coco_instances(name, {}, json_file, images)
    args = default_argument_parser().parse_args(options)
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    trainer = Marked(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


# Processes ---------------------------------------------------------------------------------------

EXCHANGES = {
    "reduce_flags": "flags: finite losses and gradients, requests to stop",
    "gather": "Detectron2's own: losses, for the log",
    "gather_rank_states": "states, at a checkpoint",
}


def compare_processes(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    found = {}
    for count in (1, 2):
        # torchrun's processes import nothing again, and give each a thread.
        call = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        call += ["--nproc-per-node", str(count), __file__, "rank", args.clock, str(args.turns)]
        call += ["--config-file", CONFIG, *KEYS, *args.keys, "OUTPUT_DIR", folder]
        done = subprocess.run(call, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]
        if done.returncode or not lines:
            raise SystemExit(f"{count} processes: {done.stdout}{done.stderr}")
        found[count] = json.loads(lines[-1])
    step = {n: statistics.median(seconds["step"] for seconds in found[n]) for n in found}
    rows = [
        {
            "two processes": said,
            "ms": f"{1e3 * (median := statistics.median(s.get(name, 0) for s in found[2])):.2f}",
            "of a step": f"{median / step[2]:.2%}",
        }
        for name, said in EXCHANGES.items()
    ]
    print_table(rows)
    print(f"a step of the same images: {step[2] / step[1]:.3f} of one process's {step[1]:.3f} s")
    return found


def rank(clock: str, turns: str, *words: str) -> None:
    """Train, and print the seconds of a rank's steps and of the exchanges in each."""
    from detectron2.utils import comm

    from ss_detectron.engine import Trainer, main, train_loop

    now = CLOCKS[clock]
    found: list[dict[str, float]] = []

    def timed(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = function(*args, **kwargs)
            found[-1][name] = found[-1].get(name, 0) + now() - start
            return result

        setattr(owner, name, call)

    class Timed(Trainer):
        def before_step(self) -> None:
            if not found:  # those of the start are not a step's
                # Flags come after the backward pass, at whose end the ranks have waited for each
                # other already: the time is that of the exchange, not of waiting.
                timed(train_loop, "reduce_flags")
                timed(comm, "gather")
            found.append({})
            self.began = now()
            super().before_step()

        def after_step(self) -> None:
            super().after_step()
            found[-1]["step"] = now() - self.began
            comm.synchronize()
            start = now()
            self.gather_rank_states()
            found[-1]["gather_rank_states"] = now() - start

        def after_train(self) -> None:
            if comm.is_main_process():
                print(json.dumps(found[3:]), flush=True)  # the first are slower

    main([*words, "SOLVER.MAX_ITER", str(int(turns) + 3)], trainer=Timed)


MEASURES = {"step": compare_steps, "start": compare_starts, "processes": compare_processes}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=MEASURES)
    add("--turns", type=int, default=20, help="default 20; 2 at least")
    add("--clock", choices=CLOCKS, default="wall")
    add("--threads", type=int, help="torch's CPU threads, of steps")
    add("--json", type=Path, help="a file for all times")
    add("--keys", nargs="+", default=[], metavar="KEY VALUE", help="config keys, for all")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.clock} time")
    with tempfile.TemporaryDirectory() as folder:
        write_json(args.json, MEASURES[args.what](args, folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    elif sys.argv[1:2] == ["rank"]:
        rank(*sys.argv[2:])
    else:
        main()
