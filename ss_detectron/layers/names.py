"""Shell-style patterns of module names."""

import fnmatch
from collections.abc import Iterable

__all__ = ["as_patterns", "first_match"]


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
