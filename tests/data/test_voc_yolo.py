"""Sets of Pascal VOC and YOLO: read as other readers have them, and written in COCO's form."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from coco_utils import coco_config
from detectron2.data.datasets.pascal_voc import load_voc_instances
from PIL import Image
from torchvision.datasets import VOCDetection

from ss_detectron.data import check_datasets, register_coco_from_config
from ss_detectron.data.voc_yolo import ElementTree, read_voc, read_yolo, write_coco

WIDTH, HEIGHT = 64, 48
TOOL = Path(__file__).parents[2] / "tools" / "convert_dataset.py"
main = runpy.run_path(str(TOOL))["main"]


def write(file: str, text: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)


def draw(file: str, size=(WIDTH, HEIGHT), orientation: int | None = None) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size).save(file, exif=exif)


def voc(*objects: tuple, size=(WIDTH, HEIGHT)) -> str:
    """An XML file; of each object name, corners and what else there is."""
    parts = [f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"]
    for name, corners, *more in objects:
        edges = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges)
        parts.append(f"<object><name>{name}</name>{''.join(more)}<bndbox>{box}</bndbox></object>")
    return f"<annotation><filename>no.matter</filename>{''.join(parts)}</annotation>"


def boxes(images: list[dict]) -> dict[str, list[tuple]]:
    """The classes and corners, by image."""
    return {
        image["file_name"]: [(a["category"], *a["bbox"]) for a in image["annotations"]]
        for image in images
    }


@pytest.fixture(autouse=True)
def _here(root):
    """An empty current folder, catalogs are put right after."""


@pytest.fixture
def voc_set():
    """VOC's layout, as it comes."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    files = {
        "a": voc(("zebra", (1, 1, WIDTH, HEIGHT), part), ("dog", (5, 6, 20.5, 21))),
        "b": voc(("dog", (3, 4, 30, 40), "<difficult>1</difficult>"), size=(0, 0)),
        "below/c": voc(("cat", (2, 2, 2, 2))),
        "empty": voc(),
        "no_image": voc(("dog", (3, 4, 30, 40))),
        "turned": voc(("dog", (1, 1, HEIGHT, WIDTH)), size=(HEIGHT, WIDTH)),
        "resized": voc(("dog", (1, 1, 9, 9)), size=(2 * WIDTH, 2 * HEIGHT)),
    }
    for name, text in files.items():
        write(f"set/Annotations/{name}.xml", text)
    for name in ("a.jpg", "b.JPG", "below/c.png", "empty.jpg", "no_file.jpg", "resized.jpg"):
        draw(f"set/JPEGImages/{name}")
    draw("set/JPEGImages/turned.jpg", orientation=6)
    write("set/JPEGImages/._a.jpg", "macOS")
    write("set/Annotations/._a.xml", "macOS")
    write("set/ImageSets/Main/train.txt", "a\nb\nbelow/c\nempty\nno_image\nno_file\n\n")
    write("set/ImageSets/Main/val.txt", "a\nturned\nresized\na\n")
    write("set/ImageSets/Main/dog_train.txt", "a  1\nb -1\nempty  0\n")


def test_a_voc_set_is_read_by_its_lists(voc_set, caplog):
    found = read_voc("set")
    assert found.classes == ["cat", "dog", "zebra"]
    assert found.image_root == Path("set/JPEGImages")
    assert list(found.splits) == ["train", "val"]
    assert boxes(found.splits["train"]) == {
        "a.jpg": [("zebra", 0, 0, WIDTH, HEIGHT), ("dog", 4, 5, 20.5, 21)],
        "b.JPG": [("dog", 2, 3, 30, 40)],
        "below/c.png": [("cat", 1, 1, 2, 2)],  # a pixel
        "empty.jpg": [],
    }
    crowds = [a["iscrowd"] for i in found.splits["train"] for a in i["annotations"]]
    assert crowds == [0, 0, 1, 0]
    sizes = [(i["width"], i["height"]) for i in found.splits["val"]]
    assert sizes == [(WIDTH, HEIGHT), (HEIGHT, WIDTH), (WIDTH, HEIGHT)]
    assert [r.getMessage() for r in caplog.records] == [
        "'set': 1 listed images without an XML file are left out: no_file",
        "'set': 1 XML files without an image are left out: no_image",
        "'set': 1 images are not of the size in their XML file, which their boxes may fit: "
        "resized.jpg (128 x 96)",
    ]


