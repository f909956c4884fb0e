"""Names in messages: not too many, and none that a log in UTF-8 cannot hold."""

from collections.abc import Iterable

__all__ = ["abbreviate", "printable"]


def abbreviate(names: Iterable[str], count: int = 3) -> str:
    """Join the first of ``names``, with dots if there are more."""
    names = list(names)
    return printable(", ".join(names[:count]) + ", ..." * (len(names) > count))


def printable(text: str) -> str:
    """Escape what UTF-8 cannot hold: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
