import hashlib
import http.server
import logging
import pickle
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from image_utils import datasets_folder, image_config, write_images
from torchvision.datasets import CIFAR10, ImageFolder

from ss_detectron.data import (
    CIFAR10_CLASSES,
    check_datasets,
    register_image_folders_from_config,
)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    with datasets_folder(tmp_path, monkeypatch) as folder:
        yield folder


def check(cfg, **kwargs):
    register_image_folders_from_config(cfg)
    check_datasets(cfg, **kwargs)


# One's own folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["yaml", "command line"])
def test_own_folder_by_config(form):
    files = write_images(Path("pets/train"), cat=3, dog=2)
    cfg = image_config()
    if form == "yaml":
        Path("my.yaml").write_text(
            'DATASETS:\n  IMAGE_FOLDERS:\n    - [own_pets, pets/train]\n  TRAIN: ("own_pets",)\n'
        )
        cfg.merge_from_file("my.yaml")
    else:
        cfg.merge_from_list(
            ["DATASETS.IMAGE_FOLDERS", "[('own_pets','pets/train')]"]
            + ["DATASETS.TRAIN", "('own_pets',)"]
        )
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


def test_paths_are_looked_for_here_then_in_the_datasets_folder(root):
    write_images(root / "pets", cat=1, dog=1)
    check(image_config(["own_pets", "pets"], train=("own_pets",)))
    assert MetadataCatalog.get("own_pets").image_root == str(root / "pets")
    write_images(Path("pets"), cat=1, dog=1)
    check(image_config(["own_near", "pets"], train=("own_near",)))
    assert MetadataCatalog.get("own_near").image_root == str(Path("pets").absolute())


def test_same_entry_twice_is_one_data_set():
    write_images(Path("pets"), cat=1, dog=2)
    cfg = image_config(["own_pets", "pets"], ("own_pets", "pets"), train=("own_pets",))
    check(cfg)
    check(cfg)
    assert len(DatasetCatalog.get("own_pets")) == 3


def test_registering_looks_at_no_file(root):
    register_image_folders_from_config(image_config(["own_pets", "pets"]))
    assert not list(root.iterdir()) and not list(Path.cwd().iterdir())


def test_one_name_for_two_data_sets_is_refused():
    cfg = image_config(["own_pets", "pets"], ["own_pets", "more/pets"])
    with pytest.raises(
        ValueError, match="'own_pets' in DATASETS.IMAGE_FOLDERS is taken.*more/pets"
    ):
        register_image_folders_from_config(cfg)


@pytest.mark.parametrize("name", ["coco_2017_val", "shapes_train", "cifar10_test", "imagenet_val"])
def test_name_of_a_known_data_set_is_refused(name, root):
    with pytest.raises(ValueError, match=f"'{name}'.* is taken.*Choose another name"):
        register_image_folders_from_config(image_config([name, "pets"]))
    assert not list(root.iterdir())


@pytest.mark.parametrize(
    "entry", ["own", ["own"], ["own", 3], ["", "a"], ["own", "a", "b"], None, ["own", None]]
)
def test_malformed_entry_is_refused(entry):
    with pytest.raises(ValueError, match=r"IMAGE_FOLDERS is a list of \[name, folder\]") as error:
        register_image_folders_from_config(image_config(entry))
    assert f"the entry {entry!r}" in str(error.value)


# Checks before training --------------------------------------------------------------------------


def pets(**options):
    folders = ["own_train", "pets/train"], ["own_val", "pets/val"]
    return image_config(*folders, train=("own_train",), test=("own_val",), **options)


def test_unregistered_name_comes_with_close_ones_and_the_remedy():
    with pytest.raises(ValueError, match="'imagenet_vall' is.*'imagenet_val'.*IMAGE_FOLDERS"):
        check_datasets(image_config(test=("imagenet_vall",)), training=False)


def test_training_and_evaluation_need_a_data_set_each():
    write_images(Path("pets"), cat=1, dog=1)
    folder, name = ["own_pets", "pets"], ("own_pets",)
    with pytest.raises(ValueError, match="DATASETS.TRAIN names no data set"):
        check(image_config(folder, test=name))
    with pytest.raises(ValueError, match="DATASETS.TEST names no data set"):
        check(image_config(folder, train=name), training=False)
    check(image_config(folder, train=name))
    check(image_config(folder, test=name), training=False)


def test_evaluation_does_not_need_the_train_set():
    write_images(Path("pets/val"), cat=1, dog=1)
    with pytest.raises(FileNotFoundError, match="own_train"):
        check(pets())
    check(pets(), training=False)