def test_boxes_are_those_of_detectron2_torchvision_and_of_the_same_set_in_yolo():
    random = np.random.default_rng(0)
    low = random.integers(1, HEIGHT // 2, (9, 2))
    corners = np.hstack([low, low + random.integers(0, HEIGHT // 2, (9, 2))])
    text = voc(*((f"class{i % 3}", c) for i, c in enumerate(corners)))
    for name in "01":  # of a list of one, Detectron2 makes no list
        write(f"set/Annotations/{name}.xml", text)
        draw(f"set/JPEGImages/{name}.jpg")
    write("set/ImageSets/Main/val.txt", "0\n1")
    names = ["class0", "class1", "class2"]
    found = boxes(read_voc("set").splits["val"])["1.jpg"]
    _, stock = load_voc_instances("set", "val", names)
    assert found == [(names[a["category_id"]], *a["bbox"]) for a in stock["annotations"]]
    parsed = VOCDetection.parse_voc_xml(ElementTree.fromstring(text))["annotation"]["object"]
    values = np.array([list(map(float, o["bndbox"].values())) for o in parsed])
    np.testing.assert_array_equal([b[1:] for b in found], values - [1, 1, 0, 0])

    low, high = values[:, :2] - 1, values[:, 2:]
    fractions = np.hstack([(low + high) / 2, high - low]) / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    lines = [" ".join(map(str, [i % 3, *box])) for i, box in enumerate(fractions)]
    write("yolo/labels/classes.txt", "\n".join(names))
    write("yolo/labels/1.txt", "\n".join(lines))
    draw("yolo/images/1.JPG")
    of_yolo = boxes(read_yolo("yolo").splits["yolo"])["images/1.JPG"]
    assert [b[0] for b in of_yolo] == [b[0] for b in found]
    np.testing.assert_allclose([b[1:] for b in of_yolo], [b[1:] for b in found], atol=1e-9)


def test_corners_that_count_from_0_are_coordinates_where_one_says_so(caplog):
    write("set/annotations/1.xml", voc(("dog", (0, 0, WIDTH, HEIGHT))))
    draw("set/images/1.jpg")
    assert boxes(read_voc("set", zero_based=True).splits["set"]) == {
        "1.jpg": [("dog", 0, 0, WIDTH, HEIGHT)]
    }
    assert not caplog.records
    assert boxes(read_voc("set").splits["set"]) == {"1.jpg": [("dog", -1, -1, WIDTH, HEIGHT)]}
    assert "1 boxes begin before pixel 1" in caplog.text


def test_a_yolo_set_is_read_by_its_data_yaml(caplog):
    names = "".join(f"  {i}: class{i}\n" for i in range(11))
    paths = "train: ../images/train\nval: lists/val.txt\ntest: [gone]\n"
    write("set/data.yaml", f"path: nowhere\n{paths}kpt_shape: [1, 3]\nnames:\n{names}")
    write("set/labels/train/box.txt", "\ufeff10 0.5 0.5 0.25 0.5\n\n")
    write("set/labels/train/below/polygon.txt", "1.0e+00 0.25 0.25 0.75 0.25 0.5 0.75\n")
    write("set/labels/train/empty.txt", "")
    write("set/pose.txt", "0 0.5 0.5 1 1 0.3 0.3 2")
    write("set/lists/val.txt", "../pose.jpg\ngone.jpg\n")
    for name in ("box.JPG", "below/polygon.png", "empty.jpg", "unlabelled.jpg"):
        draw(f"set/images/train/{name}")
    draw("set/pose.jpg")
    found = read_yolo("set")
    assert found.classes == [f"class{i}" for i in range(11)]  # 10 is not between 1 and 2
    assert boxes(found.splits["train"]) == {
        "images/train/below/polygon.png": [("class1", 16, 12, 48, 36)],
        "images/train/box.JPG": [("class10", 24, 12, 40, 36)],
        "images/train/empty.jpg": [],
        "images/train/unlabelled.jpg": [],
    }
    assert boxes(found.splits["val"]) == {"pose.jpg": [("class0", 0, 0, WIDTH, HEIGHT)]}
    (polygon,) = found.splits["train"][0]["annotations"]
    assert polygon["segmentation"] == [[16, 12, 48, 12, 32, 36]]
    assert [r.getMessage() for r in caplog.records] == [
        "'set/data.yaml': 1 folders or lists of 'test' are not there: gone",
        "'set': 1 images cannot be read and are left out: gone.jpg",
        "'set': 1 images have no text file and so no objects: images/train/unlabelled.jpg",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("0 0.5 0.5 0.1", "'0 0.5 0.5 0.1' is no class and then a box of 4 numbers or a polygon"),
        ("0 0.5 0.5 0.1 0.1 0.9", "is no class and then a box"),  # with a score
        ("2 0.5 0.5 0.1 0.1", "is of class 2, there are 0 to 1"),
        ("dog 0.5 0.5 0.1 0.1", "'dog 0.5 0.5 0.1 0.1' has words"),
    ],
)
def test_a_line_that_is_not_yolos_is_named(text, message):
    write("set/classes.txt", "dog\ncat\n")
    write("set/1.txt", text)
    draw("set/1.jpg")
    with pytest.raises(ValueError, match=f"'set/1.txt' is not of YOLO's form: .*{message}"):
        read_yolo("set")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            voc(
                ("dog", (1, 1, 2, "")),
            ),
            "object 'dog' has no bndbox of four numbers",
        ),
        (voc(("", (1, 1, 2, 2))), "an object has no name"),
        ("<annotation>", "no element found"),
    ],
)
def test_a_file_that_is_not_vocs_is_named(text, message):
    write("set/1.xml", text)
    draw("set/1.jpg")
    with pytest.raises(ValueError, match=f"'set/1.xml' is not of VOC's form: .*{message}"):
        read_voc("set")


