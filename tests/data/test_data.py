import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from PIL import Image

from ss_detectron import add_ss_config
from ss_detectron.data import (
    check_datasets,
    register_coco_from_config,
    register_shapes,
)
from ss_detectron.data.shapes import SHAPES


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty folder of data sets, an empty current folder beside it, catalogs put right after."""
    (tmp_path / "sets").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    monkeypatch.chdir(tmp_path / "here")
    before = set(DatasetCatalog.list())
    yield tmp_path / "sets"
    shapes = {"shapes_train", "shapes_val"}  # loading them adds to their metadata
    for name in set(DatasetCatalog.list()) - before | shapes:
        DatasetCatalog.remove(name)
        if name in MetadataCatalog:
            MetadataCatalog.remove(name)
    register_shapes()


def write_coco(folder: Path, classes=("balloon", "kite"), pictures=4, **changes) -> None:
    """``folder/labels.json`` and ``folder/images`` with one object in every picture."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(pictures):
        picture = np.full((48, 64, 3), 10 * i, dtype=np.uint8)
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 48, "width": 64})
        annotations.append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": 10 * (i % len(classes) + 1),
                "bbox": [4, 8, 20, 10 + i],
                "area": 20 * (10 + i),
                "iscrowd": 0,
            }
        )
    # Ids in descending order and with gaps: the classes are numbered by id, not as listed.
    categories = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(classes)][::-1]
    content = {"images": images, "annotations": annotations, "categories": categories, **changes}
    (folder / "labels.json").write_text(json.dumps(content))


def config(*entries, train=(), test=(), classes=2, architecture="RetinaNet"):
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.DATASETS.COCO_INSTANCES = list(entries)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    return cfg


def own(folder="sky", name="own_sky"):
    return [name, f"{folder}/labels.json", f"{folder}/images"]


def check(cfg, **kwargs):
    register_coco_from_config(cfg)
    check_datasets(cfg, **kwargs)


# One's own data by config -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["yaml", "command line"])
def test_own_data_set_reaches_the_train_loader(form, tmp_path):
    write_coco(Path("sky"))
    cfg = config()
    if form == "yaml":
        Path("my.yaml").write_text(
            "DATASETS:\n"
            "  COCO_INSTANCES:\n"
            "    - [own_sky, sky/labels.json, sky/images]\n"
            '  TRAIN: ("own_sky",)\n'
        )
        cfg.merge_from_file("my.yaml")
    else:
        cfg.merge_from_list(
            [
                "DATASETS.COCO_INSTANCES",
                "[('own_sky','sky/labels.json','sky/images')]",
                "DATASETS.TRAIN",
                "('own_sky',)",
            ]
        )
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    cfg.INPUT.RANDOM_FLIP = "none"
    check(cfg)
    batch = next(iter(build_detection_train_loader(cfg)))
    found = {}
    for item in batch:
        box, cls = item["instances"].gt_boxes.tensor[0], item["instances"].gt_classes[0]
        found[item["image_id"]] = (*box.tolist(), int(cls))
        assert item["image"].shape == (3, 48, 64)
        assert (item["image"] == 10 * item["image_id"]).all()
    expected = {i: (4, 8, 24, 18 + i, i % 2) for i in range(4)}
    assert {i: expected[i] for i in found} == found and found


def test_paths_are_looked_for_here_then_in_the_datasets_folder(root):
    write_coco(root / "sky")
    check(config(own(), train=("own_sky",)))
    assert MetadataCatalog.get("own_sky").json_file == str(root / "sky" / "labels.json")
    write_coco(Path("sky"))
    register_coco_from_config(config(own(name="own_near")))
    assert MetadataCatalog.get("own_near").json_file == str(Path("sky/labels.json").absolute())


def test_same_entry_twice_is_one_data_set():
    write_coco(Path("sky"))
    cfg = config(own(), tuple(own()), train=("own_sky",))
    check(cfg)
    check(cfg)
    assert len(DatasetCatalog.get("own_sky")) == 4


def test_one_name_for_two_data_sets_is_refused():
    with pytest.raises(ValueError, match="'own_sky'.* is taken.*sky/labels.*sea/labels"):
        register_coco_from_config(config(own(), own("sea")))


@pytest.mark.parametrize("name", ["coco_2017_val", "shapes_train", "voc_2007_train"])
def test_name_of_a_known_data_set_is_refused(name, root):
    with pytest.raises(ValueError, match=f"'{name}'.* is taken.*Choose another name"):
        register_coco_from_config(config(own(name=name)))
    assert not list(root.iterdir())  # not even the shapes are generated


@pytest.mark.parametrize(
    "entry", ["own_sky", ["own_sky", "a.json"], ["own_sky", "a.json", 3], ["", "a", "b"], None]
)
def test_malformed_entry_is_refused(entry):
    with pytest.raises(ValueError, match=r"\[name, annotation file, image folder\]") as error:
        register_coco_from_config(config(entry))
    assert f"the entry {entry!r}" in str(error.value)


