"""CIFAR-10 from its original archive."""

from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from iopath.common.file_io import file_lock
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from .catalog import datasets_root

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def read_cifar10(train: bool, *, download: bool = False) -> CIFAR10:
    """Read CIFAR-10 from ``cifar10`` below ``DETECTRON2_DATASETS``.

    Where the unpacked archive is not there, torchvision unpacks the archive that is, or may
    ``download`` it. Of several processes one does so, the others wait. Its files are pickles, which
    torchvision reads only if their checksums are those of the original.
    """
    folder = Path(datasets_root()) / "cifar10"
    with suppress(RuntimeError):  # torchvision's, where files are missing or damaged
        return CIFAR10(folder, train)
    by_hand = (
        f"put '{CIFAR10.filename}' of {CIFAR10.url}, or its folder '{CIFAR10.base_folder}', there, "
        "or set DETECTRON2_DATASETS to the folder that holds 'cifar10'"
    )
    packed = check_integrity(folder / CIFAR10.filename, CIFAR10.tgz_md5)
    if not packed and not download:
        raise FileNotFoundError(
            f"CIFAR-10 is not in '{folder}': set DATASETS.DOWNLOAD True (170 MB), or {by_hand}."
        )
    try:
        with file_lock(str(folder)):
            return CIFAR10(folder, train, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise FileNotFoundError(
            f"CIFAR-10 is not in '{folder}', and fetching it failed ({error}): {by_hand}."
        ) from error


class CIFAR10Metadata(Metadata):
    """Metadata of a data set whose files have to be fetched or unpacked before its first use."""

    def prepare(self, cfg: CfgNode) -> None:
        """Have the files there; download them only if DATASETS.DOWNLOAD says so."""
        read_cifar10(train=False, download=cfg.DATASETS.DOWNLOAD)


def _load(split: str) -> list[dict]:
    dataset = read_cifar10(split == "train")
    return [
        {"file_name": f"cifar10/{split}/{i}", "image_id": i, "label": label, "image": image}
        for i, (image, label) in enumerate(zip(dataset.data, dataset.targets, strict=True))
    ]


def register_cifar10() -> None:
    """Register ``cifar10_train`` and ``cifar10_test``, whose images are arrays; nothing is fetched.

    "image" of their dataset dicts is a (32, 32, 3) uint8 RGB array.
    """
    for split in ("train", "test"):
        name = f"cifar10_{split}"
        DatasetCatalog.register(name, partial(_load, split))
        MetadataCatalog[name] = CIFAR10Metadata(
            name=name, evaluator_type="classification", thing_classes=list(CIFAR10_CLASSES)
        )
