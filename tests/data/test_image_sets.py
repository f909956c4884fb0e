import gzip
import hashlib
import json
import pickle
import shutil
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from image_utils import image_config, write_images
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST, ImageFolder

from ss_detectron.data import CIFAR10_CLASSES, check_datasets, register_image_folders_from_config
from ss_detectron.engine import Trainer

pytestmark = pytest.mark.usefixtures("root")


def check(cfg, **kwargs):
    register_image_folders_from_config(cfg)
    check_datasets(cfg, **kwargs)


# One's own folders -------------------------------------------------------------------------------


def test_own_folder_by_command_line():
    files = write_images(Path("pets/train"), cat=3, dog=2)
    cfg = image_config()
    cfg.merge_from_list(
        ["DATASETS.IMAGE_FOLDERS", "[('own_pets','pets/train')]"]
        + ["DATASETS.TRAIN", "('own_pets',)"]
    )
    for _ in range(2):  # the second time changes nothing
        check(cfg)
    assert MetadataCatalog.get("own_pets").thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get("own_pets").evaluator_type == "classification"
    assert DatasetCatalog.get("own_pets") == [
        {"file_name": str(file.absolute()), "image_id": i, "label": int(i >= 3)}
        for i, file in enumerate(files)
    ]


def test_classes_and_files_are_those_of_torchvision(root):
    """Sorted names, extensions in any case, subfolders, links, names in any script."""
    write_images(root / "pets", b=2, a=1, Z=1)
    for name in ("ä/1.JPEG", "ä/猫.webp", "ä/readme.txt", "only/below/deep/2.Png"):
        (root / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "pets/a/0000.png", root / "pets" / name)
    write_images(root / "elsewhere", d=2)
    (root / "pets/d").symlink_to(root / "elsewhere/d")
    (root / "pets/a/link.png").symlink_to(root / "elsewhere/d/0001.png")
    check(image_config(["own_pets", "pets"], train=("own_pets",), classes=6))
    reference = ImageFolder(root / "pets")
    found = DatasetCatalog.get("own_pets")
    assert [(r["file_name"], r["label"]) for r in found] == reference.samples
    assert len(found) == 4 + 3 + 2 + 1
    assert [r["image_id"] for r in found] == list(range(10))
    assert MetadataCatalog.get("own_pets").thing_classes == ["Z", "a", "b", "d", "only", "ä"]


def test_registering_looks_at_no_file(root):
    register_image_folders_from_config(image_config(["own_pets", "pets"]))
    with pytest.raises(ValueError, match="'cifar10_test' in DATASETS.IMAGE_FOLDERS is taken"):
        register_image_folders_from_config(image_config(["cifar10_test", "pets"]))
    assert not list(root.iterdir()) and not list(Path.cwd().iterdir())


def test_cifar10_as_jpeg_files_by_one_key_and_its_results_say_so(root):
    cfg = image_config(train=("cifar10_train",), test=("cifar10_test",), classes=10)
    cfg.merge_from_list(["DATASETS.CIFAR10_JPEG", "True"])
    with pytest.raises(FileNotFoundError, match="'cifar10_jpeg_train'.*one folder of images per"):
        check(cfg)
    for split, images in (("train", 10), ("test", 1)):
        write_images(root / "cifar10_jpeg" / split, **dict.fromkeys(CIFAR10_CLASSES, images))
    check(cfg)
    cfg.merge_from_list(["DATASETS.TRAIN", "('cifar10_fit',)", "DATASETS.TEST", "('cifar10_val',)"])
    check(cfg)
    held_out, rest = map(DatasetCatalog.get, (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN))
    assert [record["label"] for record in held_out] == list(range(10))  # the same of each class
    everything = DatasetCatalog.get("cifar10_jpeg_train")
    assert sorted(held_out + rest, key=lambda record: record["image_id"]) == everything
    cfg.merge_from_list(["DATASETS.TEST", "('cifar10_test',)"])
    (name,) = cfg.DATASETS.TEST
    assert tuple(MetadataCatalog.get(name).thing_classes) == CIFAR10_CLASSES
    assert [record["label"] for record in DatasetCatalog.get(name)] == list(range(10))
    evaluator = Trainer.build_evaluator(cfg, name)
    evaluator.process({"label": torch.arange(10)}, {"probabilities": torch.eye(10)})
    evaluator.evaluate()
    said = json.loads(Path("output/inference", name, "classification_results.json").read_text())
    assert said["dataset"] == name == "cifar10_jpeg_test"


