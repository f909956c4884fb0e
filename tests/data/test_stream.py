"""Batches that follow from the seed and their number."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from image_utils import pretend_processes

from ss_detectron.data.stream import TrainingLoader
from ss_detectron.utils.random_state import (
    get_random_state,
    kept_random_state,
    seeded,
    set_random_state,
)

IMAGES = 23
SAMPLERS = {
    "all": lambda seed: TrainingSampler(IMAGES, seed=seed),
    "repeat": lambda seed: RepeatFactorTrainingSampler(
        torch.linspace(1, 2.5, IMAGES), shuffle=True, seed=seed
    ),
    "subset": lambda seed: RandomSubsetTrainingSampler(
        IMAGES, 0.5, seed_shuffle=seed, seed_subset=seed
    ),
}


def draw():
    """Of all three generators."""
    return [torch.rand(1).item(), np.random.rand(), random.random()]


class Augmented:
    """Counts what is read; every image draws random numbers."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        self.read += 1
        return {"index": index, "random": draw()}


def loader(sampler="all", wide=None, workers=0, seed=3, size=4, dataset=None):
    return TrainingLoader(
        dataset or Augmented(),
        SAMPLERS[sampler],
        size,
        seed=seed,
        wide=wide,
        num_workers=workers,
        collate_fn=list,
    )


def first(loader, number):
    return list(islice(loader, number))


WIDE = [index % 3 == 0 for index in range(IMAGES)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("wide", [None, WIDE], ids=["any", "grouped"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_loader_goes_on_where_the_other_was(sampler, wide, workers):
    expected = first(loader(sampler, wide), 15)
    stopped = loader(sampler, wide, workers)
    batches = iter(stopped)  # with workers, they are ahead of what was given out
    assert [next(batches) for _ in range(6)] == expected[:6]
    state = stopped.state_dict()
    counts = {"batches": 6, "images": IMAGES, "images_per_batch": 4}
    assert state == {"seed": 3, "grouped": wide is not None, **counts}
    restored = loader(sampler, wide, 2 - workers, seed=0)
    restored.load_state_dict(state)
    batches = iter(restored)
    assert [next(batches) for _ in range(9)] == expected[6:]


def test_batches_are_those_of_earlier_checkpoints():
    """What was recorded of a seed's 12th batch: a change would break the resuming of old runs."""
    of_seed = loader(wide=WIDE, seed=2**40 + 7)
    of_seed.load_state_dict({**of_seed.state_dict(), "batches": 11})
    (batch,) = first(of_seed, 1)
    assert [image["index"] for image in batch] == [4, 2, 16, 8]
    assert batch[0]["random"] == pytest.approx([0.8406145572, 0.8605064593, 0.7485829613])


def test_nothing_is_read_of_what_lies_before():
    dataset = Augmented()
    restored = loader(dataset=dataset)
    restored.load_state_dict({**restored.state_dict(), "batches": 1000})
    first(restored, 2)
    assert dataset.read == 8


def test_batches_neither_depend_on_other_random_numbers_nor_change_them():
    expected = first(loader(wide=WIDE), 5)
    with seeded(1):
        undisturbed = [draw() for _ in range(6)]
    with seeded(1):
        drawn, batches = [draw()], iter(loader(wide=WIDE))
        for batch in expected:
            assert next(batches) == batch
            drawn.append(draw())
    assert drawn == undisturbed


def test_an_image_is_augmented_anew_in_every_epoch_and_by_every_seed():
    images = sum(first(loader(), 12), [])  # two epochs and two images
    of_one = [tuple(image["random"]) for image in images if image["index"] == images[0]["index"]]
    assert len(set(of_one)) == len(of_one) >= 2
    assert len({tuple(image["random"]) for image in images}) == len(images)
    assert first(loader(seed=4), 1)[0] != images[:4]


def test_groups_are_of_one_shape_and_leave_nobody_out():
    batches = first(loader(wide=WIDE), 60)
    for batch in batches:
        assert len({WIDE[image["index"]] for image in batch}) == 1
    counts = np.bincount([image["index"] for batch in batches for image in batch])
    assert counts.min() >= 240 // IMAGES - 2 and counts.max() <= 240 // IMAGES + 2


def test_ranks_share_the_stream_out(monkeypatch):
    whole = sum(first(loader(size=4), 6), [])
    ranks = [sum(first(loader(size=2), 6), []) for _ in pretend_processes(monkeypatch, 2)]
    assert [image for pair in zip(*ranks, strict=True) for image in pair] == whole


def test_another_batch_size_goes_on_after_as_many_images_and_says_so(caplog):
    stopped = loader(size=4)
    first(stopped, 6)
    restored = loader(size=8)
    restored.load_state_dict(stopped.state_dict())
    assert restored.batches == 3
    assert "images_per_batch 4 then, 8 now" in caplog.text
    indices = [image["index"] for image in first(restored, 1)[0]]
    assert indices == list(islice(SAMPLERS["all"](3), 24, 32))


# Random numbers ----------------------------------------------------------------------------------


def test_random_numbers_go_on_from_a_state_that_was_saved(tmp_path):
    random.gauss(0, 1)  # leaves a second one waiting
    np.random.randn()
    torch.save(get_random_state(), tmp_path / "state.pth")
    expected = [draw(), random.gauss(0, 1), np.random.randn()]
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert [draw(), random.gauss(0, 1), np.random.randn()] == expected


def test_kept_random_numbers_are_kept_after_an_error_too():
    with seeded(1):
        expected = draw()
    with seeded(1):
        with pytest.raises(KeyError), kept_random_state():
            draw()
            raise KeyError
        assert draw() == expected
