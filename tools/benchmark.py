#!/usr/bin/env python
"""
What the rules cost: time and memory of a training step (forward, backward, optimiser) as
multiples of stock backpropagation's.

    tools/benchmark.py --quick                     a first look, under two minutes on two cores
    tools/benchmark.py --promise --retry 2         what the README promises; a quarter of an hour
    tools/benchmark.py --networks resnet50 retinanet_r18 --modes float32 bf16+channels_last
    tools/benchmark.py --networks torchvision_resnet18 --biotorch --batch 8 --size 128
    tools/benchmark.py --profile brsf              where the time goes, operation by operation

The networks are those of the shipped configs. Stock backpropagation, a second copy of it (the
control) and the rules take turns in one process, in an order that is shuffled in every turn; a
ratio is that of two steps of the same turn. Where the control's median is beyond 1.02, the machine
was busy with something else: the row is marked noisy and counts for nothing; repeat it.

Memory is what stock does not take: "state" that is there between steps (parameters, buffers,
gradients, the optimiser's), "peak" all that is there at once in a step.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

# torch's profiler, which counts the CPU's memory, talks.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from tabulate import tabulate

from ss_detectron import FEEDBACK_REGISTRY
from ss_detectron.benchmark import (
    MODES,
    NETWORKS,
    STOCK,
    Case,
    Contestant,
    measure,
    operation_times,
)
from ss_detectron.experiments import hardware
from ss_detectron.layers import get_rule

RULES = [rule.short_name for _, rule in FEEDBACK_REGISTRY if rule.short_name != "bp"]
LIMITS = {"ss": 1.02, "fa": 1.02, "frsf": 1.05, "brsf": 1.05, "kp": 1.05}
INSTALL_BIOTORCH = (
    "pip install ss-detectron[bench], or pip install --no-deps biotorch==0.0.16 to leave out what "
    "it asks for and this comparison does not need"
)
COPIES = {"fa": 1, "kp": 3}  # of the converted weights; ss: one layer's
ROUNDING = 2**16  # bytes, of scalars and of what allocators round up


class Promise(NamedTuple):
    """A case with the limits of the ratios to stock, by rule."""

    network: str
    batch: int
    size: int
    mode: str
    limits: dict[str, float]


PROMISES = [
    Promise("resnet18", 16, 224, "float32", LIMITS),
    Promise("retinanet_r18", 2, 320, "float32", LIMITS),
    Promise("resnet18", 8, 128, "float32", {k: v + 0.02 for k, v in LIMITS.items()}),
    Promise("resnet18", 16, 224, "compile", dict.fromkeys(LIMITS, 1.05)),
]
# Of BioTorch's time to ours, by batch and size.
AGAINST_BIOTORCH = {
    (16, 224): dict.fromkeys(("usf", "frsf", "brsf", "fa"), 1.0),
    (8, 128): {"usf": 1.04, "frsf": 1.0, "brsf": 1.2, "fa": 1.0},
}


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{hardware()}; {torch.get_num_threads()} threads", flush=True)
    if args.profile:
        for case in cases(args):
            print_profile(case, args.profile, args.pairs)
        return

    plan = [(case, args.rules, args.biotorch, None) for case in cases(args)]
    if args.promise:
        plan = promised(args)
    found = []
    for case, rules, biotorch, limits in plan:
        measured = retried(case, rules, biotorch, args)
        found.append({**measured, "limits": limits})
        print(f"\n{heading(measured, case)}\n\n{table(found[-1])}", flush=True)
        if args.json:
            result = {
                "hardware": hardware(),
                "threads": torch.get_num_threads(),
                "measurements": found,
            }
            args.json.write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        default=["resnet18"],
        choices=NETWORKS,
        metavar="NETWORK",
        help=f"of {', '.join(NETWORKS)} (default: resnet18)",
    )
    parser.add_argument("--rules", nargs="+", default=RULES, help=f"default: {' '.join(RULES)}")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["float32"],
        help=f"of {', '.join(MODES)}, or several at once as in bf16+compile (default: float32)",
    )
    parser.add_argument("--batch", type=int, help="default: 16 for classifiers, 2 for RetinaNet")
    parser.add_argument("--size", type=int, help="pixels; default: 224 for classifiers, else 320")
    parser.add_argument("--scale", default="mean_abs", help="of the feedback (default: mean_abs)")
    parser.add_argument("--pairs", type=int, default=30, help="turns (default: 30)")
    parser.add_argument("--steps", type=int, default=1, help="steps in one turn (default: 1)")
    parser.add_argument("--warm-up", type=int, default=3, help="turns before (default: 3)")
    parser.add_argument(
        "--retry", type=int, default=0, help="times a noisy measurement is repeated"
    )
    parser.add_argument("--threads", type=int, help="torch's CPU threads (default: torch's own)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default: {default}")
    parser.add_argument("--biotorch", action="store_true", help="BioTorch's layers take part")
    parser.add_argument("--json", type=Path, help="writes all figures into this file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="ResNet-18, batch 8 at 128, 20 pairs")
    what.add_argument("--promise", action="store_true", help="the promised cases, with limits")
    what.add_argument(
        "--profile", metavar="RULE", help="time per operation, this rule's and stock's"
    )
    args = parser.parse_args()
    if args.quick:
        args.networks, args.rules, args.modes = ["resnet18"], list(LIMITS), ["float32"]
        args.batch, args.size, args.pairs = 8, 128, 20
    if args.pairs < 2:
        parser.error("--pairs: a median and quartiles need 2 at least")
    if args.biotorch and not args.promise:
        args.networks = ["torchvision_resnet18"]
    if args.biotorch and importlib.util.find_spec("biotorch") is None:
        parser.error(f"--biotorch: BioTorch is not there; {INSTALL_BIOTORCH}")
    try:
        for case in cases(args):
            case.check()
        for rule in [*args.rules, args.profile or "bp"]:
            get_rule(rule)
    except ValueError as error:
        parser.error(str(error))
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    return [
        Case(
            name,
            args.batch or NETWORKS[name].batch,
            args.size or NETWORKS[name].size,
            mode,
            args.device,
            args.scale,
        )
        for name in args.networks
        for mode in args.modes
    ]


def promised(args: argparse.Namespace) -> list[tuple]:
    """What --promise measures: case, rules, whether with BioTorch, limits."""
    plan = []
    for network, batch, size, mode, limits in PROMISES:
        case = Case(network, batch, size, mode, args.device, args.scale)
        plan.append((case, list(limits), False, limits))
    if args.biotorch:
        for (batch, size), least in AGAINST_BIOTORCH.items():
            case = Case("torchvision_resnet18", batch, size, "float32", args.device, args.scale)
            limits = {f"biotorch {mode}": value for mode, value in least.items()}
            plan.append((case, ["ss", "frsf", "brsf", "fa"], True, limits))
    return plan


def retried(case: Case, rules: list[str], biotorch: bool, args: argparse.Namespace) -> dict:
    """A measurement, repeated while it is noisy."""
    for remaining in reversed(range(args.retry + 1)):
        measured = measure(
            case,
            rules,
            pairs=args.pairs,
            warm_up=args.warm_up,
            repeats=args.steps,
            biotorch=biotorch,
        )
        if not measured["noisy"]:
            break
        again = "repeating it" if remaining else "repeat it (--retry N)"
        print(f"{case}: noisy, {again}", file=sys.stderr, flush=True)
    return measured


def heading(measured: dict[str, Any], case: Case) -> str:
    noisy = "   NOISY: counts for nothing, repeat it" if measured["noisy"] else ""
    return f"{case}; {measured['pairs']} pairs{noisy}"


def table(measured: dict[str, Any]) -> str:
    rows = []
    for row in measured["rows"]:
        spread = row["ratio"]
        shown = {
            "rule": row["name"],
            "time / stock": f"{spread['median']:.3f}",
            "quartiles": f"{spread['low']:.3f} - {spread['high']:.3f}",
            "95 %": f"{spread['least']:.3f} - {spread['most']:.3f}",
            "ms": f"{1e3 * row['seconds']:.1f}",
            "first step, s": f"{row['first_step_seconds']:.1f}",
            "state, MiB": f"{row['state_beyond_stock'] / 2**20:+.1f}",
            "peak, MiB": f"{row['peak_beyond_stock'] / 2**20:+.1f}",
        }
        if any("ratio_to_ours" in r for r in measured["rows"]):
            to_ours = row.get("ratio_to_ours", {}).get("median")
            shown["time / ours"] = "" if to_ours is None else f"{to_ours:.3f}"
        if measured["limits"]:
            shown["promise"] = verdict(row, measured)
        rows.append(shown)
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def verdict(row: dict[str, Any], measured: dict[str, Any]) -> str:
    """Whether a row keeps what is promised of it; nothing if nothing is."""
    limit = measured["limits"].get(row["name"])
    if limit is None:
        return ""
    if "ratio_to_ours" in row:
        held, said = row["ratio_to_ours"]["median"] >= limit, f"/ ours >= {limit:.2f}"
    else:
        held, said = row["ratio"]["median"] <= limit, f"<= {limit:.2f}"
    said += " holds" if held else " DOES NOT HOLD"
    if measured["noisy"]:
        said += " (noisy)"
    most = memory_limit(row)
    if most is not None:
        held = max(row["peak_beyond_stock"], row["state_beyond_stock"]) <= most + ROUNDING
        said += f"; <= {most / 2**20:.1f} MiB " + ("holds" if held else "DOES NOT HOLD")
    return said


def memory_limit(row: dict[str, Any]) -> int | None:
    """Bytes beyond stock that are promised; None if nothing is."""
    if row["name"] == "ss":
        return row["largest_converted"]
    return row["converted"] * COPIES[row["name"]] if row["name"] in COPIES else None


def print_profile(case: Case, rule: str, repeats: int) -> None:
    contestants = {name: Contestant(case, r) for name, r in ((STOCK, "bp"), (rule, rule))}
    for contestant in contestants.values():
        for _ in range(3):
            contestant.step()
    steps = {name: contestant.step for name, contestant in contestants.items()}
    times = operation_times(steps, repeats, case.device)
    stock, ours = times[STOCK], times[rule]
    difference = {op: ours.get(op, 0.0) - stock.get(op, 0.0) for op in {**stock, **ours}}
    largest = sorted(difference, key=lambda op: -abs(difference[op]))[:15]
    rows = [(op, stock.get(op, 0.0), ours.get(op, 0.0), difference[op]) for op in largest]
    rows.append(("all", sum(stock.values()), sum(ours.values()), sum(difference.values())))
    print(f"\n{case}: milliseconds per step and operation, median of {repeats}, profiled\n")
    print(tabulate(rows, ("operation", STOCK, rule, "difference"), "pipe", floatfmt=".2f"))


if __name__ == "__main__":
    main()
