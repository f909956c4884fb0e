"""Data sets that are arrays in their original files: MNIST, Fashion-MNIST and CIFAR-10."""

from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from iopath.common.file_io import file_lock
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST
from torchvision.datasets.utils import check_integrity

from .catalog import datasets_root

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class _Source(NamedTuple):
    """Where torchvision's reader finds a data set."""

    title: str
    reader: type
    classes: tuple[str, ...]
    root: str
    """What the reader takes, below DETECTRON2_DATASETS."""
    archives_in: str
    """Below the root; unpacked, they are in ``unpacked``."""
    unpacked: str
    archives: list[tuple[str, str | None]]
    """Name and checksum of each."""
    url: str
    size: str


def _source(name: str) -> _Source:
    if name == "cifar10":
        archives = [(CIFAR10.filename, CIFAR10.tgz_md5)]
        where = "cifar10", ".", CIFAR10.base_folder
        return _Source(
            "CIFAR-10", CIFAR10, CIFAR10_CLASSES, *where, archives, CIFAR10.url, "170 MB"
        )
    title, reader, classes, size = {
        "mnist": ("MNIST", MNIST, tuple("0123456789"), "11 MB"),
        "fashion_mnist": ("Fashion-MNIST", FashionMNIST, tuple(FashionMNIST.classes), "31 MB"),
    }[name]
    where = ".", f"{reader.__name__}/raw", f"{reader.__name__}/raw"
    return _Source(title, reader, classes, *where, reader.resources, reader.mirrors[0], size)


def read_arrays(name: str, train: bool, *, download: bool = False) -> Any:
    """
    Read mnist, fashion_mnist or cifar10 from below ``DETECTRON2_DATASETS``.

    Where the unpacked files are not there, torchvision unpacks the archives that are, or may
    ``download`` them. Of several processes one does so, the others wait. CIFAR-10's files are
    pickles, which torchvision reads only if their checksums are those of the original.

    Returns:
        torchvision's data set.

    Raises:
        FileNotFoundError: it is not there; says what to do.
    """
    source = _source(name)
    root = Path(datasets_root()) / source.root
    with suppress(RuntimeError):  # torchvision's, where files are missing or damaged
        return source.reader(root, train)
    folder, title = root / source.archives_in, source.title
    files = ", ".join(f"'{file}'" for file, _ in source.archives)
    by_hand = (
        f"put {files} of {source.url}, or what is in them ('{source.unpacked}'), there, or set "
        f"DETECTRON2_DATASETS to the folder that holds '{Path(source.root) / source.archives_in}'"
    )
    packed = all(check_integrity(folder / file, md5) for file, md5 in source.archives)
    if not packed and not download:
        raise FileNotFoundError(
            f"{title} is not in '{folder}': set DATASETS.DOWNLOAD True ({source.size}), or "
            f"{by_hand}."
        )
    try:
        with file_lock(str(folder)):
            return source.reader(root, train, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise FileNotFoundError(
            f"{title} is not in '{folder}', and fetching it failed ({error}): {by_hand}."
        ) from error


class ArrayMetadata(Metadata):
    """Metadata of a data set whose files have to be fetched or unpacked before its first use."""

    def prepare(self, cfg: CfgNode) -> None:
        """Have the files there; download them only if DATASETS.DOWNLOAD says so."""
        read_arrays(self.source, train=False, download=cfg.DATASETS.DOWNLOAD)


def _load(name: str, split: str) -> list[dict]:
    stored = "test" if split == "test" else "train"
    dataset = read_arrays(name, stored == "train")
    images = zip(np.asarray(dataset.data), dataset.targets, strict=True)
    records = [
        {"file_name": f"{name}/{stored}/{i}", "image_id": i, "label": int(label), "image": image}
        for i, (image, label) in enumerate(images)
    ]
    fit = len(records) - len(records) // (10 if name == "cifar10" else 6)
    return {"fit": records[:fit], "val": records[fit:]}.get(split, records)


def register_arrays() -> None:
    """
    Register ``{mnist,fashion_mnist,cifar10}_{train,test,fit,val}``; nothing is fetched.

    val is the last 10,000 images of train, of CIFAR-10 the last 5,000, and fit is the others: for
    choices, such as that of a learning rate, that must not be made on test.

    "image" of their dataset dicts is a uint8 array, (32, 32, 3) in RGB for CIFAR-10 and (28, 28)
    for the others.
    """
    for source in ("mnist", "fashion_mnist", "cifar10"):
        for split in ("train", "test", "fit", "val"):
            name = f"{source}_{split}"
            DatasetCatalog.register(name, partial(_load, source, split))
            MetadataCatalog[name] = ArrayMetadata(
                name=name,
                source=source,
                evaluator_type="classification",
                thing_classes=list(_source(source).classes),
            )
