"""Which files may run code or be downloaded: those that MODEL.TRUSTED_WEIGHTS names, no others."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePath
from urllib.parse import urlparse

from ss_detectron.layers.names import as_patterns

__all__ = [
    "check_download",
    "check_pickle",
    "is_trusted",
    "is_url",
    "needs_pickle",
    "pickle_refusal",
]


def is_url(path: str) -> bool:
    """Whether a file is elsewhere: https://, Detectron2's own detectron2:// and others."""
    return "://" in path


def needs_pickle(path: str) -> bool:
    """Whether Detectron2 unpickles files of that name: the model zoo's .pkl and pycls' .pyth."""
    return _without_query(path).endswith((".pkl", ".pyth"))


def is_trusted(path: str, trusted: str | Iterable[str]) -> bool:
    """
    Whether a pattern names this file.

    Args:
        path: of a file, or its URL; a query (``?matching_heuristics=True``) does not count.
        trusted: paths and URLs, shell-style: ``*`` stands for anything between two slashes.
    """
    parts = _parts(_without_query(path))
    for pattern in map(_parts, as_patterns(trusted)):
        if parts == pattern:
            return True
        if len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)):
            return True
    return False


def check_download(path: str, trusted: str | Iterable[str], key: str = "MODEL.WEIGHTS") -> None:
    """Raises ValueError if ``path``, the value of a config key, is a URL that is not trusted."""
    if is_url(path) and not is_trusted(path, trusted):
        raise ValueError(
            f"{key} is {path}, which would be downloaded, and MODEL.TRUSTED_WEIGHTS does not name "
            f"it: {_remedy(path)}, or give a local file"
        )


def check_pickle(path: str, trusted: str | Iterable[str], why: str = "") -> None:
    """Raises ValueError (:func:`pickle_refusal`) unless ``path`` is trusted."""
    if not is_trusted(path, trusted):
        raise ValueError(pickle_refusal(path, why))


def pickle_refusal(path: str, why: str = "") -> str:
    """
    What to say of a file that is not unpickled.

    Args:
        path: of the file, or its URL.
        why: it has to be unpickled, if its name does not tell.
    """
    return (
        f"{path} has to be unpickled{f' ({why})' * bool(why)}, which runs the code in it, and "
        f"MODEL.TRUSTED_WEIGHTS does not name it: if you trust who made it, {_remedy(path)}"
    )


def _remedy(path: str) -> str:
    return f"set MODEL.TRUSTED_WEIGHTS \"['{_without_query(path)}']\""


def _without_query(path: str) -> str:
    return urlparse(path)._replace(query="").geturl()  # as Detectron2 does


def _parts(path: str) -> tuple[str, ...]:
    if is_url(path):
        return tuple(path.split("/"))
    return PurePath(os.path.abspath(os.path.expanduser(path))).parts
