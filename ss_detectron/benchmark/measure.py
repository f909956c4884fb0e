"""The cost of the rules in multiples of stock backpropagation's: time and memory of a step."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ss_detectron.layers import get_rule

from .contestants import BIOTORCH_MODES, Case, Contestant
from .memory import peak_bytes, state_bytes
from .timing import alternate, is_noisy, ratio

__all__ = ["CONTROL", "STOCK", "first_steps", "measure", "operation_times"]

STOCK, CONTROL = "stock", "control"


def measure(
    case: Case,
    rules: Sequence[str],
    *,
    pairs: int = 30,
    warm_up: int = 3,
    repeats: int = 1,
    biotorch: bool = False,
) -> dict[str, Any]:
    """
    Times the training step of ``rules`` against stock backpropagation's, all in turns, and the
    memory that each takes.

    Args:
        case: the network and how it is computed.
        rules: names or short names.
        pairs: turns that are timed, after ``warm_up`` others.
        repeats: steps in a row in one turn.
        biotorch: whether BioTorch's layers take part, for those of ``rules`` that it has.

    Returns:
        what json can write: the case; ``noisy``, whether the control says that the times are of no
        use; ``stock`` with its time and memory; ``rows``, one of each contestant, with the
        :class:`Ratio` of its time to stock's, and the bytes that it takes beyond stock, of state
        and at the peak of a step; ``seconds`` of all steps. A row of BioTorch's has the ratio to
        the rule here as well.

    Raises:
        RuntimeError: a loss is not finite, or not stock's.
    """
    rules = [get_rule(rule) for rule in rules]
    learns_by = {STOCK: "bp", CONTROL: "bp"} | {r.short_name or r.name: r.name for r in rules}
    ours = {}
    if biotorch:
        ours = {f"biotorch {BIOTORCH_MODES[r]}": r for r in learns_by if r in BIOTORCH_MODES}
    contestants = {
        name: Contestant(case, rule)
        for name, rule in {**learns_by, **{name: name for name in ours}}.items()
    }
    for name in (STOCK, CONTROL):
        if contestants[name].converted:
            raise RuntimeError(f"{name} has asymmetric layers: {contestants[name].converted[0]}")
    first = first_steps(contestants)

    seconds = alternate(
        {name: contestant.step for name, contestant in contestants.items()},
        pairs,
        warm_up=warm_up,
        repeats=repeats,
        device=case.device,
    )
    memory = {name: _memory(contestant) for name, contestant in contestants.items()}
    stock = seconds[STOCK]
    rows = []
    for name, contestant in contestants.items():
        row = {
            "name": name,
            "ratio": ratio(seconds[name], stock)._asdict(),
            "seconds": statistics.median(seconds[name]),
            "first_step_seconds": first[name],
            **memory[name],
            "state_beyond_stock": memory[name]["state"] - memory[STOCK]["state"],
            "peak_beyond_stock": memory[name]["peak"] - memory[STOCK]["peak"],
            "converted": sum(_bytes(m.weight) for m in contestant.converted),
            "largest_converted": max((_bytes(m.weight) for m in contestant.converted), default=0),
        }
        if name in ours:
            row["ratio_to_ours"] = ratio(seconds[name], seconds[ours[name]])._asdict()
        rows.append(row)
    return {
        "case": case._asdict(),
        "pairs": pairs,
        "repeats": repeats,
        "noisy": is_noisy(ratio(seconds[CONTROL], stock)),
        "rows": rows,
        "seconds": seconds,
    }


def first_steps(contestants: Mapping[str, Contestant]) -> dict[str, float]:
    """
    The seconds of each one's first step, in which compilation takes place.

    Raises:
        RuntimeError: a loss is not finite, or not stock's.
    """
    seconds, losses = {}, {}
    for name, contestant in contestants.items():
        start = time.perf_counter()
        losses[name] = contestant.step().item()
        seconds[name] = time.perf_counter() - start
    for name, loss in losses.items():
        # bfloat16 has 8 bits, and a compiler may order sums otherwise.
        if not abs(loss - losses[STOCK]) <= 0.02 * abs(losses[STOCK]):
            raise RuntimeError(
                f"{name} computes the loss {loss}, stock {losses[STOCK]}: they are not the same "
                "network on the same batch, or the loss is not finite"
            )
    return seconds


def _memory(contestant: Contestant) -> dict[str, int]:
    """
    Bytes: "state" after a step (parameters, buffers, gradients, the optimiser's state), and "peak",
    the most that there is at once in a step, state included.
    """
    peak = peak_bytes(contestant.step, contestant.device)
    state = state_bytes(contestant.model, contestant.optimizer)
    return {"state": state, "peak": state + peak}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def operation_times(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: str | torch.device = "cpu"
) -> dict[str, dict[str, float]]:
    """
    Where the time of ``steps`` goes, by torch's profiler: on a GPU the time of its kernels, by the
    operation that starts them. The steps take turns.

    Returns:
        name -> operation -> milliseconds per step spent in it, not in operations that it calls; the
        median of the ``repeats``.
    """
    on_gpu = torch.device(device).type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    spent = {name: defaultdict(list) for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            with torch.profiler.profile(activities=activities) as profiler:
                step()
                if on_gpu:
                    torch.cuda.synchronize()
            for event in profiler.key_averages():
                if event.device_type != torch.autograd.DeviceType.CPU:
                    continue  # a kernel, which counts for its operation
                microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                spent[name][event.key].append(microseconds / 1e3)
    return {
        name: {key: statistics.median(times) for key, times in operations.items()}
        for name, operations in spent.items()
    }
