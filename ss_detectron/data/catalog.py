"""What data sets of all kinds share: where they lie, and how a config names them."""

import difflib
import os
from collections.abc import Iterable, Iterator

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

# The keys of one's own data sets, below DATASETS, and the form of their entries.
OWN_DATASETS = {
    "COCO_INSTANCES": "[name, annotation file, image folder]",
    "IMAGE_FOLDERS": "[name, folder]",
}


def datasets_root() -> str:
    """Return the folder of all data sets, read at every use: tests and notebooks change it."""
    return os.path.abspath(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def locate(path: str) -> str:
    """Make a path absolute, seen from the current folder or else from DETECTRON2_DATASETS."""
    if "://" in path:
        return path
    here = os.path.abspath(os.path.expanduser(path))
    there = os.path.join(datasets_root(), path)
    return there if os.path.exists(there) and not os.path.exists(here) else here


def where_to_put() -> str:
    """Say in a sentence where data sets are looked for."""
    return (
        "Put it there, or set DETECTRON2_DATASETS before the start to the folder that holds the "
        f"known data sets (now '{datasets_root()}'); the paths of one's own are looked for in the "
        f"current folder '{os.getcwd()}', then in that one."
    )


def new_entries(cfg: CfgNode, key: str, *attributes: str) -> Iterator[tuple[str, ...]]:
    """Yield the entries of ``cfg.DATASETS.<key>`` that have to be registered.

    Args:
        cfg: the config.
        key: one of :data:`OWN_DATASETS`.
        attributes: those of the metadata in which the entry's paths are found again. An entry
            that is registered with these paths is passed over.

    Returns:
        for each entry its name, and its paths made absolute.

    Raises:
        ValueError: an entry has another form, or its name belongs to another data set already.
    """
    form = OWN_DATASETS[key]
    for entry in cfg.DATASETS[key]:
        if (
            not isinstance(entry, (list, tuple))
            or len(entry) != 1 + len(attributes)
            or not all(isinstance(part, str) and part for part in entry)
        ):
            raise ValueError(
                f"DATASETS.{key} is a list of {form}, all strings; got the entry {entry!r}."
            )
        name, *paths = entry[0], *map(locate, entry[1:])
        if name not in DatasetCatalog:
            yield name, *paths
            continue
        # as_dict leaves out what is computed on access: nothing is generated for this.
        known = MetadataCatalog.get(name).as_dict()
        known = [known.get(attribute) for attribute in attributes]
        if known != paths:
            where = f"with {known}" if all(known) else "by other means"
            raise ValueError(
                f"The name '{name}' in DATASETS.{key} is taken: a data set of that name is "
                f"registered {where}, the entry asks for {paths}. Choose another name."
            )


def check_registered(names: Iterable[str]) -> None:
    """Refuse names that no data set has.

    Raises:
        ValueError: names those that are like it, and how to register one's own.
    """
    for name in names:
        if name not in DatasetCatalog:
            close = difflib.get_close_matches(name, DatasetCatalog.list())
            hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
            own = ", ".join(f"DATASETS.{key} {form}" for key, form in OWN_DATASETS.items())
            raise ValueError(
                f"No data set named '{name}' is registered. {hint}Lists of your own: {own}."
            )