def test_what_is_written_passes_the_check_of_a_training(voc_set, caplog, capsys):
    main(["voc", "set", "--output", "coco"])
    said = capsys.readouterr().out
    entries = eval(said.split('COCO_INSTANCES "')[1].split('"')[0])
    assert [name for name, *_ in entries] == ["coco_train", "coco_val"]
    assert "coco/train.json: 4 images, 1 of them without objects" in said
    assert "  4 boxes: cat 1, dog 2, zebra 1\n  1 of them are difficult" in said
    cfg = coco_config(entries=entries, train=("coco_train",), test=("coco_val",))
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    assert f"MODEL.RETINANET.NUM_CLASSES {cfg.MODEL.RETINANET.NUM_CLASSES}" in said
    register_coco_from_config(cfg)
    check_datasets(cfg)
    for file in ("coco/train.json", "coco/val.json"):
        content = json.loads(Path(file).read_text())
        for part in ("images", "annotations", "categories"):
            assert [e["id"] for e in content[part]] == list(range(1, len(content[part]) + 1))
    with pytest.raises(SystemExit, match="'coco/train.json' is there already"):
        main(["voc", "set", "--output", "coco"])


def test_what_cannot_be_learned_is_left_out_and_counted(caplog):
    inside = (9, 9, 80, 20)
    objects = [("dog", inside), ("dog", (9, 9, 9, 8)), ("dog", (90, 9, 99, 20)), ("cat", inside)]
    write("set/1.xml", voc(*objects))
    draw("set/1.jpg")
    found = read_voc("set")
    content = write_coco(found.splits["set"], ["dog"], "set.json")
    (annotation,) = content["annotations"]
    assert annotation["bbox"] == [8, 8, WIDTH - 8, 12]
    assert annotation["area"] == (WIDTH - 8) * 12
    for said in (
        "'set.json': 1 objects of other classes are left out: cat",
        "'set.json': 1 of 3 boxes have no area",
        "'set.json': 1 of 3 boxes lie outside",
        "'set.json': 1 of 3 boxes reach beyond",
    ):
        assert said in caplog.text


def test_folders_of_one_class_each_share_their_classes():
    for split, name in (("train", "dog"), ("valid", "cat")):
        write(f"set/{split}/1.xml", voc((name, (1, 1, 9, 9))))
        draw(f"set/{split}/1.jpg")
    main(["voc", "set/train", "set/valid", "--output", "coco"])
    contents = [json.loads(Path(f"coco/{split}.json").read_text()) for split in ("train", "valid")]
    names = [[c["name"] for c in content["categories"]] for content in contents]
    assert names == [["cat", "dog"]] * 2
    assert [content["annotations"][0]["category_id"] for content in contents] == [2, 1]
    with pytest.raises(SystemExit, match="several splits are called train"):
        main(["voc", "set/train", "set/train", "--output", "other"])


