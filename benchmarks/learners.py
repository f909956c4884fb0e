#!/usr/bin/env python
"""
What learners cost: time of a training step (forward, backward, optimiser) on Bartunov et al.'s
networks for MNIST, as a multiple of backpropagation's on the same network.

    benchmarks/learners.py --threads 1

Backpropagation, a second copy of it (the control), and the learners take turns. A step of the
alternating schedule is one of the inverses and one of the model.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import CONTROL, STOCK, interleave, print_table, ratio
from torch import Tensor, nn

from ss_detectron import LocallyConnected2d
from ss_detectron.learners import LEARNER_REGISTRY, Learner

CASES = {  # learner, its options, steps that are one
    STOCK: ("bp", {}, 1),
    CONTROL: ("bp", {}, 1),
    "dfa": ("dfa", {}, 1),
    "dtp, parallel": ("dtp", {}, 1),
    "dtp, alternating": ("dtp", {"schedule": "alternating", "period": 1}, 2),
    "sdtp, parallel": ("sdtp", {}, 1),
    "aosdtp, parallel": ("aosdtp", {}, 1),
}
MOST = {  # time / backpropagation's
    "fc": {"dfa": 0.88, "dtp, parallel": 2.4, "dtp, alternating": 2.8},
    "lc": {"dfa": 0.78, "dtp, parallel": 2.7},
}


def fc() -> nn.Sequential:
    blocks: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, 256, 256, 256, 256):
        blocks += [nn.Linear(inputs, 256), nn.Tanh()]
    return nn.Sequential(*blocks, nn.Linear(256, 10))


def lc() -> nn.Sequential:
    layers = [LocallyConnected2d(1, 32, 3, 28, 2, "same"), nn.Tanh()]
    layers += [LocallyConnected2d(32, 64, 3, 14, 2, "same"), nn.Tanh()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(3136, 1024), nn.Tanh(), nn.Linear(1024, 10)
    )


def step(
    learner: Learner, x: Tensor, y: Tensor, count: int, fused: bool = False
) -> Callable[[], None]:
    optimizer = torch.optim.Adam(learner.parameter_groups(), lr=1e-4, fused=fused)

    def run() -> None:
        for _ in range(count):
            optimizer.zero_grad()
            learner.backward(F.cross_entropy(learner(x), y), target=y)
            optimizer.step()
            learner.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", nargs="+", default=["fc", "lc"], choices=["fc", "lc"])
    add("--batch", type=int, default=128)
    add("--turns", type=int, default=40, help="default 40; 2 at least")
    add("--threads", type=int, default=1, help="torch's CPU threads (default 1)")
    add("--fused", action="store_true", help="Adam by its fused kernel, as the configs have it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, batch {args.batch}")
    x = torch.rand(args.batch, 1, 28, 28, device=args.device)
    y = torch.arange(args.batch, device=args.device) % 10
    rows = []
    for network in args.networks:
        steps = {}
        for name, (learner, options, count) in CASES.items():
            model = {"fc": fc, "lc": lc}[network]().to(args.device)
            made = LEARNER_REGISTRY.get(learner)(model, **options).to(args.device)
            steps[name] = step(made, x, y, count, args.fused)
        seconds = interleave(steps, args.turns, device=args.device)
        for name, times in seconds.items():
            spread = ratio(times, seconds[STOCK])
            most = MOST[network].get(name)
            held = "holds" if most and spread.median <= most else "DOES NOT HOLD"
            rows.append(
                {
                    "network": network,
                    "learner": "bp" if name == STOCK else name,
                    "time / bp": f"{spread.median:.3f}",
                    "quartiles": f"{spread.low:.3f} - {spread.high:.3f}",
                    "ms": f"{1e3 * statistics.median(times):.2f}",
                    "promise": f"<= {most} {held}" if most else "",
                }
            )
    print_table(rows)


if __name__ == "__main__":
    main()
