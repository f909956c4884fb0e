import gc
import multiprocessing
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from image_utils import datasets_folder, image_config, pretend_processes
from PIL import Image

from ss_detectron.data import (
    UnreadableImageError,
    build_classification_test_loader,
    build_classification_train_loader,
    check_datasets,
)

PICTURE = Path(__file__).parents[2] / "docs" / "demo_detections.jpg"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    with datasets_folder(tmp_path, monkeypatch) as folder:
        yield folder


@pytest.fixture
def dali():
    yield pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    gc.collect()  # an error's pipeline, whose threads later worker processes would not have


def photographs() -> list[dict]:
    """Parts of a picture, in the kinds of files that ImageNet has and in some that it does not."""
    picture = Image.open(PICTURE)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "a.jpg": {"quality": 90},
        "444.jpg": {"subsampling": 0},
        "progressive.jpg": {"progressive": True},
        "grey.jpg": {"mode": "L"},
        "cmyk.jpg": {"mode": "CMYK"},
        "turned.jpg": {"exif": turned},
        "a.png": {},
        "named_as.jpg": {"format": "PNG"},
        "palette.png": {"mode": "P"},
        "transparent.png": {"mode": "RGBA"},
    }
    records = []
    for i, (name, options) in enumerate(kinds.items()):
        part = picture.crop((90 * i, 20 * i, 90 * i + 300 + 13 * i, 20 * i + 350 - 17 * i))
        part.convert(options.pop("mode", "RGB")).save(name, **options)
        records.append({"file_name": name, "label": i % 2})
    pixels = np.asarray(picture.crop((500, 50, 800, 300)))
    return [*records, {"file_name": "memory/0", "label": 1, "image": pixels}]


def config(records=None, decoder="dali", batch=4, workers=0, size=64, **options):
    if "own" not in DatasetCatalog:
        records = photographs() if records is None else records
        DatasetCatalog.register("own", lambda: records)
        classes = ["cat", "dog"]
        MetadataCatalog.get("own").set(evaluator_type="classification", thing_classes=classes)
    cfg = image_config(train=("own",), test=("own",), SIZE=size, RESIZE=size, **options)
    cfg.DATALOADER.DECODER = decoder
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.SOLVER.IMS_PER_BATCH = batch
    cfg.INPUT.CLASSIFICATION.REDUCED_DECODING = False
    cfg.SEED = 3
    return cfg


def batches(cfg, number):
    torch.manual_seed(0)
    return list(islice(build_classification_train_loader(cfg), number))


def both(number, **options):
    """The same batches by both decoders."""
    return [batches(config(decoder=name, **options), number) for name in ("pillow", "dali")]


def assert_alike(pillow, dali):
    """Equal within the rounding of the two resizes, except at the borders of a crop."""
    assert dali.dtype == torch.uint8 and dali.shape == pillow.shape
    difference = (dali.int() - pillow.int()).abs()
    assert difference[..., 3:-3, 3:-3].max() <= 1
    assert difference.float().mean() < 0.3
    assert pillow.float().std() > 20  # of pictures