@pytest.mark.parametrize("names", ["[on, Off, 007, ~]", "{3: ~, 1: Off, 0: on, '2': 007}"])
def test_names_in_yaml_are_as_written(names):
    write("set/data.yaml", f"names: {names}\ntrain: .")
    write("set/1.txt", "3 0.5 0.5 0.5 0.5")
    draw("set/1.jpg")
    assert read_yolo("set").classes == ["on", "Off", "007", "~"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("{1: a, 2: b}", "they have the numbers 1, 2, not 0 and so on"),
        ("{0: {a: b}}", "they are"),
        ("dog", "they are 'dog'"),
    ],
)
def test_names_in_yaml_of_another_form(names, message):
    write("set/data.yaml", f"names: {names}\ntrain: .")
    with pytest.raises(ValueError, match=f"'set/data.yaml' is no data.yaml.*: {message}"):
        read_yolo("set")


def test_boxes_in_pixels_are_no_yolo_boxes():
    write("set/classes.txt", "dog\n")
    write("set/1.txt", "0 32 24 20 20\n0 10 10 5 5\n0 0.5 0.5 0.1 0.1")
    draw("set/1.jpg")
    with pytest.raises(SystemExit, match=r"2 of 3 boxes .*\[22.0, 14.0, 42.0, 34.0\] of 1.jpg"):
        main(["yolo", "set", "--output", "coco"])
    assert not list(Path().glob("coco/*"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "cp1252"])
def test_text_in_other_encodings_is_read_or_named(encoding):
    write("set/1.txt", "0 0.5 0.5 0.5 0.5")
    draw("set/1.jpg")
    Path("set/classes.txt").write_bytes("Käse\n".encode(encoding))
    if encoding == "cp1252":
        with pytest.raises(ValueError, match="'set/classes.txt' is not in UTF-8: save it so"):
            read_yolo("set")
    else:
        assert read_yolo("set").classes == ["Käse"]


def test_images_whose_names_end_like_lists_of_classes():
    for i in (0, 1):
        write(f"set/photo {i}.xml", voc(("dog", (1, 1, 9, 9))))
        draw(f"set/photo {i}.jpg")
        write(f"set/ImageSets/Main/split{i}.txt", f"photo {i}\n")
        write(f"set/ImageSets/Main/dog_split{i}.txt", f"photo {i}  1\n")
    found = read_voc("set").splits
    assert list(found) == ["split0", "split1"]
    assert [image["file_name"] for image in found["split1"]] == ["photo 1.jpg"]


def test_a_refused_conversion_leaves_no_file():
    for split, edge in (("train", 9), ("valid", 1)):  # in valid, all within a pixel
        write(f"set/{split}/1.xml", voc(*[("dog", (1, 1, edge, edge))] * 5))
        draw(f"set/{split}/1.jpg")
    with pytest.raises(SystemExit, match="'coco/valid.json': 5 of 5 boxes lie within 0..1"):
        main(["voc", "set/train", "set/valid", "--output", "coco"])
    assert not list(Path("coco").iterdir())
    Path("coco/valid.json").touch()
    with pytest.raises(SystemExit, match="'coco/valid.json' is there already"):
        main(["voc", "set/train", "set/valid", "--output", "coco"])
    assert [file.name for file in Path("coco").iterdir()] == ["valid.json"]


def test_a_folder_without_annotations_is_refused():
    draw("set/1.jpg")
    for format, message in (("voc", "no XML files in 'set'"), ("yolo", "neither a data.yaml")):
        with pytest.raises(SystemExit, match=message):
            main([format, "set", "--output", "coco"])
    write("set/classes.txt", "dog\n")
    with pytest.raises(SystemExit, match="'set': 1 images, no text file: set/1.txt"):
        main(["yolo", "set", "--output", "coco"])
    write("set/other.xml", voc())
    with pytest.raises(SystemExit, match="there is nothing to write"):
        main(["voc", "set", "--output", "coco"])
