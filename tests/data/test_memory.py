"""Images that are held in memory: the same as those read one by one, augmented in batches."""

from itertools import islice

import pytest
import torch
from image_utils import image_config, pretend_processes, write_images

from ss_detectron.data import (
    build_classification_test_loader,
    build_classification_train_loader,
    register_image_folders_from_config,
)
from ss_detectron.data.memory import augment


@pytest.fixture
def config(tmp_path, root):
    def make(size=(6, 8), **options):
        write_images(tmp_path / "own", size=size, cat=5, dog=4)
        cfg = image_config(("own", str(tmp_path / "own")), train=("own",), test=("own",), **options)
        register_image_folders_from_config(cfg)
        cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.INPUT.RANDOM_FLIP = 4, 5, "none"
        return cfg

    return make


def _batches(cfg, count=5):
    return list(islice(build_classification_train_loader(cfg), count))


def assert_same_batches(some, others):
    for one, other in zip(some, others, strict=True):
        assert one["file_name"] == other["file_name"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])


def test_without_augmentation_batches_are_those_of_single_images(config):
    cfg = config(TRANSFORM="resize", SIZE=5)
    expected = _batches(cfg), list(build_classification_test_loader(cfg, "own"))
    cfg.DATALOADER.IN_MEMORY = True
    assert_same_batches(_batches(cfg), expected[0])
    assert_same_batches(build_classification_test_loader(cfg, "own"), expected[1])


def test_crops_and_flips_follow_from_seed_and_number(config):
    cfg = config((8, 8), TRANSFORM="pad_crop", SIZE=8, PAD=2)
    cfg.INPUT.RANDOM_FLIP, cfg.DATALOADER.IN_MEMORY = "horizontal", True
    first = _batches(cfg)
    torch.manual_seed(3)
    assert_same_batches(_batches(cfg), first)
    loader = build_classification_train_loader(cfg)
    loader.load_state_dict({**loader.state_dict(), "batches": 3})
    assert_same_batches(islice(loader, 2), first[3:])
    cfg.SEED = 6
    assert any(
        not torch.equal(one["image"], other["image"])
        for one, other in zip(first, _batches(cfg), strict=True)
    )


def test_processes_share_out_the_images(config, monkeypatch):
    cfg = config(TRANSFORM="resize", SIZE=5)
    cfg.DATALOADER.IN_MEMORY = True
    names = [name for batch in _batches(cfg) for name in batch["file_name"]]
    shares = [_batches(cfg, 9) for _ in pretend_processes(monkeypatch, 2)]
    seen = [[name for batch in share for name in batch["file_name"]] for share in shares]
    assert names == [name for pair in zip(*seen, strict=True) for name in pair][: len(names)]
    parts = [
        name
        for _ in pretend_processes(monkeypatch, 2)
        for batch in build_classification_test_loader(cfg, "own")
        for name in batch["file_name"]
    ]
    assert len(set(parts)) == len(parts) == 9


@pytest.mark.parametrize("flip", [None, -1, -2])
def test_augmented_images_are_parts_of_the_padded_ones(flip):
    images = torch.randint(1, 256, (40, 2, 4, 5), dtype=torch.uint8)
    got = augment(images, 1, flip, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    seen = set()
    for image, whole in zip(got, padded, strict=True):
        places = {}
        for y in range(3):
            for x in range(3):
                part = whole[:, y : y + 4, x : x + 5]
                places[(y, x, False)] = part
                if flip is not None:
                    places[(y, x, True)] = part.flip(flip)
        (place,) = [place for place, part in places.items() if torch.equal(part, image)]
        seen.add(place)
    assert {place[:2] for place in seen} == {(y, x) for y in range(3) for x in range(3)}
    assert {place[2] for place in seen} == ({False} if flip is None else {False, True})


def test_keys_that_do_not_go_with_it(config):
    cfg = config(TRANSFORM="resized_crop", SIZE=8)
    cfg.DATALOADER.IN_MEMORY = True
    with pytest.raises(ValueError, match="with DATALOADER.IN_MEMORY, .*TRANSFORM.*pad_crop"):
        build_classification_train_loader(cfg)


@pytest.mark.parametrize("size", [5, 6, 8, 9])
def test_a_part_is_cut_out_of_whole_images_alone(config, size):
    cfg = config(TRANSFORM="pad_crop", SIZE=size, PAD=2)
    cfg.DATALOADER.IN_MEMORY = True
    with pytest.raises(ValueError, match=r"\.png' is \d x \d pixels: with DATALOADER.IN_MEMORY"):
        build_classification_train_loader(cfg)
    next(iter(build_classification_test_loader(cfg, "own")))  # pads nothing