def test_missing_own_folder_names_both_places_looked_at(root):
    with pytest.raises(FileNotFoundError, match="'own_train': there is no folder '.*") as error:
        check(pets())
    for part in ("pets/train", str(Path.cwd()), str(root)):
        assert part in str(error.value)


def test_missing_imagenet_names_where_it_should_be(root):
    expected = f"'imagenet_train': there is no folder '{root}/imagenet/train'.*DETECTRON2_DATASETS"
    with pytest.raises(FileNotFoundError, match=expected):
        check(image_config(train=("imagenet_train",)))


def test_empty_class_folders_are_named():
    write_images(Path("pets/train"), ant=1, bee=0, cat=1, dog=0)
    Path("pets/train/bee/readme.txt").touch()
    Path("pets/train/dog/below").mkdir()
    write_images(Path("pets/val"), ant=1, bee=1, cat=1, dog=1)
    with pytest.raises(FileNotFoundError, match=r"2 of 4 class folders hold no image \(bee, dog\)"):
        check(pets(classes=4))


def test_many_empty_class_folders_are_cut_short():
    write_images(Path("pets/train"), **dict.fromkeys("abcdefg", 0))
    with pytest.raises(FileNotFoundError, match=r"7 of 7 class.*\(a, b, c, d, e, \.\.\.\)"):
        check(pets(classes=7))


def test_folders_without_classes():
    write_images(Path("flat"), train=2)
    write_images(Path("pets/val"), cat=1, dog=1)
    cfg = image_config(["own_flat", "flat/train"], train=("own_flat",))
    with pytest.raises(FileNotFoundError, match="2 images, but no folders: it has to hold one"):
        check(cfg)
    for file in Path("flat/train").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="'own_flat': '.*flat/train' holds no folders: it"):
        check(cfg)


def test_images_beside_the_class_folders_are_mentioned(caplog):
    write_images(Path("pets/train"), cat=1, dog=1)
    cfg = image_config(["own_train", "pets/train"], train=("own_train",))
    check(cfg)
    assert not caplog.records
    shutil.copy("pets/train/cat/0000.png", "pets/train/stray.png")
    check(cfg)
    assert "1 images in '" in caplog.text and "they are not used" in caplog.text
    assert len(DatasetCatalog.get("own_train")) == 2


def test_classes_that_differ_are_named():
    write_images(Path("pets/train"), ant=1, bee=1, cat=1)
    write_images(Path("pets/val"), ant=1, bees=1, cat=1)
    expected = (
        r"'own_train' and 'own_val' differ in their classes \(only 'own_train' has bee; only "
        r"'own_val' has bees\)\. "
    )
    with pytest.raises(ValueError, match=expected):
        check(pets(classes=3))
    shutil.rmtree("pets/val/bees")
    with pytest.raises(ValueError, match=r"classes \(only 'own_train' has bee\)\. All"):
        check(pets(classes=3))


def test_classes_in_another_order_are_refused():
    for name, classes in (("own_a", ["x", "y"]), ("own_b", ["y", "x"])):
        DatasetCatalog.register(name, lambda: [])
        MetadataCatalog.get(name).set(evaluator_type="classification", thing_classes=classes)
    with pytest.raises(ValueError, match="'own_a' and 'own_b' differ.*another order"):
        check(image_config(train=("own_a",), test=("own_b",)))


def test_number_of_classes_has_to_fit_the_model():
    for split in ("train", "val"):
        write_images(Path("pets") / split, ant=1, bee=1, cat=1)
    check(pets(classes=3))
    expected = "'own_train' has 3 classes, .* to 1000: set MODEL.IMAGE_CLASSIFIER.NUM_CLASSES to 3"
    with pytest.raises(ValueError, match=expected):
        check(pets(classes=1000))


def test_data_set_of_ones_own_has_to_say_its_classes():
    DatasetCatalog.register("own_code", lambda: [])
    MetadataCatalog.get("own_code").evaluator_type = "classification"
    with pytest.raises(ValueError, match="'own_code' does not say its classes.*thing_classes"):
        check(image_config(train=("own_code",)))


def test_classification_data_need_a_classifier():
    cfg = image_config(train=("cifar10_train",))
    for cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "FeedbackRetinaNet", "NoSuchThing"):
        with pytest.raises(ValueError, match="'cifar10_train' is for classification.*Classifier'"):
            check(cfg)


