"""What the benchmarks share: steps that take turns, and the ratios of their times.

torch.utils.benchmark times one statement after the other. On a machine that is not quiet, only
steps that take turns can be compared to a per cent.
"""

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

STOCK, CONTROL = "stock", "control"
"""What the others are compared with, and a second copy of it."""

NOISE = 1.02
"""How far from 1 the median of the control's ratios may be, as a factor."""


class Ratio(NamedTuple):
    """The distribution of the ratios of paired times: median, first and third quartile."""

    median: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether this ratio, where it is the control's, says that a run is of no use."""
        return not 1 / NOISE <= self.median <= NOISE


def interleave(
    steps: Mapping[str, Callable[[], Any]],
    turns: int,
    *,
    warm_up: int = 3,
    repeats: int = 1,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time steps that take turns in one process, in an order that is shuffled in every turn.

    What else happens on the machine falls on all of them alike.

    Args:
        steps: by name.
        turns: that are timed, after ``warm_up`` that are not.
        repeats: how many times in a row a step runs in its turn. More than one hides what a GPU
            waits for between steps, as training does.
        device: which is waited for before and after a turn.
        clock: seconds.

    Returns:
        name -> seconds of one step, in every turn.
    """
    synchronize = getattr(torch, torch.device(device).type).synchronize
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-warm_up, turns):
        for name in order.sample(list(steps), len(steps)):
            synchronize()
            start = clock()
            for _ in range(repeats):
                steps[name]()
            synchronize()
            if turn >= 0:
                seconds[name].append((clock() - start) / repeats)
    return seconds


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Return ``times`` as multiples of ``reference``, turn by turn (two turns at least)."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def median_interval(times: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Return where the median of the ratios lies with 95 % confidence, whatever they are spread
    like: between two of them, about sqrt(n) ranks from the middle (two turns at least)."""
    ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
    beside = max(0, math.floor((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2))
    return ratios[beside], ratios[-1 - beside]


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    table = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
    print(f"\n{table}", flush=True)


def compare_sets(
    sizes: Sequence[int],
    rounds: int,
    compare: Callable[[int, int, Path], dict],
    report: Callable[[dict], None],
    file: Path | None,
) -> None:
    """Compare on generated data sets of several sizes, each in a folder of its own, and report."""
    from ss_detectron.experiments.launch import hardware  # others' benchmarks need torch alone

    print(f"{hardware()}; medians of {rounds} rounds")
    results = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            results.append(compare(size, rounds, Path(folder)))
        report(results[-1])
    write_json(file, {"hardware": hardware(), "rounds": rounds, "sets": results})


def write_json(file: Path | None, results: Any) -> None:
    """Write results, if a file is named."""
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