# Checks before training ---------------------------------------------------------------------------


def test_unregistered_name_comes_with_close_ones_and_the_remedy():
    with pytest.raises(ValueError, match="'coco_2017_vall' is.*'coco_2017_val'.*COCO_INSTANCES"):
        check(config(train=("coco_2017_vall",), classes=80))
    with pytest.raises(ValueError, match="'zzz' is registered. Lists of your"):
        check(config(train=("zzz",)))


def test_missing_own_file_names_both_places_looked_at(root):
    with pytest.raises(FileNotFoundError, match="no annotation file") as error:
        check(config(own(), train=("own_sky",)))
    for part in ("own_sky", "sky/labels.json", str(Path.cwd()), str(root)):
        assert part in str(error.value)


def test_image_folder_has_to_be_there_with_every_image():
    write_coco(Path("sky"), pictures=6)
    cfg = config(own(), train=("own_sky",))
    for i in (1, 2, 3, 4):
        Path(f"sky/images/{i}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"6 images, 4 .* 1.png, 2.png, 3.png, \.\.\."):
        check(cfg)
    for i in (0, 5):
        Path(f"sky/images/{i}.png").unlink()
    with pytest.raises(FileNotFoundError, match="'own_sky': there is no image folder .*nothing in"):
        check(cfg)
    Path("sky/images").rmdir()
    with pytest.raises(FileNotFoundError, match="'own_sky': there is no image folder '.*images'"):
        check(cfg)


def test_images_in_subfolders_are_found():
    write_coco(Path("sky"), images=[{"id": 0, "file_name": "a/0.png", "height": 48, "width": 64}])
    Path("sky/images/a").mkdir()
    Path("sky/images/0.png").rename("sky/images/a/0.png")
    check(config(own(), train=("own_sky",)))


def test_only_training_needs_annotations():
    write_coco(Path("sky"), annotations=[])
    check(config(own(), test=("own_sky",)), training=False)


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
        ("FeedbackRetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
        ("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
    ],
)
def test_number_of_classes_has_to_fit_the_model(architecture, key):
    write_coco(Path("sky"))
    check(config(own(), train=("own_sky",), classes=2, architecture=architecture))
    with pytest.raises(ValueError, match=f"'own_sky' has 2 classes.* to 80: set {key} to 2"):
        check(config(own(), train=("own_sky",), classes=80, architecture=architecture))


def test_number_of_classes_of_other_models_is_not_checked():
    write_coco(Path("sky"))
    check(config(own(), train=("own_sky",), classes=80, architecture="SemanticSegmentor"))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("kite", "balloon"), "they are in another order"),
        (("balloon", "kites"), "only 'own_sky' has kite; only 'own_sea' has kites"),
        (("balloon",), "only 'own_sky' has kite"),
    ],
)
def test_train_and_test_need_the_same_classes(classes, message):
    write_coco(Path("sky"))
    write_coco(Path("sea"), classes=classes)
    cfg = config(own(), own("sea", "own_sea"), train=("own_sky",), test=("own_sea",))
    with pytest.raises(ValueError, match=rf"'own_sky' and 'own_sea' differ.*\({message}\)"):
        check(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = len(classes)
    check(cfg, training=False)


def test_evaluation_does_not_need_the_train_set():
    write_coco(Path("sky"))
    check(config(own(), train=("not_here",), test=("own_sky",)), training=False)


def test_builtin_annotations_are_not_parsed(root):
    """COCO's take seconds and gigabytes to read, and its classes are known."""
    metadata = MetadataCatalog.get("coco_2017_val")
    DatasetCatalog.register("own_known", lambda: [])
    (root / "images").mkdir()
    (root / "images" / "0.png").touch()
    (root / "labels.json").write_text("never read")
    MetadataCatalog.get("own_known").set(
        json_file=str(root / "labels.json"),
        image_root=str(root / "images"),
        thing_classes=metadata.thing_classes,
    )
    check(config(train=("own_known",), classes=80))
    with pytest.raises(ValueError, match="'own_known' has 80 classes.*to 2"):
        check(config(train=("own_known",), classes=2))


def test_shapes_are_generated_in_passing(root, monkeypatch):
    monkeypatch.setitem(SHAPES.defaults, "train", 2)
    monkeypatch.setitem(SHAPES.defaults, "val", 1)
    check(config(train=("shapes_train",), test=("shapes_val",), classes=3))
    assert (root / "shapes" / "annotations" / "instances_val.json").is_file()
    with pytest.raises(ValueError, match="'shapes_val' has 3 classes"):
        check(config(test=("shapes_val",), classes=80), training=False)


def test_other_kinds_of_data_sets_are_taken():
    DatasetCatalog.register("own_pictures", lambda: [])
    check(config(train=("own_pictures",)))
