"""The memory that training takes: what a model and its optimiser keep, and a step's peak."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["peak_bytes", "state_bytes"]


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parameters, the buffers, the gradients and the optimiser's state."""
    storages = {}
    for tensor in _state(model, optimizer):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def peak_bytes(step: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """
    The most bytes that tensors take at once while ``step`` runs, beyond what they take after it.

    On the CPU, torch counts only while its profiler runs, so that nobody knows the size of what
    was there before: if ``step`` frees it, the levels before that are underestimated.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        step()
    # In the profiler's summaries, memory is that of an operation and has lost its order in time.
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak - level
