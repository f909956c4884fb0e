#!/usr/bin/env python
"""
How long a step of this package's SGD takes on ResNet-18's parameters, with momentum and weight
decay, as a multiple of torch.optim.SGD(foreach=True).

    OMP_NUM_THREADS=1 taskset -c 1 benchmarks/optimizer.py

Stock SGD, a second copy of it (the control) and ours take turns, on copies of the same parameters.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from timing import CONTROL, STOCK, interleave, print_table, ratio
from torchvision.models import resnet18

from ss_detectron.solver import SGD

CASES = {
    "none": {},
    "batch Manhattan": {"batch_manhattan": True},
    "no-sign-change": {"no_sign_change": True},
    "both": {"batch_manhattan": True, "no_sign_change": True},
}


def stepping(device: str, kind: type, **options: bool) -> Callable[[], None]:
    """Return steps of an optimiser, whose learning rate goes up as in a warm-up."""
    torch.manual_seed(0)
    parameters = list(resnet18().to(device).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 0.01
    optimizer = kind(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4, **options)

    def step() -> None:
        optimizer.param_groups[0]["lr"] *= 1.001
        optimizer.step()

    return step


def measure(options: dict[str, bool], device: str, repeats: int) -> dict[str, str]:
    """Return one row of the table."""
    steps = {
        STOCK: stepping(device, torch.optim.SGD, foreach=True),
        CONTROL: stepping(device, torch.optim.SGD, foreach=True),
        "ours": stepping(device, SGD, **options),
    }
    seconds = interleave(steps, repeats, warm_up=5, device=device)
    ours = ratio(seconds["ours"], seconds[STOCK])
    return {
        "ours / stock": f"{ours.median:.2f}",
        "quartiles": f"{ours.low:.2f} - {ours.high:.2f}",
        "control": f"{ratio(seconds[CONTROL], seconds[STOCK]).median:.2f}",
        "ours, ms": f"{1e3 * statistics.median(seconds['ours']):.1f}",
        "stock, ms": f"{1e3 * statistics.median(seconds[STOCK]):.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40, help="turns (default 40; 2 at least)")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, {args.repeats} turns")
    print_table(
        [
            {"options": case, **measure(options, args.device, args.repeats)}
            for case, options in CASES.items()
        ]
    )


if __name__ == "__main__":
    main()