@pytest.mark.parametrize("name", ["coco_2017_val", "shapes_train", "own_pictures"])
def test_classifiers_need_classification_data(name, root):
    DatasetCatalog.register("own_pictures", lambda: [])
    with pytest.raises(ValueError, match=f"'ImageClassifier', but data set '{name}' is not for"):
        check(image_config(train=(name,)))
    assert not list(root.iterdir())


def test_detection_data_are_checked_as_such(root):
    cfg = image_config(train=("shapes_train",))
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    (root / "shapes").touch()
    with pytest.raises(FileExistsError, match="was not generated by version 1 of shapes"):
        check(cfg)
    (root / "shapes").unlink()
    cfg.DATASETS.TRAIN = ("own_sky",)
    DatasetCatalog.register("own_sky", lambda: [])
    MetadataCatalog.get("own_sky").set(json_file=str(root / "sky.json"), image_root=str(root))
    with pytest.raises(
        FileNotFoundError, match="'own_sky': there is no annotation file '.*sky.json'"
    ):
        check(cfg)


def test_options_are_checked():
    for split in ("train", "val"):
        write_images(Path("pets") / split, cat=1, dog=1)
    for key, value, message in (
        ("INPUT.CLASSIFICATION.TRANSFORM", "crop", "TRANSFORM is 'crop'"),
        ("INPUT.CLASSIFICATION.RESIZE", 223, "RESIZE is 223"),
        ("DATALOADER.UNREADABLE_IMAGES", "ignore", "'ignore'; choose 'error' or 'skip'"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "choose 'TrainingSampler'"),
        ("TEST.CLASSIFICATION.IMS_PER_BATCH", 0, "IMS_PER_BATCH is 0; choose at least 1"),
    ):
        cfg = pets()
        cfg.merge_from_list([key, value])
        with pytest.raises(ValueError, match=message):
            check(cfg)


# ImageNet ----------------------------------------------------------------------------------------


def test_imagenet_with_its_defaults(root):
    """1000 synsets in the usual layout; the folder of data sets is read at use."""
    synsets = [f"n{4 * i:08d}" for i in range(1000)]
    write_images(root / "first", one=1)
    content = (root / "first/one/0000.png").read_bytes()
    for synset in synsets[::-1]:
        for name in (f"train/{synset}/{synset}_1.JPEG", f"val/{synset}/ILSVRC2012_val_1.JPEG"):
            file = root / "imagenet" / name
            file.parent.mkdir(parents=True)
            file.write_bytes(content)
    check(image_config(train=("imagenet_train",), test=("imagenet_val",), classes=1000))
    for split in ("train", "val"):
        assert MetadataCatalog.get(f"imagenet_{split}").thing_classes == synsets
        found = DatasetCatalog.get(f"imagenet_{split}")
        assert [Path(r["file_name"]).parent.name for r in found] == synsets
        assert [r["label"] for r in found] == list(range(1000))
    shutil.rmtree(root / "imagenet/val" / synsets[7])
    with pytest.raises(ValueError, match=rf"\(only 'imagenet_train' has {synsets[7]}\)"):
        check(image_config(train=("imagenet_train",), test=("imagenet_val",), classes=1000))


