"""What data sets of all kinds share: where they lie, and how a config names them."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

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
        f"Data sets are looked for in the folder DETECTRON2_DATASETS (now '{datasets_root()}'), "
        f"those of one's own in the current folder '{os.getcwd()}' before that."
    )


def new_entries(cfg: CfgNode, key: str, *attributes: str) -> Iterator[tuple[str, ...]]:
    """Yield name and absolute paths of the entries of ``cfg.DATASETS.<key>`` to be registered.

    Those that are registered with these paths, as ``attributes`` of the metadata, are passed over.
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
        if (known := [known.get(attribute) for attribute in attributes]) != paths:
            raise ValueError(
                f"The name '{name}' in DATASETS.{key} is taken: a data set of that name is "
                f"registered with {known}, the entry asks for {paths}. Choose another name."
            )


def class_names(datasets: Iterable[str]) -> list[str]:
    """
    Return the names of the classes, in the order of their labels: those of the first of these data
    sets that says them, as one of an annotation file does once it has been loaded; else none.
    """
    for name in datasets:
        with suppress(OSError):  # a folder that is not there, where the loader is another's
            if names := MetadataCatalog.get(name).get("thing_classes"):
                return [str(known) for known in names]
    return []


def check_registered(names: Iterable[str]) -> None:
    """Refuse names that no data set has, by a ValueError that names those that are like it."""
    for name in names:
        if name not in DatasetCatalog:
            close = difflib.get_close_matches(name, DatasetCatalog.list())
            hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
            own = ", ".join(f"DATASETS.{key} {form}" for key, form in OWN_DATASETS.items())
            raise ValueError(
                f"No data set named '{name}' is registered. {hint}Lists of your own: {own}."
            )
