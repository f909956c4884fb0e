"""One's own data sets in COCO's form by config keys, and the checks before training."""

import json
from itertools import islice
from pathlib import Path

import pytest
from coco_utils import BOXES, coco_config, write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ss_detectron.data import (
    build_resumable_detection_train_loader,
    check_datasets,
    register_coco_from_config,
)

pytestmark = pytest.mark.usefixtures("root")


def own(folder="sky", name="own_sky"):
    return [name, f"{folder}/labels.json", f"{folder}/images"]


def check(cfg, **kwargs):
    register_coco_from_config(cfg)
    check_datasets(cfg, **kwargs)


# One's own data by config -------------------------------------------------------------------------


def test_own_data_set_reaches_the_train_loader():
    write_coco()
    cfg = coco_config(entries=(), train=())
    Path("my.yaml").write_text(
        "DATASETS:\n"
        "  COCO_INSTANCES:\n"
        "    - [own_sky, sky/labels.json, sky/images]\n"
        '  TRAIN: ("own_sky",)\n'
    )
    cfg.merge_from_file("my.yaml")
    for _ in range(2):  # the second time changes nothing
        check(cfg)
    found = {}
    for image in sum(islice(build_resumable_detection_train_loader(cfg), 4), []):
        objects = image["instances"]
        boxes = [tuple(box) for box in objects.gt_boxes.tensor.tolist()]
        found[image["image_id"]] = boxes, objects.gt_classes.tolist()
        assert image["image"].shape == (3, 48, 64)
    assert found == {i: (boxes, [i % 2]) for i, boxes in BOXES.items()}


def test_paths_are_looked_for_here_then_in_the_datasets_folder(root):
    write_coco(folder=root / "sky")
    check(coco_config())
    assert MetadataCatalog.get("own_sky").json_file == str(root / "sky" / "labels.json")
    write_coco()
    register_coco_from_config(coco_config(entries=[own(name="own_near")]))
    assert MetadataCatalog.get("own_near").json_file == str(Path("sky/labels.json").absolute())


@pytest.mark.parametrize("name", ["own_sea", "coco_2017_val", "shapes_train", "voc_2007_train"])
def test_one_name_for_two_data_sets_is_refused(name, root):
    entries = [own("sea", "own_sea"), own(name=name)]
    with pytest.raises(ValueError, match=f"'{name}'.* is taken.*sky/labels.*Choose another name"):
        register_coco_from_config(coco_config(entries=entries))
    assert not list(root.iterdir())  # not even the shapes are generated


@pytest.mark.parametrize(
    "entry", ["own_sky", ["own_sky", "a.json"], ["own_sky", "a.json", 3], ["", "a", "b"], None]
)
def test_malformed_entry_is_refused(entry):
    with pytest.raises(ValueError, match=r"\[name, annotation file, image folder\]") as error:
        register_coco_from_config(coco_config(entries=[entry]))
    assert f"the entry {entry!r}" in str(error.value)


# Checks before training ---------------------------------------------------------------------------


def test_unregistered_name_comes_with_close_ones_and_the_remedy():
    with pytest.raises(ValueError, match="'coco_2017_vall' is.*'coco_2017_val'.*COCO_INSTANCES"):
        check(coco_config(train=("coco_2017_vall",)))
    with pytest.raises(ValueError, match="'zzz' is registered. Lists of your"):
        check(coco_config(train=("zzz",)))


def test_missing_files_are_named(root):
    with pytest.raises(FileNotFoundError, match="'own_sky': there is no annotation file") as error:
        check(coco_config())
    for part in ("sky/labels.json", str(Path.cwd()), str(root)):  # both places looked at
        assert part in str(error.value)
    write_coco()
    for file in Path("sky/images").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="'own_sky': there is no image folder '.*images'"):
        check(coco_config())


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("FeedbackRetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
        ("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("SemanticSegmentor", None),
    ],
)
def test_number_of_classes_has_to_fit_the_model(architecture, key):
    write_coco()
    cfg = coco_config("MODEL.META_ARCHITECTURE", architecture)
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    if key:
        with pytest.raises(
            ValueError, match=f"'own_sky' has 2 classes .kite, balloon.* to 80: set {key} to 2"
        ):
            check(cfg)
        cfg.merge_from_list([key, 2])
    check(cfg)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("balloon", "kite"), "their order does"),
        (("kites", "balloon"), "'own_sea' lacks kite; 'own_sky' lacks kites"),
        (("balloon",), "'own_sea' lacks kite"),
        (("kite", "balloon", "moon"), "'own_sky' lacks moon"),
    ],
)
def test_train_and_test_need_the_same_classes(classes, message):
    write_coco()
    write_coco(folder="sea", classes=classes)
    cfg = coco_config(entries=[own(), own("sea", "own_sea")], test=("own_sea",))
    with pytest.raises(ValueError, match=f"'own_sky' and 'own_sea' differ: {message}. All .* List"):
        check(cfg)
    if len(classes) != 2:  # not trained on, but of another model by its keys
        with pytest.raises(ValueError, match="set to 2: .* if it was trained on these. Else: list"):
            check(cfg, training=False)
    cfg.MODEL.RETINANET.NUM_CLASSES = len(classes)
    check(cfg, training=False)


