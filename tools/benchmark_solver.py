#!/usr/bin/env python
"""
How long a step of this package's SGD takes on ResNet-18's parameters, as a multiple of
torch.optim.SGD(foreach=True), all with momentum and weight decay.

    OMP_NUM_THREADS=1 taskset -c 1 tools/benchmark_solver.py

Stock SGD, a second copy of it (the control) and ours take turns in one process, on copies of the
same parameters; a ratio is that of two steps of the same turn. Where the control's median is not
close to 1, the machine was busy with something else: run it again.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torchvision.models import resnet18

from ss_detectron.benchmark import alternate, ratio
from ss_detectron.solver import SGD

CASES = {
    "none": {},
    "batch Manhattan": {"batch_manhattan": True},
    "no-sign-change": {"no_sign_change": True},
    "both": {"batch_manhattan": True, "no_sign_change": True},
}
SETTINGS = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
WARM_UP = 5


def make_parameters(device: torch.device) -> list[torch.nn.Parameter]:
    """ResNet-18's parameters with gradients, the same at every call."""
    torch.manual_seed(0)
    parameters = list(resnet18().to(device).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 0.01
    return parameters


def step_of(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One step. The learning rate goes up from step to step, as in a warm-up."""

    def step() -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 1.001
        optimizer.step()

    return step


def measure(options: dict, compiled: bool, device: torch.device, repeats: int) -> dict[str, str]:
    """One row of the table."""
    optimizers = {
        "stock": torch.optim.SGD(make_parameters(device), foreach=True, **SETTINGS),
        "control": torch.optim.SGD(make_parameters(device), foreach=True, **SETTINGS),
        "ours": SGD(make_parameters(device), compiled=compiled, **SETTINGS, **options),
    }
    begin = time.perf_counter()
    for _ in range(2):  # the first step starts the momentum, the second one is compiled
        optimizers["ours"].step()
    compilation = time.perf_counter() - begin
    steps = {name: step_of(optimizer) for name, optimizer in optimizers.items()}
    seconds = alternate(steps, repeats, warm_up=WARM_UP, device=device)
    ours = ratio(seconds["ours"], seconds["stock"])
    return {
        "ours / stock": f"{ours.median:.2f}",
        "quartiles": f"{ours.low:.2f} - {ours.high:.2f}",
        "control": f"{ratio(seconds['control'], seconds['stock']).median:.2f}",
        "ours, ms": f"{1e3 * statistics.median(seconds['ours']):.1f}",
        "stock, ms": f"{1e3 * statistics.median(seconds['stock']):.1f}",
        "first two steps, s": f"{compilation:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40, help="pairs of steps (default 40)")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads (default 1)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default, help=f"default {default}")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats: a median and quartiles need 2 at least")
    torch.set_num_threads(args.threads)

    count = sum(p.numel() for p in resnet18().parameters())
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}, {args.threads} threads; {count:,} parameters;")
    print(f"medians of {args.repeats} turns. The control is stock SGD / stock SGD.\n")
    rows = []
    for compiled in (False, True):
        for case, options in CASES.items():
            row = measure(options, compiled, args.device, args.repeats)
            rows.append({"options": case, "compiled": "yes" if compiled else "no", **row})
    print(tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
