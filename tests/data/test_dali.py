import gc
import io
import multiprocessing
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from image_utils import image_config
from PIL import Image, ImageOps

from ss_detectron.data import (
    ClassificationMapper,
    UnreadableImageError,
    build_classification_test_loader,
    build_classification_train_loader,
    check_datasets,
)
from ss_detectron.data.dali import EncodedImageMapper

PICTURE = Path(__file__).parents[2] / "docs" / "demo_detections.jpg"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Parts of a picture, in the kinds of files that ImageNet has and in some that it does not."""
    folder = tmp_path_factory.mktemp("photographs")
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
        part.convert(options.pop("mode", "RGB")).save(folder / name, **options)
        records.append({"file_name": str(folder / name), "label": i % 2})
    pixels = np.asarray(picture.crop((500, 50, 800, 300)))
    return [*records, {"file_name": "memory/0", "label": 1, "image": pixels}]


@pytest.fixture(autouse=True)
def records(photographs, root):
    """What the data set "own" holds, for a test to change."""
    records = [dict(record) for record in photographs]
    DatasetCatalog.register("own", lambda: records)
    MetadataCatalog.get("own").set(evaluator_type="classification", thing_classes=["cat", "dog"])
    return records


@pytest.fixture
def dali():
    yield pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    gc.collect()  # an error's pipeline, whose threads later worker processes would not have


def config(decoder="dali", workers=0, size=64, flip="horizontal", order="RGB", **options):
    cfg = image_config(train=("own",), test=("own",), SIZE=size, RESIZE=size, **options)
    cfg.DATALOADER.DECODER = decoder
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.INPUT.CLASSIFICATION.REDUCED_DECODING = False
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.FORMAT = flip, order
    cfg.SEED = 3
    return cfg


def batches(cfg, number):
    return list(islice(build_classification_train_loader(cfg), number))


# What it gives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_crops_and_flips_are_those_of_pillow(flip, records):
    """To the bit, where Pillow does what DALI is told to."""
    cfg = config(flip=flip)
    pillow, dali = ClassificationMapper(cfg, True), EncodedImageMapper(cfg)
    flips = {"horizontal": ImageOps.mirror, "vertical": ImageOps.flip}
    flipped = []
    for seed, record in enumerate(3 * records):
        torch.manual_seed(seed)
        expected = pillow(record)["image"]
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        told = dali(record)
        assert torch.get_rng_state().equal(state)
        image = Image.open(io.BytesIO(told["encoded"])).convert("RGB")
        (top, left), (height, width) = told["start"].tolist(), told["shape"].tolist()
        part = image.crop((left, top, left + width, top + height)).resize((64, 64), Image.BILINEAR)
        part = flips[flip](part) if told["flip"] else part
        assert (np.asarray(part).transpose(2, 0, 1) == expected.numpy()).all()
        flipped.append(int(told["flip"]))
    assert (0 < sum(flipped) < len(flipped)) == (flip != "none")


@pytest.mark.parametrize(
    ("workers", "options"),
    [(0, {"order": "BGR"}), (2, {"flip": "vertical"}), (0, {"size": 400, "flip": "none"})],
)
def test_same_batches_as_pillow(dali, workers, options):
    """In order, names, labels, crops and flips, over three epochs of all kinds of files."""
    pillow, dali = (
        batches(config(decoder=name, workers=workers, **options), 9) for name in ("pillow", "dali")
    )
    for expected, found in zip(pillow, dali, strict=True):
        assert set(found) == {"image", "label", "file_name"}
        assert found["file_name"] == expected["file_name"]
        assert found["label"].equal(expected["label"])
        assert found["image"].dtype == torch.uint8
        assert found["image"].shape == expected["image"].shape
        # Within the rounding of the two resizes, except at the borders of a crop.
        difference = (found["image"].int() - expected["image"].int()).abs()
        assert difference[..., 3:-3, 3:-3].max() <= 1
        assert difference.float().mean() < 0.3


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
        assert dali["image"].is_cuda and dali["image"].shape == pillow["image"].shape
        assert (dali["image"].cpu().int() - pillow["image"].int()).abs().float().mean() < 1


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_where_another_loader_was(dali, workers):
    expected = batches(config(workers=workers), 6)
    stopped = build_classification_train_loader(config(workers=workers))
    given = iter(stopped)  # DALI is ahead of what it has given out
    for _ in range(2):
        next(given)
    given.close()
    assert not multiprocessing.active_children()
    assert stopped.state_dict()["batches"] == 2
    restored = build_classification_train_loader(config(workers=workers))
    restored.load_state_dict(stopped.state_dict())
    for batch, other in zip(expected[2:], islice(restored, 4), strict=True):
        assert other["file_name"] == batch["file_name"]
        assert torch.equal(other["image"], batch["image"])


# Damaged files -----------------------------------------------------------------------------------


def damage(records, name, change):
    """Have the data set hold a changed copy of a file."""
    (record,) = (r for r in records if Path(r["file_name"]).name == name)
    Path(name).write_bytes(change(Path(record["file_name"]).read_bytes()))
    record["file_name"] = name
    return record


@pytest.mark.parametrize(
    ("name", "length"),
    [("a.jpg", 0), ("a.jpg", 100), ("a.jpg", 5000), ("a.jpg", -2), ("a.png", 5000)],
)
def test_file_that_ends_too_soon_is_named(records, name, length):
    record = damage(records, name, lambda data: data[:length])
    with pytest.raises(UnreadableImageError, match=f"'{name}' cannot be read as an image"):
        EncodedImageMapper(config())(record)


def test_what_only_dali_finds_is_named(dali, records):
    """A JPEG without the tables that its pixels need."""
    damage(records, "progressive.jpg", lambda data: data.replace(b"\xff\xdb", b"\xff\xec"))
    with pytest.raises(UnreadableImageError, match="'progressive.jpg' cannot be decoded: Critical"):
        batches(config(), 3)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DATALOADER.DECODER", "opencv", "is 'opencv'; choose 'pillow' or 'dali'"),
        ("INPUT.CLASSIFICATION.TRANSFORM", "pad_crop", "choose 'resized_crop', or the decoder"),
        ("DATALOADER.UNREADABLE_IMAGES", "skip", "choose 'error', or the decoder"),
        ("INPUT.RANDOM_FLIP", "diagonal", "RANDOM_FLIP is 'diagonal'; choose 'horizontal' or"),
        ("INPUT.FORMAT", "YUV-BT.601", "is 'YUV-BT.601'; choose 'RGB' or 'BGR', or the decoder"),
    ],
)
def test_what_dali_cannot_do_is_refused(key, value, message):
    cfg = config()
    cfg.merge_from_list([key, value])
    for check in (check_datasets, build_classification_train_loader):
        with pytest.raises(ValueError, match=message):
            check(cfg)


def test_missing_package_is_named_and_evaluation_needs_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for check in (check_datasets, build_classification_train_loader):
        with pytest.raises(ImportError, match=r"pip install ss-detectron\[dali\]"):
            check(config())
    check_datasets(config(), training=False)
    assert len(list(build_classification_test_loader(config(), "own")))


def test_detection_is_refused():
    DatasetCatalog.register("own_boxes", list)
    cfg = config()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("own_boxes",)
    with pytest.raises(ValueError, match="DECODER is 'dali'; for detection, choose"):
        check_datasets(cfg)