# CIFAR-10 ----------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's format, which torchvision takes for the original one."""
    folder = tmp_path / "original" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    sums = {}

    def save(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        save(name, {"data": data, "labels": generator.integers(0, 10, 4).tolist()})
    save("batches.meta", {"label_names": list(CIFAR10_CLASSES)})
    file = tmp_path / "original" / CIFAR10.filename
    with tarfile.open(file, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(CIFAR10, part)]
        monkeypatch.setattr(CIFAR10, part, [[name, sums[name]] for name in names])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody's
    return file


@pytest.fixture
def web(archive, monkeypatch):
    """The address of a web server of the archive, and the requests it got."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            requests.append(form % args)

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = partial(Handler, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


def assert_cifar10(archive, split):
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    batches = [
        pickle.loads((archive.parent / CIFAR10.base_folder / name).read_bytes()) for name in names
    ]
    rows = np.concatenate([b["data"] for b in batches])
    labels = sum((b["labels"] for b in batches), [])
    found = DatasetCatalog.get(f"cifar10_{split}")
    assert [r["label"] for r in found] == labels
    assert [r["file_name"] for r in found] == [f"cifar10/{split}/{i}" for i in range(len(labels))]
    assert [r["image_id"] for r in found] == list(range(len(labels)))
    for record, row in zip(found, rows, strict=True):
        assert record["image"].dtype == np.uint8
        # A row has the red, the green and the blue pixels, each line by line.
        assert (record["image"][2, 5] == row[[2 * 32 + 5, 1024 + 2 * 32 + 5, 2048 + 69]]).all()
        assert (record["image"].transpose(2, 0, 1).ravel() == row).all()


def cifar10(download=False):
    cfg = image_config(train=("cifar10_train",), test=("cifar10_test",), classes=10)
    cfg.DATASETS.DOWNLOAD = download
    return cfg


def test_cifar10_from_its_unpacked_archive(archive, root, caplog):
    caplog.set_level(logging.INFO, "ss_detectron")
    shutil.copytree(archive.parent / CIFAR10.base_folder, root / "cifar10" / CIFAR10.base_folder)
    check(cifar10())
    assert_cifar10(archive, "train")
    assert_cifar10(archive, "test")
    assert MetadataCatalog.get("cifar10_train").thing_classes[3] == "cat"
    assert not caplog.records and not (root / "cifar10.lock").exists()


def test_cifar10_from_its_archive(archive, root, caplog):
    caplog.set_level(logging.INFO, "ss_detectron")
    (root / "cifar10").mkdir()
    shutil.copy(archive, root / "cifar10")
    check(cifar10())
    assert_cifar10(archive, "test")
    assert_cifar10(archive, "train")
    assert "downloading" not in caplog.text


def test_cifar10_with_a_damaged_file_is_unpacked_again(archive, root):
    (root / "cifar10").mkdir()
    shutil.copy(archive, root / "cifar10")
    DatasetCatalog.get("cifar10_train")
    (root / "cifar10" / CIFAR10.base_folder / "data_batch_3").write_bytes(b"")
    assert_cifar10(archive, "train")


def test_cifar10_is_downloaded_once_and_announced(archive, web, root, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ss_detectron")
    address, requests = web
    url = f"{address}/{CIFAR10.filename}"
    monkeypatch.setattr(CIFAR10, "url", url)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(check, [cifar10(download=True)] * 3))
    assert_cifar10(archive, "train")
    assert_cifar10(archive, "test")
    assert len(requests) == 2  # torchvision asks for redirections first
    announced = [r.getMessage() for r in caplog.records if "downloading" in r.getMessage()]
    assert len(announced) == 1
    for part in (url, str(root / "cifar10"), "Without a network, put the archive", CIFAR10.tgz_md5):
        assert part in announced[0]


@pytest.mark.parametrize("broken", [False, True])
def test_cifar10_is_not_downloaded_unless_the_config_says_so(
    archive, web, root, broken, monkeypatch
):
    monkeypatch.setattr(CIFAR10, "url", f"{web[0]}/{CIFAR10.filename}")
    if broken:
        (root / "cifar10").mkdir()
        (root / "cifar10" / CIFAR10.filename).write_bytes(archive.read_bytes()[:-100])
    before = list(root.rglob("*"))
    for look in (lambda: check(cifar10()), lambda: DatasetCatalog.get("cifar10_train")):
        with pytest.raises(FileNotFoundError, match="set DATASETS.DOWNLOAD True") as error:
            look()
        for part in (CIFAR10.url, f"'{root / 'cifar10'}'", f"'{CIFAR10.filename}'"):
            assert part in str(error.value)
    assert not web[1] and list(root.rglob("*")) == before


@pytest.mark.parametrize("broken", [False, True])
def test_cifar10_without_a_network(archive, root, broken):
    """It says what to put where; a damaged archive does not pass for the original."""
    if broken:
        (root / "cifar10").mkdir()
        (root / "cifar10" / CIFAR10.filename).write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match="CIFAR-10 is not in '.*refused") as error:
        check(cifar10(download=True))
    for part in (
        CIFAR10.url,
        f"'{root / 'cifar10'}'",
        f"'{CIFAR10.filename}'",
        CIFAR10.base_folder,
    ):
        assert part in str(error.value)


def test_another_file_than_cifar10_is_not_taken(archive, web, root, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", f"{web[0]}/")
    with pytest.raises(FileNotFoundError, match="fetching it from .* failed .*orrupted"):
        check(cifar10(download=True))


def test_cifar10_is_an_image_set_like_any_other(archive, root):
    (root / "cifar10").mkdir()
    shutil.copy(archive, root / "cifar10")
    with pytest.raises(ValueError, match="'cifar10_train' has 10 classes.* 100: set .* to 10"):
        cfg = cifar10()
        cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES = 100
        check(cfg)
    write_images(Path("pets"), cat=1, dog=1)
    with pytest.raises(ValueError, match=r"\(only 'cifar10_train' has airplane, .*, \.\.\.\)"):
        check(image_config(["own", "pets"], train=("cifar10_train",), test=("own",), classes=10))
