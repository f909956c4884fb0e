from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from image_utils import image_config, pretend_processes, write_images
from PIL import Image

from ss_detectron.data import (
    UnreadableImageError,
    build_classification_test_loader,
    build_classification_train_loader,
    register_image_folders_from_config,
)

pytestmark = pytest.mark.usefixtures("root")


def pets(*, images=(4, 3), batch=2, workers=0, unreadable="error", names=("own_pets",), **options):
    """The config of two classes of grey images, the n-th of them of the grey n."""
    if not Path("pets").exists():
        write_images(Path("pets"), size=(6, 5), cat=images[0], dog=images[1])
    options = {"TRANSFORM": "resize", "SIZE": 4, **options}
    cfg = image_config(["own_pets", "pets"], train=names, test=names, **options)
    cfg.SOLVER.IMS_PER_BATCH = batch
    cfg.TEST.CLASSIFICATION.IMS_PER_BATCH = batch
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.DATALOADER.UNREADABLE_IMAGES = unreadable
    cfg.SEED = 5
    register_image_folders_from_config(cfg)
    return cfg


def train_batches(cfg, number):
    return list(islice(build_classification_train_loader(cfg), number))


def greys(batches):
    """Which images there are in batches, checking that each is whole and at its own name."""
    found = []
    for batch in batches:
        assert set(batch) == {"image", "label", "file_name"}
        assert batch["image"].dtype == torch.uint8 and batch["label"].dtype == torch.int64
        assert batch["image"].shape[1:] == (3, 4, 4)
        assert len(batch["image"]) == len(batch["label"]) == len(batch["file_name"])
        columns = batch["image"], batch["label"], batch["file_name"]
        for image, label, name in zip(*columns, strict=True):
            grey = int(image[0, 0, 0])
            assert (image == grey).all()
            assert np.asarray(Image.open(name))[0, 0, 0] == grey
            assert Path(name).parent.name == ("cat", "dog")[label]
            found.append(grey)
    return found


