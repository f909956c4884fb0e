"""Module names: without what wrappers add, by shell-style patterns, and in groups."""

import fnmatch
import re
from collections.abc import Iterable, Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["as_patterns", "first_match", "grouped", "plain_modules", "without_numbers"]

# What the wrappers of torch and Lightning Fabric call the module in them; "module" is a common
# name besides.
_INNER = {
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_orig_mod",
    "_original_module",
}
_WRAPPERS = (AveragedModel, nn.DataParallel, nn.parallel.DistributedDataParallel)


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``model.named_modules()`` does, under the names that it has without wrappers."""
    modules: dict[str, nn.Module] = {}
    plain: dict[str, str] = {}
    for path, module in model.named_modules():
        parent, _, own = path.rpartition(".")
        inner = own in _INNER or (own == "module" and isinstance(modules[parent], _WRAPPERS))
        modules[path] = module
        plain[path] = ".".join(filter(None, (plain.get(parent), "" if inner else own)))
        yield plain[path], module


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Return one pattern or several, as several."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that matches the name, or that of a module around it, or None."""
    parts = name.split(".")
    parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(module, pattern) for module in parents):
            return pattern
    return None


def without_numbers(name: str) -> str:
    """Return the pattern that the name shares with those that differ in numbers alone."""
    return re.sub(r"\d+", "*", name)


def grouped(names: Iterable[str]) -> list[str]:
    """Return names that differ in their numbers alone as one pattern, with how many they are."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(without_numbers(name), []).append(name)
    return [
        f"{pattern} ({len(group)})" if len(group) > 1 else group[0]
        for pattern, group in groups.items()
    ]
