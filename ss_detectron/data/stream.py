"""Loaders of a data set's images: endless batches that a run can resume, and each image once."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from detectron2.data import DatasetFromList
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from ss_detectron.utils.random_state import kept_random_state, seed_all

from .images import UnreadableImageError

logger = logging.getLogger(__name__)

# So many unreadable images in a row say that more is wrong than single files.
MAX_UNREADABLE = 100


class ImageDataset(Dataset):
    """The images of dataset dicts, read and transformed when they are asked for."""

    def __init__(
        self, records: Sequence[dict], mapper: Callable[[dict], dict], *, skip: bool, replace: bool
    ) -> None:
        """
        Args:
            records: the dataset dicts.
            mapper: of a dataset dict; raises UnreadableImageError for an image it cannot use.
            skip: whether unreadable images are named and passed over, or an error.
            replace: whether the following image takes the place of one that was passed over.
        """
        # In a form that worker processes share, as CocoRecords are already.
        self.records = DatasetFromList(records, copy=False, serialize=isinstance(records, list))
        self.mapper = mapper
        self.skip = skip
        self.replace = replace
        # Which images were passed over, by this process and its worker processes alike.
        self.unreadable = torch.zeros(len(records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """Return what the mapper gives; None for an unreadable image that is not replaced.

        Raises:
            UnreadableImageError: an image, or with ``skip`` and ``replace`` as many of them in a
                row as there are, up to 100. Other errors of the mapper are raised as they are.
        """
        tries = min(len(self), MAX_UNREADABLE) if self.replace else 1
        for place in range(index, index + tries):
            try:
                return self.mapper(self.records[place % len(self)])
            except UnreadableImageError as error:
                if not self.skip:
                    remedy = "Repair or remove it, or set DATALOADER.UNREADABLE_IMAGES to 'skip'"
                    raise UnreadableImageError(f"{error}. {remedy}") from error
                if not self.unreadable[place % len(self)]:
                    self.unreadable[place % len(self)] = True
                    message = "%s. Left out; so far, this process has met %d unreadable images."
                    logger.warning(message, error, self.unreadable.sum())
        if not self.replace:
            return None
        name = self.records[index]["file_name"]
        raise UnreadableImageError(f"{tries} images in a row cannot be read, from '{name}' on")


class EvaluationLoader(DataLoader):
    """Every image of a data set once, in order, shared out over the processes.

    ``collate`` makes a batch of a list, without the images that were passed over; batches of such
    images alone are left out, though ``len`` counts them. The options are those of torch's loader.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, collate: Callable = list, **options: Any
    ) -> None:
        super().__init__(
            dataset,
            batch_size,
            sampler=InferenceSampler(len(dataset)),
            collate_fn=partial(_collate_readable, collate),
            # Of its own, so that evaluation leaves training's random numbers as they are.
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in super().__iter__() if batch is not None)


def _collate_readable(collate: Callable[[list], Any], images: list) -> Any:
    read = [image for image in images if image is not None]
    return collate(read) if read else None


class TrainingLoader:
    """Endless batches of a data set, shared out over the ranks.

    The seed and a batch's number determine it, augmentation included, whatever the number of
    worker processes and whatever else draws random numbers. So a loader whose state was restored
    goes on where the other one was, and reads nothing of what lies before.
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
            dataset: what it draws at random, it draws from torch's, NumPy's or Python's generator.
            sampler: of a seed, Detectron2's sampler of this rank's indices.
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
        """How many were given out; worker processes are ahead of them."""

    def __iter__(self) -> Iterator[Any]:
        """Go on after the batches given out so far."""
        for batch in self._load():
            self.batches += 1
            yield batch

    def _load(self) -> Iterator[Any]:
        """Load the batches after those given out so far."""
        return iter(
            DataLoader(
                _SeededDataset(self.dataset, self.seed),
                batch_sampler=self._samples_of_batches(),
                # Of its own: a loader draws its worker processes' seeds, which nothing uses here.
                generator=torch.Generator(),
                **self.options,
            )
        )

    def _samples_of_batches(self) -> Iterator[list[tuple[int, int]]]:
        """Position in the stream of all ranks and index of each image, per batch."""
        rank, ranks = comm.get_rank(), comm.get_world_size()
        skipped = self.batches * self.batch_size if self.wide is None else 0
        numbered = islice(enumerate(self.sampler(self.seed)), skipped, None)
        samples = ((rank + number * ranks, index) for number, index in numbered)
        if self.wide is None:
            return iter(BatchSampler(samples, self.batch_size, drop_last=True))
        shapes = (
            {"width": 1 + self.wide[index], "height": 1, "sample": (position, index)}
            for position, index in samples
        )
        groups = islice(AspectRatioGroupedDataset(shapes, self.batch_size), self.batches, None)
        return ([image["sample"] for image in group] for group in groups)

    def state_dict(self) -> dict[str, Any]:
        """Return where it is, the same on all ranks."""
        return {
            "batches": self.batches,
            "seed": self.seed,
            "images": len(self.dataset),
            "images_per_batch": self.batch_size * comm.get_world_size(),
            "grouped": self.wide is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was.

        With another number of images per batch, over all ranks, or in the data set, batches differ
        from those it would have given, which is logged.
        """
        if self.seed != state["seed"]:
            logger.info("The images' order and augmentation stay those of SEED %d.", state["seed"])
        self.batches, self.seed = state["batches"], state["seed"]
        here = self.state_dict()
        differ = [key for key, value in here.items() if state.get(key, value) != value]
        if differ:
            self.batches = state["batches"] * state["images_per_batch"] // here["images_per_batch"]
            logger.warning(
                "The data are not those of the run that is resumed: their order will differ (%s).",
                ", ".join(f"{key} {state[key]} then, {here[key]} now" for key in differ),
            )


class _SeededDataset(Dataset):
    """The images of (position, index), whose random numbers follow from the position."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitems__(self, samples: list[tuple[int, int]]) -> list[Any]:
        """Load a batch for torch's DataLoader, and leave the process's random numbers alone."""
        images = []
        with kept_random_state():
            for position, index in samples:
                seed_all(self.seed, position)
                images.append(self.dataset[index])
        return images
