"""What data sets of all kinds share: where they lie, and how a config names them."""

import difflib
import os
from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

# The keys of one's own data sets, below DATASETS, and the form of their entries.
OWN_DATASETS = {
    "COCO_INSTANCES": "[name, annotation file, image folder]",
    "IMAGE_FOLDERS": "[name, folder]",
}


def datasets_root() -> str:
    """The folder of all data sets, read at every use: tests and notebooks change it."""
    return os.path.abspath(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def locate(path: str) -> str:
    """A path seen from the current folder or else from DETECTRON2_DATASETS, made absolute."""
    if "://" in path:
        return path
    here = os.path.abspath(os.path.expanduser(path))
    there = os.path.join(datasets_root(), path)
    return there if os.path.exists(there) and not os.path.exists(here) else here


def own_entries(cfg: CfgNode, key: str) -> list[tuple[str, ...]]:
    """The entries of ``cfg.DATASETS.<key>``: each a name, and paths made absolute.

    Raises:
        ValueError: an entry is not of the form of :data:`OWN_DATASETS`.
    """
    form = OWN_DATASETS[key]
    parts = form.count(",") + 1
    for entry in cfg.DATASETS[key]:
        if (
            not isinstance(entry, (list, tuple))
            or len(entry) != parts
            or not all(isinstance(part, str) and part for part in entry)
        ):
            raise ValueError(
                f"DATASETS.{key} is a list of {form}, {parts} strings each; got the entry "
                f"{entry!r}."
            )
    return [(name, *map(locate, paths)) for name, *paths in cfg.DATASETS[key]]


def refuse_taken(key: str, name: str, known: Iterable[str | None], wanted: Iterable[str]) -> None:
    """Refuse an entry of ``DATASETS.<key>`` whose name another data set has.

    Args:
        known: the paths of the data set that is registered; without them it is not one's own.
        wanted: those that the entry asks for.
    """
    known, wanted = tuple(known), tuple(wanted)
    if known == wanted:
        return
    where = f"with {_quoted(known)}" if all(known) else "by other means"
    raise ValueError(
        f"The name '{name}' in DATASETS.{key} is taken: a data set of that name is registered "
        f"{where}, the entry asks for {_quoted(wanted)}. Choose another name."
    )


def where_to_put(cfg: CfgNode, key: str, name: str) -> str:
    """Where a data set was looked for, and what to do about its absence: a sentence."""
    for entry in cfg.DATASETS.get(key, []):
        if entry[0] == name:
            return (
                f"DATASETS.{key} names {_quoted(entry[1:])}, looked for in the current folder "
                f"'{os.getcwd()}' and in DETECTRON2_DATASETS '{datasets_root()}'."
            )
    return (
        "Put it there, or set DETECTRON2_DATASETS before the start to the folder that holds "
        f"the known data sets (now '{datasets_root()}')."
    )


def used_datasets(cfg: CfgNode, training: bool) -> list[str]:
    """The names in ``DATASETS.TRAIN``, if for training, and ``DATASETS.TEST``, each once."""
    return list(dict.fromkeys([*(cfg.DATASETS.TRAIN if training else ()), *cfg.DATASETS.TEST]))


def check_registered(names: Iterable[str]) -> None:
    """Refuse names that no data set has.

    Raises:
        ValueError: names those that are like it, and how to register one's own.
    """
    for name in names:
        if name not in DatasetCatalog:
            close = difflib.get_close_matches(name, DatasetCatalog.list())
            hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise ValueError(
                f"No data set named '{name}' is registered. {hint}A COCO data set of your own is "
                f"registered by DATASETS.COCO_INSTANCES, a list of "
                f"{OWN_DATASETS['COCO_INSTANCES']}, folders of images for classification by "
                f"DATASETS.IMAGE_FOLDERS, a list of {OWN_DATASETS['IMAGE_FOLDERS']}."
            )


def shorten(names: list[str], length: int = 5) -> str:
    """The first few of a list of names."""
    return printable(", ".join(names[:length]) + ", ..." * (len(names) > length))


def printable(text: str) -> str:
    """A text in which what UTF-8 cannot hold is escaped: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _quoted(paths: Iterable[str | None]) -> str:
    return " and ".join(f"'{path}'" for path in paths)
