"""Training batches that follow from the seed and their number, so that a run can be resumed."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from detectron2.data import DatasetFromList
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from ss_detectron.utils.random_state import kept_random_state, seed_all

from .images import UnreadableImageError

__all__ = ["ImageDataset", "TrainingLoader"]

logger = logging.getLogger(__name__)

# So many unreadable images in a row say that more is wrong than single files.
MAX_UNREADABLE = 100


class ImageDataset(Dataset):
    """The images of dataset dicts, read and transformed when they are asked for."""

    def __init__(
        self,
        records: list[dict],
        mapper: Callable[[dict], dict[str, Any]],
        *,
        skip: bool,
        replace: bool,
    ) -> None:
        """
        Args:
            records: the dataset dicts, kept in a form that worker processes share.
            mapper: of a dataset dict; raises UnreadableImageError for an image it cannot use.
            skip: whether unreadable images are named and passed over, or an error.
            replace: whether the following image takes the place of one that was passed over.
        """
        self.records = DatasetFromList(records, copy=False)
        self.mapper = mapper
        self.skip = skip
        self.replace = replace
        # Which images were passed over, by this process and its worker processes alike.
        self.unreadable = torch.zeros(len(records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """
        Returns:
            what the mapper gives; None for an unreadable image that is not replaced.

        Raises:
            UnreadableImageError: an image, or with ``skip`` and ``replace`` as many of them in a
                row as there are, up to 100.
        """
        for offset in range(min(len(self), MAX_UNREADABLE) if self.replace else 1):
            place = (index + offset) % len(self)
            try:
                return self.mapper(self.records[place])
            except UnreadableImageError as error:
                self._pass_over(place, error)
        if not self.replace:
            return None
        raise UnreadableImageError(
            f"{offset + 1} images in a row cannot be read, from "
            f"'{self.records[index]['file_name']}' on: see the warnings for what is wrong with them"
        )

    def _pass_over(self, index: int, error: UnreadableImageError) -> None:
        if not self.skip:
            raise UnreadableImageError(
                f"{error}. Repair or remove it, or set DATALOADER.UNREADABLE_IMAGES to 'skip' to "
                "go on without such images."
            ) from error
        if not self.unreadable[index]:
            self.unreadable[index] = True
            logger.warning(
                "%s. Left out; so far, this process has met %d unreadable images.",
                error,
                self.unreadable.sum(),
            )


class TrainingLoader:
    """
    Endless batches of a data set, shared out over the ranks. The seed and a batch's number
    determine it, augmentation included, whatever the number of worker processes and whatever else
    draws random numbers: a loader whose state was restored goes on where the other one was, and
    reads nothing of what lies before.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Callable[[int], Sampler[int]],
        batch_size: int,
        *,
        seed: int,
        wide: Sequence[bool] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            dataset: the images; what it draws at random, it draws from torch's, NumPy's or
                Python's generator.
            sampler: of a seed: this rank's indices, endless, the same each time it is iterated
                over, as those of Detectron2's samplers.
            batch_size: of this rank's batches.
            seed: the same on all ranks.
            wide: whether an image is wider than high, for every image: batches are of one kind
                then. Images wait for others of their kind, as in Detectron2.
            **options: of torch's DataLoader: num_workers, collate_fn, pin_memory ...
        """
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.seed = seed
        self.wide = wide
        self.options = options
        self.batches = 0
        """How many were given out."""

    def __iter__(self) -> Iterator[Any]:
        """Goes on after the batches given out so far."""
        loader = DataLoader(
            _SeededDataset(self.dataset, self.seed),
            batch_sampler=self._samples_of_batches(),
            # Of its own, as a loader takes its worker processes' seeds from it, which nothing uses.
            generator=torch.Generator(),
            **self.options,
        )
        batches = iter(loader)
        # Without worker processes, images are augmented in this one.
        kept = nullcontext if loader.num_workers else kept_random_state
        while True:
            with kept():
                batch = next(batches)
            self.batches += 1
            yield batch

    def _samples_of_batches(self) -> Iterator[list[tuple[int, int]]]:
        """Position in the stream and index of each image, per batch, after those given out."""
        sampler = self.sampler(self.seed)
        if self.wide is None:
            skipped = self.batches * self.batch_size
            samples = _numbered(islice(sampler, skipped, None), skipped)
            return iter(BatchSampler(samples, self.batch_size, drop_last=True))
        shapes = (
            {"width": 1 + self.wide[index], "height": 1, "sample": (position, index)}
            for position, index in _numbered(sampler)
        )
        groups = islice(AspectRatioGroupedDataset(shapes, self.batch_size), self.batches, None)
        return ([image["sample"] for image in group] for group in groups)

    def state_dict(self) -> dict[str, int]:
        """Where it is, the same on all ranks."""
        return {
            "batches": self.batches,
            "seed": self.seed,
            "images": len(self.dataset),
            "images_per_batch": self.batch_size * comm.get_world_size(),
            "grouped": self.wide is not None,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """
        Goes on where another loader was. With another number of images per batch, over all ranks,
        or in the data set, batches differ from those it would have given, which is logged.
        """
        if self.seed != state["seed"]:
            logger.info("The images' order and augmentation stay those of SEED %d.", state["seed"])
        self.batches, self.seed = state["batches"], state["seed"]
        here = self.state_dict()
        differ = [key for key, value in here.items() if state.get(key, value) != value]
        if differ:
            self.batches = state["batches"] * state["images_per_batch"] // here["images_per_batch"]
            logger.warning(
                "The data are not those of the run that is resumed (%s): after as many images, the "
                "order goes on, but not as it would have.",
                ", ".join(f"{key} {state[key]} then, {here[key]} now" for key in differ),
            )


def _numbered(indices: Iterator[int], start: int = 0) -> Iterator[tuple[int, int]]:
    """Each of this rank's indices with its position in the stream of all ranks."""
    rank, ranks = comm.get_rank(), comm.get_world_size()
    return ((rank + number * ranks, index) for number, index in enumerate(indices, start))


class _SeededDataset(Dataset):
    """(position, index) -> the image, whose random numbers follow from the position.

    The process goes on with those that come after them.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, sample: tuple[int, int]) -> Any:
        position, index = sample
        seed_all(self.seed, position)
        return self.dataset[index]