def spoil(*names):
    for name in names:
        Path("pets", name).write_bytes(Path("pets", name).read_bytes()[:40])


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "processes"), [(2, 1), (0, 2)])
def test_every_image_once_per_epoch_over_all_processes(workers, processes, monkeypatch):
    """10 images, in batches that divide an epoch and in an order that is new every time."""
    cfg = pets(images=(6, 4), batch=2 * processes, workers=workers)
    ranks = []
    for _ in pretend_processes(monkeypatch, processes):
        batches = train_batches(cfg, 20 // processes)
        assert all(len(b["image"]) == 2 for b in batches)
        ranks.append(greys(batches))
    # What step after step takes, over all processes.
    order = [grey for step in zip(*ranks, strict=True) for grey in step]
    epochs = [tuple(order[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert len({tuple(seen) for seen in ranks}) == processes


def test_without_a_seed_runs_differ():
    cfg = pets(images=(30, 30), batch=60)
    cfg.SEED = -1
    first, second = (greys(train_batches(cfg, 1)) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(60)) and first != second


@pytest.mark.parametrize(
    ("images", "processes", "passes"), [(5, 2, 1), (8, 2, 3), (0, 1, 1), (4, 1, 0)]
)
def test_batches_that_cannot_be_shared_out_are_refused(images, processes, passes, monkeypatch):
    cfg = pets(batch=images)
    cfg.SOLVER.ACCUMULATION_STEPS = passes
    list(zip([0], pretend_processes(monkeypatch, processes), strict=False))
    message = f"IMS_PER_BATCH is {images}, which {processes} processes .* {passes} equal passes"
    with pytest.raises(ValueError, match=f"{message} .SOLVER.ACCUMULATION_STEPS"):
        build_classification_train_loader(cfg)


def test_several_sets_are_one_and_a_batch_is_that_of_a_pass():
    write_images(Path("more"), size=(6, 5), cat=1, dog=2)
    cfg = pets(batch=30, names=("own_pets", "own_more"))
    cfg.SOLVER.ACCUMULATION_STEPS = 3
    cfg.DATASETS.IMAGE_FOLDERS.append(["own_more", "more"])
    register_image_folders_from_config(cfg)
    loader = build_classification_train_loader(cfg)
    assert len(loader.dataset) == 10
    names = next(iter(loader))["file_name"]
    assert Counter(Path(name).parts[-3] for name in names) == {"pets": 7, "more": 3}


# Evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (3, 0), (8, 0)])
@pytest.mark.parametrize("images", [(1, 1), (5, 4)])
def test_evaluation_takes_every_image_once_in_order(images, processes, workers, monkeypatch):
    cfg = pets(images=images, batch=2, workers=workers)
    ranks = []
    for _ in pretend_processes(monkeypatch, processes):
        loader = build_classification_test_loader(cfg, "own_pets")
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch["image"]) == 2 for batch in batches[:-1])
        ranks.append(greys(batches))
    assert sum(ranks, []) == list(range(sum(images)))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_evaluation_leaves_random_numbers_alone():
    cfg = pets()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(build_classification_test_loader(cfg, "own_pets"))
    assert (torch.rand(3) == expected).all()


# Unreadable images -------------------------------------------------------------------------------


def test_another_image_takes_the_place_of_an_unreadable_one():
    cfg = pets(images=(4, 3), batch=7, unreadable="skip")
    spoil("cat/0001.png", "cat/0002.png", "dog/0002.png")
    for batch in train_batches(cfg, 4):
        # the following one: 3 for 1 and 2, and 0, the first, for the last
        assert sorted(greys([batch])) == [0, 0, 3, 3, 3, 4, 5]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_unreadable_images_out(workers):
    cfg = pets(images=(4, 3), batch=2, unreadable="skip", workers=workers)
    spoil("cat/0001.png", "dog/0000.png", "dog/0001.png")
    batches = list(build_classification_test_loader(cfg, "own_pets"))
    assert [len(b["image"]) for b in batches] == [1, 2, 1]  # one batch has nothing left
    assert greys(batches) == [0, 2, 3, 6]


@pytest.mark.parametrize("images", [(2, 1), (120, 30)])
def test_training_without_any_readable_image_ends(images):
    """In an error instead of an endless search, which gives up after 100 images."""
    cfg = pets(images=images, unreadable="skip")
    for file in Path("pets").rglob("*.png"):
        file.write_bytes(b"")
    number = min(sum(images), 100)
    with pytest.raises(UnreadableImageError, match=f"{number} images in a row cannot be read"):
        train_batches(cfg, 1)
    assert not list(build_classification_test_loader(cfg, "own_pets"))


# Data sets of one's own --------------------------------------------------------------------------


def own(records):
    DatasetCatalog.register("own_code", lambda: records)
    options = {"TRANSFORM": "pad_crop", "SIZE": 4, "PAD": 0}
    return image_config(train=("own_code",), test=("own_code",), **options)


def test_images_in_memory():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    labels = np.array([0, 1, 1, 0, 1])  # NumPy's integers are fine
    names = [f"own/{i}" for i in range(5)]
    columns = zip(names, images, labels, strict=True)
    cfg = own(
        [{"file_name": name, "image": image, "label": label} for name, image, label in columns]
    )
    (batch,) = build_classification_test_loader(cfg, "own_code")
    assert (batch["image"].permute(0, 2, 3, 1).numpy() == images).all()
    assert batch["label"].tolist() == labels.tolist() and batch["label"].dtype == torch.int64
    assert batch["file_name"] == names


@pytest.mark.parametrize(
    "record",
    [{"file_name": "b.png", "label": label} for label in (2, -1, 1.0, torch.tensor(1))]
    + [{"label": 1}],
)
def test_images_whose_name_or_label_does_not_fit_are_named(record):
    cfg = own([{"file_name": "a.png", "label": 1}, record])
    message = "'own_code': an image needs a 'file_name' and, .*integer 'label' from 0 to 1;"
    with pytest.raises(ValueError, match=message) as error:
        build_classification_train_loader(cfg)
    for key, value in record.items():
        assert repr(key) in str(error.value) and repr(value) in str(error.value)


def test_sets_without_images_are_refused():
    for build in (
        build_classification_train_loader,
        lambda cfg: build_classification_test_loader(cfg, "own_code"),
    ):
        with pytest.raises(ValueError, match="'own_code' has no images"):
            build(own([]))
        DatasetCatalog.remove("own_code")