# Checks before training --------------------------------------------------------------------------


def pets(**options):
    folders = ["own_train", "pets/train"], ["own_val", "pets/val"]
    return image_config(*folders, train=("own_train",), test=("own_val",), **options)


def test_only_what_is_used_is_needed(root):
    write_images(Path("pets/val"), cat=1, dog=1)
    check(pets(), training=False)
    with pytest.raises(FileNotFoundError, match="'own_train': '.*pets/train' has to hold") as error:
        check(pets())
    for place in (Path.cwd(), root):  # both that were looked at
        assert str(place) in str(error.value)
    for key, training in (("TRAIN", True), ("TEST", False)):
        cfg = pets()
        cfg.DATASETS[key] = ()
        with pytest.raises(ValueError, match=f"DATASETS.{key} names no data set"):
            check(cfg, training=training)


def test_classes_without_images_are_named():
    write_images(Path("pets/train"), a=1, b=0, c=0, d=0, e=0)
    Path("pets/train/b/readme.txt").touch()
    Path("pets/train/c/below").mkdir()
    message = r"4 of 5 class folders hold no image \(b, c, d, \.\.\.\)"
    with pytest.raises(FileNotFoundError, match=message):
        check(pets())


def test_data_set_of_ones_own_has_to_say_its_classes():
    DatasetCatalog.register("own_code", lambda: [])
    MetadataCatalog.get("own_code").evaluator_type = "classification"
    with pytest.raises(ValueError, match="'own_code' does not say its classes.*thing_classes"):
        check(image_config(train=("own_code",)))


def test_kinds_of_data_and_models_have_to_fit(root):
    DatasetCatalog.register("own_pictures", lambda: [])
    cfg = image_config(train=("cifar10_train",))
    for cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "FeedbackRetinaNet", "NoSuchThing"):
        with pytest.raises(ValueError, match="'cifar10_train' is for classification.*Classifier'"):
            check(cfg)
    for name in ("coco_2017_val", "shapes_train", "own_pictures"):
        message = f"'ImageClassifier', but data set '{name}' is not for"
        with pytest.raises(ValueError, match=message):
            check(image_config(train=(name,)))
    assert not list(root.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("INPUT.CLASSIFICATION.TRANSFORM crop", "'crop'; choose 'resized_crop' or 'pad_crop' or"),
        ("INPUT.CLASSIFICATION.SIZE 0", "SIZE is 0; choose at least 1"),
        ("INPUT.CLASSIFICATION.SIZE 300", "RESIZE is 256; choose at least SIZE, 300"),
        (
            "INPUT.CLASSIFICATION.TRANSFORM pad_crop INPUT.CLASSIFICATION.PAD -1",
            "PAD is -1; choose at least 0",
        ),
        ("INPUT.RANDOM_FLIP diagonal", "INPUT.RANDOM_FLIP is 'diagonal'; choose 'horizontal'"),
        ("INPUT.FORMAT HSV", "INPUT.FORMAT is 'HSV'; choose 'RGB' or 'BGR' or"),
        ("INPUT.FORMAT L", "FORMAT is 'L' and MODEL.PIXEL_MEAN .*; choose a list of 1"),
        ("DATALOADER.UNREADABLE_IMAGES ignore", "'ignore'; choose 'error' or 'skip'"),
        ("DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler", "choose 'TrainingSampler'"),
        ("TEST.CLASSIFICATION.IMS_PER_BATCH 0", "IMS_PER_BATCH is 0; choose at least 1"),
    ],
)
def test_options_are_checked(options, message):
    cfg = image_config(train=("cifar10_train",), test=("cifar10_test",))
    cfg.merge_from_list(options.split())
    with pytest.raises(ValueError, match=message):
        check(cfg)


