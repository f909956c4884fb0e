"""Which files may run code or be downloaded: those that MODEL.TRUSTED_WEIGHTS names, no others."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePath
from urllib.parse import urlparse

from ss_detectron.layers.names import as_patterns

__all__ = ["check_download", "check_pickle", "is_trusted", "is_url", "needs_pickle"]


def is_url(path: str) -> bool:
    """Return whether a file is elsewhere: https://, Detectron2's own detectron2:// and others."""
    return "://" in path


def needs_pickle(path: str) -> bool:
    """Return whether Detectron2 unpickles files of that name: .pkl, and .pyth of pycls."""
    return _without_query(path).endswith((".pkl", ".pyth"))


def is_trusted(path: str, trusted: str | Iterable[str]) -> bool:
    """
    Return whether a pattern names this file.

    Args:
        path: of a file, or its URL; a query (``?matching_heuristics=True``) does not count.
        trusted: paths and URLs, shell-style: ``*`` stands for anything between two slashes.
    """
    parts = _parts(_without_query(path))
    return any(
        parts == pattern or (len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)))
        for pattern in map(_parts, as_patterns(trusted))
    )


def check_download(path: str, trusted: str | Iterable[str], key: str = "MODEL.WEIGHTS") -> None:
    """Raise ValueError if ``path``, the value of a config key, is a URL that is not trusted."""
    if is_url(path):
        _check(path, trusted, f"{key} is {path}, which would be downloaded")


def check_pickle(path: str, trusted: str | Iterable[str], why: str = "") -> None:
    """Raise ValueError if a file, which is to be unpickled, is not trusted; ``why`` is added."""
    because = f" ({why})" if why else ""
    _check(path, trusted, f"{path} has to be unpickled{because}, which runs the code in it")


def _check(path: str, trusted: str | Iterable[str], problem: str) -> None:
    if not is_trusted(path, trusted):
        raise ValueError(
            f"{problem}, and MODEL.TRUSTED_WEIGHTS does not name it: if you trust who made it, set "
            f"MODEL.TRUSTED_WEIGHTS \"['{_without_query(path)}']\""
        )


def _without_query(path: str) -> str:
    return urlparse(path)._replace(query="").geturl()  # as Detectron2 does


def _parts(path: str) -> tuple[str, ...]:
    if is_url(path):
        return tuple(path.split("/"))
    return PurePath(os.path.abspath(os.path.expanduser(path))).parts
