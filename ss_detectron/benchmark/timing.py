"""Times of several steps compared with each other on a machine that is not quiet."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Ratio", "alternate", "is_noisy", "ratio"]

NOISE = 1.02
"""How far from 1 the control's median may be, as a factor."""


class Ratio(NamedTuple):
    """The distribution of the ratios of pairs of times."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""
    least: float
    """With ``most``, a 95 % confidence interval of the median."""
    most: float


def alternate(
    steps: Mapping[str, Callable[[], Any]],
    turns: int,
    *,
    warm_up: int = 3,
    repeats: int = 1,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, list[float]]:
    """
    The times of ``steps`` that take turns in one process: in every turn each of them runs, in an
    order that is shuffled anew, so that what else happens on the machine falls on all alike.

    Args:
        steps: by name.
        turns: that are timed, after ``warm_up`` that are not.
        repeats: how many times in a row a step runs in its turn. More than one hides what a GPU
            waits for between steps, as training does.
        device: which is waited for before and after a turn.
        seed: of the order.

    Returns:
        name -> seconds of one step, in every turn.
    """
    synchronize = getattr(torch, torch.device(device).type).synchronize
    shuffler = random.Random(seed)
    seconds = {name: [] for name in steps}
    for turn in range(-warm_up, turns):
        for name in shuffler.sample(list(steps), len(steps)):
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            synchronize()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """
    ``times`` as multiples of ``reference``, turn by turn.

    Raises:
        ValueError: there are fewer than two turns, or not as many of both.
    """
    ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
    if len(ratios) < 2:
        raise ValueError(f"a median and quartiles need 2 turns at least, got {len(ratios)}")
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    outside = _order(len(ratios))
    return Ratio(median, low, high, ratios[outside], ratios[-1 - outside])


def is_noisy(control: Ratio) -> bool:
    """Whether the ratio of a second copy of the reference to it says that a run is of no use."""
    return not 1 / NOISE <= control.median <= NOISE


def _order(count: int, confidence: float = 0.95) -> int:
    """
    How many of ``count`` sorted values may be left out at either end so that the others still span
    the median of what they were drawn from with ``confidence`` (a sign test); 0 where too few
    values reach it.
    """
    tail, outside = 0.0, 0
    while True:
        tail += math.comb(count, outside) / 2**count
        if tail > (1 - confidence) / 2:
            return max(outside - 1, 0)
        outside += 1