# ImageNet ----------------------------------------------------------------------------------------


def test_imagenet_with_its_defaults(root):
    """1000 synsets in the usual layout; the folder of data sets is read at use."""
    cfg = image_config(train=("imagenet_train",), test=("imagenet_val",), classes=1000)
    with pytest.raises(FileNotFoundError, match=f"'{root}/imagenet/train' has to hold"):
        check(cfg)
    synsets = [f"n{4 * i:08d}" for i in range(1000)]
    for synset in synsets[::-1]:
        for name in (f"train/{synset}/{synset}_1.JPEG", f"val/{synset}/ILSVRC2012_val_1.JPEG"):
            file = root / "imagenet" / name
            file.parent.mkdir(parents=True)
            file.touch()
    check(cfg)
    for split in ("train", "val"):
        assert MetadataCatalog.get(f"imagenet_{split}").thing_classes == synsets
        found = DatasetCatalog.get(f"imagenet_{split}")
        assert [Path(r["file_name"]).parent.name for r in found] == synsets
        assert [r["label"] for r in found] == list(range(1000))
    shutil.rmtree(root / "imagenet/val" / synsets[7])
    with pytest.raises(ValueError, match=f"differ: 'imagenet_val' lacks {synsets[7]}"):
        check(cfg)


# CIFAR-10 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small archive in CIFAR-10's format, its files' MD5 sums and its batches."""
    folder = tmp_path_factory.mktemp("original") / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    batches = {
        name: {
            "data": generator.integers(0, 256, (4, 3072), dtype=np.uint8),
            "labels": generator.integers(0, 10, 4).tolist(),
        }
        for name, _ in CIFAR10.train_list + CIFAR10.test_list
    }
    sums = {}
    for name, content in [*batches.items(), ("batches.meta", {"label_names": CIFAR10_CLASSES})]:
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    file = folder.with_name(CIFAR10.filename)
    with tarfile.open(file, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    return file, sums, batches


@pytest.fixture
def archive(original, monkeypatch):
    """The small archive, which torchvision takes for the original one."""
    file, sums, _ = original
    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(CIFAR10, part)]
        monkeypatch.setattr(CIFAR10, part, [[name, sums[name]] for name in names])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody's
    return file


def assert_cifar10(original, *splits):
    for split in splits:
        _, _, batches = original
        chosen = [b for name, b in batches.items() if name.startswith("test") == (split == "test")]
        rows = np.concatenate([b["data"] for b in chosen])
        found = DatasetCatalog.get(f"cifar10_{split}")
        assert [r["label"] for r in found] == sum((b["labels"] for b in chosen), [])
        assert [r["file_name"] for r in found] == [f"cifar10/{split}/{i}" for i in range(len(rows))]
        assert [r["image_id"] for r in found] == list(range(len(rows)))
        images = np.stack([r["image"] for r in found])
        # A row has the red, the green and the blue pixels, each line by line.
        assert images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
        assert (images.transpose(0, 3, 1, 2).reshape(len(rows), -1) == rows).all()


def cifar10(download=False):
    cfg = image_config(train=("cifar10_train",), test=("cifar10_test",), classes=10)
    cfg.DATASETS.DOWNLOAD = download
    return cfg


def put(archive, root, cut=None):
    (root / "cifar10").mkdir()
    (root / "cifar10" / archive.name).write_bytes(archive.read_bytes()[:cut])


