"""The random numbers of a process: kept, restored, and begun anew for one sample."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["get_random_state", "kept_random_state", "seed_all", "seeded", "set_random_state"]


def get_random_state(device: torch.device | None = None) -> dict[str, Any]:
    """
    Return the states of torch's, NumPy's and Python's generators, and of ``device`` if it is a GPU.

    They are tensors, numbers and strings, which torch.load reads with weights_only.
    """
    kind, keys, *position = np.random.get_state()
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.tensor(keys.astype(np.int64)), *position],
        "python": [version, torch.tensor(words), gauss],
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Put back what :func:`get_random_state` returned of ``device``."""
    torch.set_rng_state(state["torch"])
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def kept_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Leave the generators as they were, whatever draws random numbers within."""
    state = get_random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def seed_all(*seed: int) -> None:
    """Seed torch's generator (on the CPU), NumPy's and Python's."""
    words = np.random.SeedSequence(seed).generate_state(5).tolist()
    # Not torch.manual_seed, which seeds the GPUs as well.
    torch.default_generator.manual_seed(words[0] << 32 | words[1])
    np.random.seed(words[2])
    random.seed(words[3] << 32 | words[4])


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Call :func:`seed_all`, for a moment."""
    with kept_random_state():
        seed_all(*seed)
        yield