# What it gives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_same_batches_as_pillow(dali, workers):
    """In order, names, labels, crops and flips, over three epochs of all kinds of files."""
    pillow, dali = both(9, workers=workers)
    for expected, found in zip(pillow, dali, strict=True):
        assert set(found) == {"image", "label", "file_name"}
        assert found["file_name"] == expected["file_name"]
        assert found["label"].dtype == torch.int64
        assert found["label"].tolist() == expected["label"].tolist()
        assert_alike(expected["image"], found["image"])
    assert {name for batch in dali for name in batch["file_name"]} == {
        record["file_name"] for record in DatasetCatalog.get("own")
    }


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_flips_and_order_of_channels(dali, flip, order):
    found = []
    for decoder in ("pillow", "dali"):
        cfg = config(decoder=decoder, batch=11)
        cfg.INPUT.RANDOM_FLIP, cfg.INPUT.FORMAT = flip, order
        found.append(batches(cfg, 1)[0]["image"])
    assert_alike(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(dali):
    """Its decoder may round otherwise, but draws the same crops."""
    found = []
    for decoder in ("pillow", "dali"):
        cfg = config(decoder=decoder, workers=2)
        cfg.MODEL.DEVICE = "cuda"
        found.append(batches(cfg, 6))
    for pillow, dali in zip(*found, strict=True):
        assert dali["file_name"] == pillow["file_name"]
        assert dali["label"].tolist() == pillow["label"].tolist()
        assert dali["image"].is_cuda and dali["image"].shape == pillow["image"].shape
        assert (dali["image"].cpu().int() - pillow["image"].int()).abs().float().mean() < 1


def test_images_smaller_than_the_result(dali):
    pillow, dali = both(3, size=400)
    for expected, found in zip(pillow, dali, strict=True):
        assert_alike(expected["image"], found["image"])


def test_processes_share_every_epoch(dali, monkeypatch):
    cfg = config(batch=2)
    ranks = []
    for _ in pretend_processes(monkeypatch, 2):
        ranks.append([batch["file_name"] for batch in batches(cfg, 11)])
        assert all(len(names) == 1 for names in ranks[-1])
    order = [names[0] for step in zip(*ranks, strict=True) for names in step]
    everything = sorted(record["file_name"] for record in DatasetCatalog.get("own"))
    assert sorted(order[:11]) == sorted(order[11:]) == everything
    assert order[:11] != order[11:]


def test_size_of_an_epoch_and_processes_that_end(dali):
    loader = build_classification_train_loader(config(workers=1))
    assert len(loader.dataset) == 11
    assert len(list(islice(loader, 4))) == 4
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_where_another_loader_was(dali, workers):
    expected = batches(config(workers=workers), 6)
    stopped = build_classification_train_loader(config(workers=workers))
    given = iter(stopped)  # DALI is ahead of what it has given out
    for _ in range(2):
        next(given)
    given.close()
    assert stopped.state_dict()["batches"] == 2
    restored = build_classification_train_loader(config(workers=workers))
    restored.load_state_dict(stopped.state_dict())
    for batch, other in zip(expected[2:], islice(restored, 4), strict=True):
        assert other["file_name"] == batch["file_name"]
        assert torch.equal(other["image"], batch["image"])


def test_evaluation_is_by_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    pillow, dali = (
        list(build_classification_test_loader(config(decoder=name), "own"))
        for name in ("pillow", "dali")
    )
    assert all((a["image"] == b["image"]).all() for a, b in zip(pillow, dali, strict=True))


# Damaged files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "length", "workers"),
    [
        ("a.jpg", 0, 0),
        ("a.jpg", 100, 0),
        ("a.jpg", 5000, 0),
        ("a.jpg", -2, 1),
        ("a.png", 5000, 0),
    ],
)
def test_file_that_ends_too_soon_is_named(dali, name, length, workers):
    cfg = config(workers=workers)
    Path(name).write_bytes(Path(name).read_bytes()[:length])
    with pytest.raises(UnreadableImageError, match=f"'{name}' cannot be read as an image"):
        batches(cfg, 3)


def test_what_only_dali_finds_is_named(dali):
    """A JPEG without the tables that its pixels need."""
    cfg = config()
    data = Path("progressive.jpg").read_bytes()
    Path("progressive.jpg").write_bytes(data.replace(b"\xff\xdb", b"\xff\xec"))
    with pytest.raises(UnreadableImageError, match="'progressive.jpg' cannot be decoded: Critical"):
        batches(cfg, 3)


# Refusals ----------------------------------------------------------------------------------------


def assert_refused(cfg, message, error=ValueError):
    for check in (check_datasets, build_classification_train_loader):
        with pytest.raises(error, match=message):
            check(cfg)


def test_unknown_decoder_is_refused():
    cfg = config([{"file_name": "a.jpg", "label": 0}], decoder="opencv")
    assert_refused(cfg, "DATALOADER.DECODER is 'opencv'; choose 'pillow' or 'dali'")


def test_what_dali_cannot_do_is_refused():
    records = [{"file_name": "a.jpg", "label": 0}]
    for transform in ("pad_crop", "resize"):
        cfg = config(records, TRANSFORM=transform)
        assert_refused(cfg, f"'{transform}'; choose 'resized_crop', or the decoder")
    cfg = config(records)
    cfg.DATALOADER.UNREADABLE_IMAGES = "skip"
    assert_refused(cfg, "UNREADABLE_IMAGES is 'skip'; choose 'error', or the decoder")
    cfg = config(records)
    cfg.INPUT.FORMAT = "L"
    assert_refused(cfg, "FORMAT is 'L'; choose 'RGB' or 'BGR', or the decoder")


def test_missing_package_is_named(monkeypatch):
    cfg = config([{"file_name": "a.jpg", "label": 0}])
    monkeypatch.delitem(sys.modules, "ss_detectron.data.dali", raising=False)
    monkeypatch.delattr("ss_detectron.data.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert_refused(cfg, r"pip install ss-detectron\[dali\]", ImportError)
    check_datasets(cfg, training=False)


def test_detection_is_refused():
    MetadataCatalog.get("own_boxes").evaluator_type = "coco"
    DatasetCatalog.register("own_boxes", list)
    cfg = config([{"file_name": "a.jpg", "label": 0}])
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("own_boxes",)
    with pytest.raises(ValueError, match="DECODER is 'dali', which is for classification"):
        check_datasets(cfg)