def test_ids_of_a_test_set_are_of_one_kind():
    """VIA writes those of images as strings: training would end at its first evaluation."""
    write_coco()
    write_coco(lambda c: [i.update(id=str(i["id"])) for i in c["images"]] and None, folder="sea")
    cfg = coco_config(entries=[own(), own("sea", "own_sea")], test=("own_sea",))
    with pytest.raises(ValueError, match="Data set 'own_sea'.* has the image_id 0, expected .*'0'"):
        check(cfg)


def test_classes_without_objects_are_named(caplog):
    """Such as the supercategory that Roboflow lists first."""

    def add_parent(content):
        content["categories"].insert(0, {"id": 0, "name": "sky", "supercategory": "none"})
        for category in content["categories"][1:]:
            category["supercategory"] = "sky"

    write_coco(add_parent)
    cfg = coco_config(train=("own_sky",), test=())
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    check(cfg)
    assert "1 of 3 categories have no objects: sky. They are classes like the others" in caplog.text


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("images/1.jpg", "1.jpg"),
        ("..\\upload\\1.jpg", "1.jpg"),
        ("images/1a2b3c4d-1.jpg", "1.jpg"),
        ("1_jpg.rf.0a1b2c3d4e5f.jpg", "1.jpg"),
        ("/data/local-files/?d=set%201/1.JPG", "1.jpg"),
        ("1.jpg", "below/1.jpg"),
        ("1.jpg", "1.JPEG"),
    ],
)
def test_images_under_other_names_are_named(name, file):
    write_coco(lambda content: content["images"][1].update(file_name=name))
    Path("sky/images/below").mkdir()
    Path("sky/images/1.jpg").rename(Path("sky/images", file))
    with pytest.raises(FileNotFoundError) as error:
        check(coco_config())
    assert f"1 seem to be there: '{name}' as '{file}'. Write these" in str(error.value)


def test_what_is_repaired_needs_an_entry_of_the_config():
    """Detectron2 reads the file itself, where one's own code has registered it."""
    write_coco(lambda content: b"\xef\xbb\xbf" + json.dumps(content).encode())
    register_coco_instances("own_code", {}, "sky/labels.json", "sky/images")
    with pytest.raises(ValueError, match="'own_code'.* only be used as repaired.*COCO_INSTANCES"):
        check(coco_config(train=("own_code",), test=()))


def test_the_repaired_file_is_what_the_file_is_by_then():
    write_coco()
    check(coco_config())
    metadata = MetadataCatalog.get("own_sky")
    assert metadata.json_file == str(Path("sky/labels.json").absolute())
    for number in (7.0, 8.0):
        write_coco(lambda content, number=number: content["images"][1].update(id=number))
        assert metadata.json_file != str(Path("sky/labels.json").absolute())
        found = [image["image_id"] for image in DatasetCatalog.get("own_sky")]
        assert found == [0, 2, 3, number] and type(found[-1]) is int


@pytest.mark.parametrize(("form", "channels"), [("L", 1), ("BGR", 3), ("YUV-BT.601", 3)])
def test_pixel_means_are_those_of_the_format(form, channels):
    """Three of an image of one channel would be broadcast, and train on three."""
    write_coco()
    keys = ["MODEL.PIXEL_MEAN", [9.0] * channels, "MODEL.PIXEL_STD", [9.0] * channels]
    cfg = coco_config("INPUT.FORMAT", form, *keys)
    check(cfg)
    for key in keys[::2]:
        other = cfg.clone()
        other.merge_from_list([key, [9.0] * (4 - channels)])
        with pytest.raises(ValueError, match=f"'{form}' and {key} .*; choose a list of {channels}"):
            check(other)


def test_builtin_annotations_are_not_parsed(root):
    """COCO's take seconds and gigabytes to read, and its classes are known."""
    DatasetCatalog.register("own_known", lambda: [])
    (root / "images" / "0").mkdir(parents=True)
    (root / "labels.json").write_text("never read")
    MetadataCatalog.get("own_known").set(
        json_file=str(root / "labels.json"),
        image_root=str(root / "images"),
        thing_classes=MetadataCatalog.get("coco_2017_val").thing_classes,
    )
    with pytest.raises(ValueError, match="'own_known' has 80 classes.*to 2"):
        check(coco_config(train=("own_known",), test=()))


def test_other_kinds_of_data_sets_are_taken():
    DatasetCatalog.register("own_pictures", lambda: [])
    check(coco_config(train=("own_pictures",), test=()))