def test_cifar10_from_its_unpacked_archive(original, archive, root):
    shutil.copytree(archive.parent / CIFAR10.base_folder, root / "cifar10" / CIFAR10.base_folder)
    check(cifar10())
    assert_cifar10(original, "train", "test")
    held_out = [record["file_name"] for record in DatasetCatalog.get("cifar10_val")]
    assert held_out == ["cifar10/train/18", "cifar10/train/19"]  # a tenth of 20
    assert len(DatasetCatalog.get("cifar10_fit")) == 18
    assert MetadataCatalog.get("cifar10_train").thing_classes[3] == "cat"
    assert not (root / "cifar10.lock").exists()  # nothing is written


def test_cifar10_from_its_archive(original, archive, root):
    put(archive, root)
    check(cifar10())
    assert_cifar10(original, "test", "train")
    (root / "cifar10" / CIFAR10.base_folder / "data_batch_3").write_bytes(b"")  # unpacked again
    assert_cifar10(original, "train")


def test_cifar10_is_downloaded_once(original, archive, root, monkeypatch):
    requests = []

    def download(url, folder, filename, md5):
        requests.append(url)
        put(archive, root)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(check, [cifar10(download=True)] * 3))
    assert_cifar10(original, "train", "test")
    assert requests == [CIFAR10.url]


@pytest.mark.parametrize("broken", [False, True])
def test_what_is_to_be_done_without_cifar10(archive, root, broken):
    """Nothing is downloaded unasked, and a damaged archive does not pass for the original."""
    if broken:
        put(archive, root, cut=-100)
    before = list(root.rglob("*"))
    for look, message in (
        (lambda: check(cifar10()), "set DATASETS.DOWNLOAD True"),
        (lambda: DatasetCatalog.get("cifar10_train"), "set DATASETS.DOWNLOAD True"),
        (lambda: check(cifar10(download=True)), "failed .*refused"),  # there is no network
    ):
        with pytest.raises(FileNotFoundError, match=f"CIFAR-10 is not in '.*{message}") as error:
            look()
        for part in (f"'{root / 'cifar10'}'", f"'{CIFAR10.filename}'", CIFAR10.base_folder):
            assert part in str(error.value)
        assert CIFAR10.url in str(error.value)
        if "DOWNLOAD" in message:
            assert list(root.rglob("*")) == before


# MNIST -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "reader", "title"),
    [("mnist", MNIST, "MNIST"), ("fashion_mnist", FashionMNIST, "Fashion-MNIST")],
)
def test_mnist_in_its_own_format(name, reader, title, packed, root, monkeypatch):
    folder = root / reader.__name__ / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    resources = []
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(
                f">{array.ndim}I", *array.shape
            )
            content = head + array.tobytes()
            file = folder / f"{part}-{kind}-ubyte"
            archive = gzip.compress(content)
            resources.append((f"{file.name}.gz", hashlib.md5(archive).hexdigest()))
            if packed:
                file.with_suffix(".gz").write_bytes(archive)
            else:
                file.write_bytes(content)
    monkeypatch.setattr(reader, "resources", resources)
    monkeypatch.setattr(reader, "mirrors", ["http://127.0.0.1:9/"])  # nobody's
    cfg = image_config(train=(f"{name}_train",), test=(f"{name}_test",), classes=10)
    check(cfg)
    for split in ("train", "test"):
        found = DatasetCatalog.get(f"{name}_{split}")
        assert [record["label"] for record in found] == [0, 1, 2, 3, 4, 5]
        assert (np.stack([record["image"] for record in found]) == images).all()
    train, fit, val = (DatasetCatalog.get(f"{name}_{split}") for split in ("train", "fit", "val"))
    key = itemgetter("file_name", "image_id", "label")
    assert [*map(key, fit + val)] == [*map(key, train)] and len(val) == 1
    assert len(MetadataCatalog.get(f"{name}_val").thing_classes) == 10
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=f"{title} is not in '{folder}': set DATASETS.DOWN"):
        check(cfg)
