"""What becomes of data that are not as they should be: docs/bad_data.md, row by row."""

import copy
import io
import json
import logging
import re
import shutil
import traceback
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from coco_utils import BOXES, HEIGHT, WIDTH, coco_config, detections, picture, write_coco
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from image_utils import image_config
from PIL import Image
from pycocotools import mask as mask_util

from ss_detectron.data import (
    DetectionMapper,
    UnreadableImageError,
    check_datasets,
    register_coco_from_config,
    register_image_folders_from_config,
)
from ss_detectron.data.boxes import check_plausible, without_unusable_boxes
from ss_detectron.data.coco_file import repair
from ss_detectron.data.coco_index import read_index
from ss_detectron.engine import Trainer

TABLE = Path(__file__).resolve().parents[2] / "docs" / "bad_data.md"
pytestmark = pytest.mark.usefixtures("root")


class Case(NamedTuple):
    """A row of a table: what becomes of it by DATALOADER.UNREADABLE_IMAGES."""

    name: str
    spoil: Callable
    error: str
    skip: str
    message: str = ""
    """What is raised or logged, but for the data set or file: a regular expression."""
    boxes: Any = None
    """Those of every image that training sees, or the files; by default of the untouched set."""
    ap: float = 100.0
    """Of a detector that finds all objects of the untouched data set, where it gets the image."""
    options: tuple = ()


def unreadable(name: str, spoil: Callable, message: str) -> Case:
    return Case(name, spoil, "ends", "skipped", message)


def stops(name: str, spoil: Callable, message: str, *options: Any) -> Case:
    return Case(name, spoil, "stops", "stops", message, options=options)


def used(name: str, spoil: Callable, boxes: Any = None, **kwargs: Any) -> Case:
    return Case(name, spoil, "used", "used", boxes=boxes, **kwargs)


def repaired(name: str, spoil: Callable, message: str, **kwargs: Any) -> Case:
    return Case(name, spoil, "repaired", "repaired", f"as if it were repaired: {message}", **kwargs)


def left_out(name: str, spoil: Callable, message: str, boxes: Any = None, **kwargs: Any) -> Case:
    return Case(name, spoil, "left out", "left out", message, boxes, **kwargs)


# Images ------------------------------------------------------------------------------------------


def encoded(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, form, **options)
    return buffer.getvalue()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """With a few bytes in its middle that are others."""
    middle = len(content) // 2
    spoiled = bytes(b ^ 0x5A for b in content[middle : middle + 40])
    return content[:middle] + spoiled + content[middle + 40 :]


def turned(form: str) -> bytes:
    """Stored as it is, to be shown turned by a quarter."""
    exif = Image.Exif()
    exif[274] = 6
    return encoded(form, exif=exif)


def write(content: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content)


def dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


VALUES = np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH)
SIXTEEN_BITS = encoded("png", Image.fromarray(VALUES * 20))
TWELVE_BITS = encoded("png", Image.fromarray(VALUES))
FLOATS = encoded("tiff", Image.fromarray(VALUES.astype(np.float32)))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"  # as it begins
PALETTE = encoded("png", picture().convert("P"), transparency=bytes(range(256)))
# Name, what is done to the file, what is said about it.
UNREADABLE = [
    ("truncated JPEG", write(half(encoded("jpeg"))), "truncated"),
    ("truncated progressive JPEG", write(half(encoded("jpeg", progressive=True))), "truncated"),
    ("truncated PNG", write(half(encoded("png"))), "truncated|broken|Truncated"),
    ("damaged PNG", write(flipped(encoded("png"))), "broken|bad|checksum|unrecognized"),
    ("empty file", write(b""), "cannot identify"),
    ("text named as an image", write(b"no image"), "cannot identify"),
    ("floating-point values", write(FLOATS), "mode is F|floats"),
    ("HEIC under another name", write(HEIC), "it is HEIC, .*convert it to JPEG"),
    ("link that leads nowhere", dangle, "No such file"),
]
READABLE = [
    ("damaged pixels of a JPEG that decodes", write(flipped(encoded("jpeg")))),
    ("grey", write(encoded("jpeg", picture().convert("L")))),
    ("black and white", write(encoded("png", picture().convert("1")))),
    ("CMYK", write(encoded("jpeg", picture().convert("CMYK")))),
    ("palette with transparency", write(PALETTE)),
    ("alpha channel", write(encoded("png", picture().convert("RGBA")))),
]


# Detection ---------------------------------------------------------------------------------------


def checked(cfg: CfgNode) -> CfgNode:
    register_coco_from_config(cfg)
    check_datasets(cfg)
    return cfg


def trained_on(cfg: CfgNode, images: int = 4) -> dict[Any, list]:
    """The boxes of the images in two epochs of training, by image."""
    found = {}
    for batch in islice(Trainer.build_train_loader(cfg), images):
        assert len(batch) == 2
        for image in batch:
            height, width = image["image"].shape[1:]
            assert image["instances"].image_size == (height, width) == (HEIGHT, WIDTH)
            boxes = image["instances"].gt_boxes.tensor
            assert torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
            found[image["image_id"]] = [tuple(box) for box in boxes.tolist()]
    return found


def average_precision(cfg: CfgNode) -> float:
    """Of a detector that finds the objects of the untouched set, as masks that fill their boxes."""

    def find(images: list[dict]) -> list[dict]:
        assert images  # which models need, too
        found = []
        for image in images:
            number = int(image["image_id"])
            masks = {"pred_masks": torch.tensor(box_mask(BOXES[number][0]))[None].bool()}
            more = masks if cfg.MODEL.MASK_ON else {}
            found.append(detections(image, BOXES[number], [number % 2], **more))
        return found

    loader = Trainer.build_test_loader(cfg, "own_sky")
    evaluator = Trainer.build_evaluator(cfg, "own_sky")
    results = inference_on_dataset(find, loader, evaluator)
    assert set(results) == ({"bbox", "segm"} if cfg.MODEL.MASK_ON else {"bbox"})
    assert len({round(kind["AP"], 6) for kind in results.values()}) == 1
    assert sum(key.startswith("AP-") for key in results["bbox"]) == 2  # one per class
    return results["bbox"]["AP"]


def on_file(change: Callable[[Path], None]) -> Callable[[dict], None]:
    return lambda content: change(Path("sky/images/1.jpg"))


def on_image(**changes: Any) -> Callable[[dict], None]:
    return lambda content: content["images"][1].update(changes)


def without(part: str, key: str) -> Callable[[dict], None]:
    return lambda content: content[part][1].pop(key)


def on_object(**changes: Any) -> Callable[[dict], None]:
    return lambda content: content["annotations"][1].update(changes)


def one_more(box: list, **changes: Any) -> Callable[[dict], None]:
    """One more object of image 0 and class 0."""
    ids = {"id": 9, "image_id": 0, "category_id": 1, "area": 9, "iscrowd": 0}
    return lambda content: content["annotations"].append({**ids, "bbox": box, **changes})


def renamed(name: str) -> Callable[[dict], None]:
    def rename(content: dict) -> None:
        file = Path("sky/images", name)
        file.parent.mkdir(exist_ok=True)
        Path("sky/images/1.jpg").rename(file)
        content["images"][1]["file_name"] = name

    return rename


def absolute(content: dict) -> None:
    Path("sky/images/1.jpg").rename("elsewhere.jpg")
    content["images"][1]["file_name"] = str(Path("elsewhere.jpg").absolute())


def all_objects(change: Callable[[dict], Any]) -> Callable[[dict], None]:
    return lambda content: [change(annotation) for annotation in content["annotations"]] and None


def gaps(content: dict) -> None:
    """Ids of classes with gaps and in another order."""
    content["categories"] = [{"id": 70, "name": "balloon"}, {"id": 5, "name": "kite"}]
    all_objects(lambda a: a.update(category_id=(5, 70)[a["category_id"] - 1]))(content)


def strings_as_ids(content: dict) -> None:
    for image in content["images"]:
        image["id"] = str(image["id"])
    all_objects(lambda a: a.update(id=f"a{a['id']}", image_id=str(a["image_id"])))(content)


def floats_as_ids(content: dict) -> None:
    """As tables with gaps write them."""
    for entry in sum((content[part] for part in ("images", "annotations", "categories")), []):
        entry.update((k, float(v)) for k, v in entry.items() if k == "id" or k.endswith("_id"))


def twice(content: dict) -> None:
    """Each object once more, as of a few nothing is certain."""
    content["annotations"] += [{**a, "id": a["id"] + 4} for a in content["annotations"]]


def corners(content: dict) -> None:
    twice(content)
    all_objects(lambda a: a.update(bbox=[30, 20, 60, 46]))(content)


def fractions(content: dict) -> None:
    twice(content)
    sides = [WIDTH, HEIGHT, WIDTH, HEIGHT]
    all_objects(
        lambda a: a.update(bbox=[n / side for n, side in zip(a["bbox"], sides, strict=True)])
    )(content)


def in_encoding(name: str) -> Callable[[dict], bytes]:
    return lambda content: json.dumps(content).encode(name)


def polygons(found: Any) -> Callable[[dict], None]:
    """Masks by polygons, but for one."""
    return masks("polygons", segmentation=found)


def rle(counts: Any, *size: int) -> Callable[[dict], None]:
    """Masks in RLE, of which one has other counts, or another size."""
    return masks("RLE", segmentation={"size": list(size) or [HEIGHT, WIDTH], "counts": counts})


def box_mask(box: tuple) -> np.ndarray:
    left, top, right, bottom = map(int, box)
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def compressed(mask: np.ndarray) -> str:
    return mask_util.encode(np.asfortranarray(mask))["counts"].decode()


def masks(form: str, **changes: Any) -> Callable[[dict], None]:
    """Every object fills its box; then one is changed."""

    def add(content: dict) -> None:
        for annotation in content["annotations"]:
            [(x, y, right, bottom)] = BOXES[annotation["image_id"]]
            mask = [[x, y, right, y, right, bottom, x, bottom]]
            if form == "RLE":
                counts = compressed(box_mask((x, y, right, bottom)))
                mask = {"size": [HEIGHT, WIDTH], "counts": counts}
            annotation["segmentation"] = mask
        on_object(**changes)(content)

    return add


# COCO's AP is the mean, over recalls of 0, 1, ... 100 %, of the best precision there or beyond. Of
# the two classes, all objects of one are found. Of the other ...
ONE_OF_TWO = 100 * (1 + 51 / 101) / 2  # one of two is
ONE_WRONG = 100 * (1 + 51 / 101 / 2) / 2  # ... after something that is none
HALF_RIGHT = 100 * (1 + 1 / 2) / 2  # the only one is, after something that is none
TWO_OF_THREE = 100 * (1 + 67 / 101) / 2  # two of three are
THREE = {i: BOXES[i] for i in (0, 2, 3)}
SKIP = ("DATALOADER.UNREADABLE_IMAGES", "skip")
MASKS = ("MODEL.MASK_ON", True)
BITMASKS = (*MASKS, "INPUT.MASK_FORMAT", "bitmask")

CLOCKWISE = write(turned("jpeg"))

DETECTION_IMAGES = [
    *(unreadable(name, on_file(change), message) for name, change, message in UNREADABLE),
    Case(
        "missing file",
        on_file(Path.unlink),
        "stops",
        "skipped",
        "1 of which are not in|No such file",
    ),
    unreadable("16-bit values", on_file(write(SIXTEEN_BITS)), "mode is I"),
    unreadable("another size than the annotation's", on_image(width=60), r"got \(64, 48\)"),
    unreadable(
        "orientation in EXIF, size as stored",
        on_file(CLOCKWISE),
        r"got \(48, 64\).*Its EXIF says that it is turned",
    ),
    *(used(name, on_file(change)) for name, change in READABLE),
    used("non-ASCII name", renamed("Käse 猫 \u202e.jpg")),
    used("name with a subfolder", renamed("a/b.jpg")),
    used("absolute name", absolute),
]

FORM = "not in COCO's form"
LINE, TRIANGLE = [[4, 8, 24, 8]], [4, 8, 24, 8, 24, 18]
POLYGONS = r"expected polygons \[\[x1, y1, x2, y2, x3, y3, "
FULL = compressed(box_mask(BOXES[1][0]))

DETECTION_ANNOTATIONS = [
    stops("truncated annotation file", lambda _: b'{"images": [', "not valid JSON"),
    stops(
        "annotation file not in UTF-8",
        lambda _: b'{"a": "\xe9"}',
        "not valid JSON: it is not in UTF-8.*Latin-1",
    ),
    repaired("byte-order mark", in_encoding("utf-8-sig"), "its encoding is utf-8-sig"),
    repaired("annotation file in UTF-16", in_encoding("utf-16"), "its encoding is utf-16"),
    stops("JSON of another form", lambda _: b"[]", FORM),
    stops("no images", lambda c: c["images"].clear(), "has no images"),
    stops("no annotations", lambda c: c["annotations"].clear(), "has no annotations"),
    stops("no categories", lambda c: c["categories"].clear(), "has no categories"),
    stops("image without id", without("images", "id"), "has no id, expected an integer"),
    stops("image without file_name", without("images", "file_name"), "no file_name"),
    stops("image without width or height", without("images", "width"), "no width"),
    stops("duplicate image ids", on_image(id=3), r"images\[1\] \(id 3\), which has an id th"),
    used("image without objects", lambda c: c["annotations"].pop(1), THREE, ap=HALF_RIGHT),
    used(
        "image without objects, FILTER_EMPTY_ANNOTATIONS False",
        lambda c: c["annotations"].pop(1),
        {**BOXES, 1: []},
        ap=HALF_RIGHT,
        options=("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
    ),
    used("image of crowds only", on_object(iscrowd=1), THREE),
    left_out("box of zero area", one_more([9, 9, 0, 5]), r"0, 5\] of image 0", ap=TWO_OF_THREE),
    left_out(
        "box of negative size", one_more([40, 40, -9, -9]), "1 of 5 boxes have", ap=TWO_OF_THREE
    ),
    left_out("box outside the image", one_more([70, 9, 5, 5]), "1 of 5 boxes lie", ap=TWO_OF_THREE),
    left_out(
        "only box of an image unusable",
        on_object(bbox=[9, 9, 0, 5]),
        "1 of 4 boxes have no area",
        THREE,
        ap=ONE_WRONG,
    ),
    Case(
        "box partly outside",
        on_object(bbox=[-4, 8, 28, 60]),
        "clipped",
        "clipped",
        r"1 of 4 boxes reach beyond.*\[-4, 8, 28, 60\] of image 1",
        {**BOXES, 1: [(0.0, 8.0, 24.0, 48.0)]},
        ONE_WRONG,
    ),
    stops(
        "box with NaN", on_object(bbox=[4, 8, float("nan"), 9]), r"bbox \[4, 8, nan, 9\], expected"
    ),
    stops("annotation without bbox", without("annotations", "bbox"), "has no bbox"),
    stops(
        "boxes within 0..1",
        fractions,
        r"8 of 8 boxes lie within 0\.\.1, such as \[0.0625, 0.166",
    ),
    stops(
        "boxes as corners",
        corners,
        r"8 of 8 boxes reach far beyond .* \[30, 20, 60, 46\] of an image of \[64, 48\]: .*corners",
    ),
    repaired("annotation without id", without("annotations", "id"), "1 annotations have no id, or"),
    repaired("duplicate annotation ids", on_object(id=1), "1 annotations have no id, or"),
    repaired("annotation id that is null", on_object(id=None), "1 annotations have no id, or"),
    used("annotation id 0", all_objects(lambda a: a.update(id=a["id"] - 1))),
    repaired("ids that are whole floats", floats_as_ids, "18 ids are whole floats"),
    used("ids that are strings", strings_as_ids, {str(i): found for i, found in BOXES.items()}),
    stops("annotation without image_id", without("annotations", "image_id"), "image_id"),
    left_out(
        "annotation of an image that is not listed",
        one_more([4, 8, 5, 9], image_id=77),
        "1 of 5 annotations are of no image in it: left out",
    ),
    stops("category_id that is not listed", on_object(category_id=3), "category_id 3, expected"),
    stops(
        "annotations of no image that is listed",
        all_objects(lambda a: a.update(image_id=a["image_id"] + 9)),
        "none of 4 annotations is of one of its 4 images: the first has the image_id 9, .* id 0",
    ),
    stops(
        "ids of images that are strings, of annotations' images integers",
        lambda c: [i.update(id=str(i["id"])) for i in c["images"]] and None,
        "4 of 4 annotations.* has the image_id 0, expected a string like the id '0' in 'images'",
    ),
    stops(
        "category_ids that are strings, ids of categories integers",
        all_objects(lambda a: a.update(category_id=str(a["category_id"]))),
        "4 of 4 annotations.* has the category_id '1', expected an integer like the id 1 in",
    ),
    used("category ids with gaps", gaps),
    repaired(
        "two categories of one name",
        lambda c: c["categories"][1].update(name="kite"),
        r"2 categories are called 'kite' \(id 1 of 2 objects, id 2 of 2 .*, now .*'kite \(2\)'",
    ),
    stops(
        "duplicate category ids",
        lambda c: c["categories"].append({"id": 1, "name": "a"}),
        r"categories\[0\] \(id 1\), which has an id that",
    ),
    used("iscrowd and area missing", all_objects(lambda a: [a.pop("area"), a.pop("iscrowd")])),
    repaired(
        "iscrowd, area and ignore null",
        all_objects(lambda a: a.update(iscrowd=None, area=None, ignore=None)),
        "4 times iscrowd is null; 4 times area is null; 4 times ignore is null",
    ),
    repaired(
        "iscrowd and area that are strings",
        all_objects(lambda a: a.update(iscrowd="0", area=str(a["area"]))),
        "4 times iscrowd is a string; 4 times area is a string",
    ),
    stops("annotation to be ignored", on_object(ignore=1), "ignore 1, expected 0"),
    used("segmentation empty", polygons([])),
    stops("segmentation of another form", polygons([4, 8]), POLYGONS),
    repaired("polygon that is not in a list", polygons(TRIANGLE), "1 polygons are not in a list"),
    left_out(
        "polygons of fewer than three points",
        polygons(LINE),
        "1 of 4 annotations have polygons of fewer than three points alone: left",
        THREE,
    ),
    stops("RLE of another size than the image", rle([81], 9, 9), "expected RLE of its"),
    stops("RLE whose counts do not add up", rle([5]), "expected RLE of its"),
    stops("segmentation missing, MODEL.MASK_ON", polygons(None), "MODEL.MASK_ON needs", *MASKS),
    stops("polygons of fewer than three points, MODEL.MASK_ON", polygons(LINE), POLYGONS, *MASKS),
    stops("damaged compressed RLE, MODEL.MASK_ON with bitmasks", rle("0ooo1"), "RLE", *BITMASKS),
    stops("RLE, MODEL.MASK_ON with polygons", masks("RLE"), "MASK_FORMAT to 'bitmask'", *MASKS),
    used("polygons, MODEL.MASK_ON", masks("polygons"), options=MASKS),
    used(
        "polygons and a crowd in compressed RLE, MODEL.MASK_ON",
        masks("polygons", iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": FULL}),
        THREE,
        options=MASKS,
    ),
    used("compressed RLE, MODEL.MASK_ON with bitmasks", masks("RLE"), options=BITMASKS),
]


def both(cases: list[Case]) -> list[Any]:
    """Each with either DATALOADER.UNREADABLE_IMAGES, where that makes a difference."""
    return [
        pytest.param(case, mode, id=f"{case.name}-{mode}")
        for case in cases
        for mode in ("error", "skip")
        if mode == "error" or case.skip != case.error
    ]


@pytest.mark.parametrize(("case", "mode"), both(DETECTION_IMAGES + DETECTION_ANNOTATIONS))
def test_detection(case, mode, caplog):
    outcome = getattr(case, mode)
    write_coco(case.spoil)
    cfg = coco_config("DATALOADER.UNREADABLE_IMAGES", mode, *case.options)
    if outcome == "stops":
        with pytest.raises((ValueError, FileNotFoundError), match=case.message) as error:
            checked(cfg)
        assert re.search("Data set 'own_sky': '.*sky/labels.json'", str(error.value))
        return
    checked(cfg)
    if outcome == "ends":
        for use in (trained_on, average_precision):
            message = rf"images/1.jpg' cannot be .*({case.message}).*UNREADABLE_IMAGES to 'skip'"
            with pytest.raises(UnreadableImageError, match=message):
                use(cfg)
        return
    boxes, ap = case.boxes or BOXES, case.ap
    if outcome == "skipped":
        boxes, ap = THREE, ONE_OF_TWO
    assert trained_on(cfg) == boxes
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    if outcome in ("left out", "clipped", "repaired"):
        assert sum(bool(re.search(case.message, text)) for text in warnings) == 1
    if outcome == "skipped":
        (named,) = [text for text in warnings if "1.jpg' cannot be" in text]
        assert re.search(case.message, named) and "met 1 unreadable" in named
    if outcome == "used":
        assert not [r for r in caplog.records if r.levelno > logging.INFO and r.name[:2] == "ss"]
    caplog.clear()
    assert average_precision(cfg) == pytest.approx(ap, abs=1e-3)
    lost = "1 of 4 images could not be evaluated: their objects count as missed"
    assert (lost in caplog.text) == (outcome == "skipped")


# Classification ----------------------------------------------------------------------------------

FILES = {f"{kind}/{i}.jpg" for kind in ("cat", "dog") for i in range(3)}


def write_folders(spoil: Callable[[Path], Any]) -> None:
    """``pets/cat`` and ``pets/dog`` of three images each, then spoiled."""
    for name in FILES:
        file = Path("pets", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded("jpeg"))
    spoil(Path("pets"))


def classification_config(unreadable: str = "error") -> CfgNode:
    options = {"TRANSFORM": "resize", "SIZE": 8}
    cfg = image_config(["own_pets", "pets"], train=("own_pets",), test=("own_pets",), **options)
    cfg.DATALOADER.UNREADABLE_IMAGES = unreadable
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.TEST.CLASSIFICATION.IMS_PER_BATCH = 2
    cfg.SEED = 3
    register_image_folders_from_config(cfg)
    return cfg


def files_in_training(cfg: CfgNode) -> set[str]:
    found = list(islice(Trainer.build_train_loader(cfg), 8))
    assert all(batch["image"].shape == (3, 3, 8, 8) for batch in found)
    return _files(found)


def files_in_evaluation(cfg: CfgNode) -> set[str]:
    return _files(list(Trainer.build_test_loader(cfg, "own_pets")))


def _files(batches: Any) -> set[str]:
    names = [
        Path(name).relative_to(Path("pets").absolute()) for b in batches for name in b["file_name"]
    ]
    labels = [label for b in batches for label in b["label"].tolist()]
    assert [name.parts[0] for name in names] == [("cat", "dog")[label] for label in labels]
    return set(map(str, names))


def at_file(change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "cat" / "1.jpg")


def as_file(name: str) -> Callable[[Path], None]:
    """One of the images under another name."""

    def rename(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "cat" / "1.jpg").rename(folder / name)

    return rename


def as_bytes(folder: Path) -> None:
    (folder / "cat" / "1.jpg").rename(folder / "cat" / NOT_UTF8)


def saved_as(ending: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / "cat" / "1.jpg").unlink()
        picture().save(folder / "cat" / f"1{ending}")

    return save


OTHER_ENDINGS = [".gif", ".avif", ".jp2", ".jfif"]


def of_macos(folder: Path) -> None:
    """Its archives, what Jupyter leaves where it shows a picture, and Windows on a drive."""
    hidden = "__MACOSX/cat/._0.jpg .ipynb_checkpoints/0-checkpoint.jpg cat/._0.jpg"
    for name in [*hidden.split(), "$RECYCLE.BIN/0.jpg", "System Volume Information/0.jpg"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")


def photographs(folder: Path) -> None:
    for file in (folder / "cat").iterdir():
        file.rename(file.with_suffix(".HEIC"))


def emptied(folder: Path) -> None:
    for file in (folder / "cat").iterdir():
        file.unlink()


def no_classes(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


NOT_UTF8 = b"\xff\xe9.jpg".decode("utf-8", "surrogateescape")
FIVE = FILES - {"cat/1.jpg"}

CLASSIFICATION = [
    *(unreadable(name, at_file(change), message) for name, change, message in UNREADABLE),
    *(used(name, at_file(change)) for name, change in READABLE),
    used("16-bit values", at_file(write(SIXTEEN_BITS))),
    used("16-bit values of 12 bits", at_file(write(TWELVE_BITS))),
    *(used(f"{end} file", saved_as(end), FIVE | {f"cat/1{end}"}) for end in OTHER_ENDINGS),
    used("orientation in EXIF", at_file(CLOCKWISE)),
    used("non-ASCII name", as_file("cat/Käse 猫.jpg"), FIVE | {"cat/Käse 猫.jpg"}),
    used("name not in UTF-8", as_bytes, FIVE | {f"cat/{NOT_UTF8}"}),
    used("file in a subfolder of its class", as_file("cat/a/1.jpg"), FIVE | {"cat/a/1.jpg"}),
    left_out(
        "file that is no image by its name",
        as_file("cat/1.heic"),
        "1 files or folders are not used, .*: cat/1.heic. HEIC photographs are not read: convert",
        FIVE,
    ),
    left_out(
        "hidden files and folders, __MACOSX",
        of_macos,
        "5 files or folders are not used, .*hidden",
    ),
    left_out(
        "image outside the class folders",
        as_file("1.jpg"),
        "1 files or folders are not used, .*in no class folder: 1.jpg",
        FIVE,
    ),
    stops("class folder without images", emptied, r"1 of 2 class folders hold no image \(cat\)"),
    stops("class folder of HEIC alone", photographs, r"no image \(cat\)\. .* HEIC photographs are"),
    stops("no class folders", no_classes, "has to hold one folder .* any class folder"),
    stops("missing folder", shutil.rmtree, "has to hold one folder .* No such file"),
]


@pytest.mark.parametrize(("case", "mode"), both(CLASSIFICATION))
def test_classification(case, mode, caplog):
    outcome = getattr(case, mode)
    write_folders(case.spoil)
    cfg = classification_config(mode)
    if outcome == "stops":
        with pytest.raises(FileNotFoundError, match=f"Data set 'own_pets'.*{case.message}"):
            check_datasets(cfg)
        return
    check_datasets(cfg)
    if outcome == "ends":
        for use in (files_in_training, files_in_evaluation):
            message = f"cat/1.jpg' cannot be read .*({case.message}).*UNREADABLE_IMAGES to 'skip'"
            with pytest.raises(UnreadableImageError, match=message):
                use(cfg)
        return
    expected = FIVE if outcome == "skipped" else case.boxes or FILES
    assert files_in_training(cfg) == expected
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    if outcome == "used":
        assert not warnings
    else:
        (warning,) = warnings
        assert re.search(case.message, warning)
        named = "1.jpg' cannot be read" in warning and "met 1 unreadable" in warning
        assert named == (outcome == "skipped")
    assert files_in_evaluation(cfg) == expected


# The table ---------------------------------------------------------------------------------------


def test_tables_are_what_is_tested():
    """docs/bad_data.md has a row for each case above, with its outcomes, and no others."""
    tables = {
        "Images for detection": [(c.name, c.error, c.skip) for c in DETECTION_IMAGES],
        "Annotations for detection": [(c.name, c.error) for c in DETECTION_ANNOTATIONS],
        "Images for classification": [(c.name, c.error, c.skip) for c in CLASSIFICATION],
    }
    for section in TABLE.read_text().split("\n## ")[1:]:
        title, *lines = section.splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        assert [tuple(row) for row in rows[2:]] == tables.pop(title)
    assert not tables


# Beyond the table --------------------------------------------------------------------------------


def test_worker_processes_count_together(capfd):
    """An image is named once, whichever of them meets it, and counted with those of the others."""
    logger = logging.getLogger("ss_detectron.data.stream")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    write_coco(lambda content: [Path(f"sky/images/{i}.jpg").write_bytes(b"") for i in (1, 3)])
    try:
        loader = Trainer.build_train_loader(
            checked(coco_config(*SKIP, "DATALOADER.NUM_WORKERS", 2))
        )
        found = [i["image_id"] for batch in islice(loader, 12) for i in batch]
    finally:
        logger.removeHandler(handler)
    assert set(found) == {0, 2}
    assert loader.dataset.unreadable.tolist() == [False, True, False, True]
    said = capfd.readouterr().err
    assert said.count("1.jpg' cannot be") == said.count("3.jpg' cannot be") == 1
    assert "has met 2 unreadable images" in said


def test_worker_process_ends_the_run_with_the_name():
    write_coco(on_file(write(b"")))
    cfg = checked(coco_config("DATALOADER.NUM_WORKERS", 1))
    with pytest.raises(UnreadableImageError, match="1.jpg' cannot be read .*: cannot") as error:
        trained_on(cfg)
    # Or torch's iterator is collected with its queues, and waits 5 s for workers to answer.
    traceback.clear_frames(error.tb)


def test_names_that_are_not_utf_8_can_be_logged(caplog):
    """Those of files may be any bytes; a log is UTF-8."""
    write_folders(as_bytes)
    Path("pets/cat", NOT_UTF8).write_bytes(b"")
    Path("pets/cat", NOT_UTF8 + ".txt").touch()
    assert files_in_training(classification_config("skip")) == FIVE
    assert caplog.text.encode().count(rb"\udcff\udce9.jpg") >= 2


def test_weighted_samplers_find_the_images_they_counted():
    write_coco(on_object(bbox=[9, 9, 0, 5]))
    cfg = checked(coco_config("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"))
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = []  # which some versions of Detectron2 lack
    assert trained_on(cfg, images=8) == {**BOXES, 1: []}


def test_other_ranks_do_not_repeat_what_is_left_out(monkeypatch, caplog):
    write_coco(one_more([9, 9, 0, 5]))
    cfg = checked(coco_config())
    for rank, times in ((1, 0), (0, 1)):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        Trainer.build_train_loader(cfg)
        assert caplog.text.count("have no area") == times


def test_all_images_missing_are_too_many_to_skip():
    write_coco(lambda content: [file.unlink() for file in Path("sky/images").glob("[0-2]*")])
    checked(coco_config(*SKIP))
    Path("sky/images/3.jpg").rename("sky/images/4.jpg")
    with pytest.raises(FileNotFoundError, match=r"4 images, 4 .* 0.jpg, 1.jpg, 2.jpg, \.\.\."):
        checked(coco_config(*SKIP))


def test_nothing_to_learn_from():
    write_coco(all_objects(lambda a: a.update(bbox=[9, 9, 0, 5])))
    with pytest.raises(ValueError, match="'own_sky' .*no image has an object that can be used"):
        Trainer.build_train_loader(checked(coco_config()))


def not_parsed(cfg: CfgNode) -> CfgNode:
    """Registered as COCO's own are, with the classes known beforehand."""
    register_coco_instances(
        "own_sky",
        {"thing_classes": ["kite", "balloon"]},
        str(Path("sky/labels.json").absolute()),
        str(Path("sky/images").absolute()),
    )
    check_datasets(cfg)
    return cfg


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (on_object(category_id=3), "category_id=3"),
        (on_object(bbox=[4, 8, float("nan"), 9]), r"1 boxes are not four.*\[4, 8, nan, 9\] of"),
        (without("annotations", "bbox"), "1 boxes are not four finite numbers: None of image 1"),
        (without("images", "width"), "KeyError"),
        (fractions, "8 of 8 boxes lie within 0..1"),
        (corners, "8 of 8 boxes reach far beyond"),
        (lambda content: content["annotations"].clear(), "No valid data found"),
    ],
)
def test_sets_that_are_not_parsed_beforehand(spoil, message):
    """As COCO's own: what Detectron2 fails on comes with the set and its file."""
    write_coco(spoil)
    with pytest.raises(ValueError, match=f"'own_sky' .'.*sky/labels.json'.: .*{message}"):
        Trainer.build_train_loader(not_parsed(coco_config()))


def test_boxes_of_both_kinds_and_none():
    """Detectron2's two forms of a box; rotated ones and crowds are not looked at."""
    dicts = [
        {"image_id": 0, "width": 20, "height": 10, "annotations": annotations}
        for annotations in (
            [{"bbox": (1, 2, 3, 4), "bbox_mode": 0}, {"bbox": (5, 5, 5, 9), "bbox_mode": 0}],
            [{"bbox": (5, 5, 4, 9), "bbox_mode": 1}, {"bbox": (20, 5, 4, 9), "bbox_mode": 1}],
            [{"bbox": (0, 8, 1, 1.001358e-5), "bbox_mode": 1}],  # less in float32
            [{"bbox": (1, 2, -3, 4, 90), "bbox_mode": 4}],
            [{"bbox": (1, 2, 0, 4), "bbox_mode": 1, "iscrowd": 1}],
            [],
        )
    ]
    before = json.dumps(dicts)
    found = without_unusable_boxes(dicts, "here")
    assert json.dumps(dicts) == before
    assert [len(image["annotations"]) for image in found] == [1, 1, 0, 1, 1, 0]
    assert found[1]["annotations"] == [{"bbox": (5, 5, 4, 9), "bbox_mode": 1}]
    assert without_unusable_boxes(found, "here") == found


def test_categories_are_told_apart_by_names_that_are_free():
    names = ["a", "a", "a (2)", "a", "a (2)"]
    content = {"categories": [{"id": i, "name": name} for i, name in enumerate(names)]}
    first, second = repair(content)
    found = [category["name"] for category in content["categories"]]
    assert found == ["a", "a (3)", "a (2)", "a (4)", "a (2) (2)"]
    assert "now 'a', 'a (3)', 'a (4)'" in first and "now 'a (2)', 'a (2) (2)'" in second


CORNERS = [[30, 20, 60, 46]] * 8
PARTS = [[0.1, 0.2, 0.5, 0.6]] * 9


@pytest.mark.parametrize(
    ("boxes", "size", "error", "remark"),
    [
        (PARTS + [[0.1, 0.1, 1.0000001, 0.5]], (64, 48), "10 of 10 boxes lie within 0..1", ""),
        (PARTS + [[0, 0, 1.02, 1.02]], (64, 48), "10 of 10 boxes lie within 0..1", ""),
        (PARTS + [[10, 10, 20, 20]], (64, 48), "9 of 10 .* If they are in pixels, remove", ""),
        (PARTS[:4], (64, 48), "", "4 of 4 boxes lie within"),
        (PARTS, (1, 1), "", ""),
        (CORNERS + [[20, 20, 67, 40]], (64, 48), "corners .* 9 fit.* If they are right", ""),
        (CORNERS + [[20, 20, 99, 40]], (64, 48), "corners .* 8 fit", ""),
        (CORNERS + [[20, 20, 20, 40]], (64, 48), "corners .* 9 fit", ""),
        (CORNERS + 2 * [[20, 20, 99, 40]], (64, 48), "", ""),
        ([[10, 10, 62, 62]], (64, 64), "", "1 of 1 boxes reach far beyond"),
        ([[50, 30, 20, 40]], (64, 48), "", ""),
        ([[0, 0, 50, 78], [60, 9, 32, 50], *[[20, 30, 40, 50]] * 9], (640, 480), "", "percent"),
        ([[0, 0, 500, 980], *[[600, 9, 390, 50]] * 9], (1920, 1080), "", "thousandths"),
        ([[0, 0, 50, 98], *[[60, 9, 39, 50]] * 9], (100, 100), "", ""),
        ([[0, 0, 50, 98], *[[60, 9, 39, 50]] * 9], (128, 128), "", ""),
        ([[0, 0, 50, 98], *[[60, 9, 129, 50]] * 9], (640, 480), "", ""),
    ],
)
def test_boxes_are_judged_as_a_whole_if_there_are_some(boxes, size, error, remark):
    boxes = np.array(boxes, float)
    sizes = np.tile(np.array(size, float), (len(boxes), 1))
    if error:
        with pytest.raises(ValueError, match=f"^here: .*{error}"):
            check_plausible("here", boxes, sizes)
    else:
        found = check_plausible("here", boxes, sizes)
        assert remark in found if remark else found is None


def test_a_test_set_is_looked_at_as_well(caplog):
    write_coco(all_objects(lambda a: a.update(bbox=[400, 300, 100, 200])))
    cfg = checked(coco_config())
    for _ in range(2):
        loader = Trainer.build_test_loader(cfg, "own_sky")
        assert [len(image["annotations"]) for image in loader.dataset.records] == [1] * 4
    assert caplog.text.count("4 of 4 boxes lie outside their image and are missed: [400") == 1


def test_mask_that_cannot_be_decoded_is_named():
    """Of a data set that is not parsed beforehand."""
    write_coco(rle("zzzzabc\x7f"))
    cfg = not_parsed(coco_config(*SKIP, *BITMASKS))
    with pytest.raises(ValueError, match=r"annotations of '.*1.jpg' cannot be used: .*Invalid RLE"):
        trained_on(cfg)


@pytest.mark.parametrize("error", [ValueError, MemoryError])
def test_errors_of_ones_own_code_are_no_unreadable_images(error, monkeypatch):
    """Nor is a lack of memory in reading."""
    write_coco()
    loader = Trainer.build_train_loader(checked(coco_config(*SKIP)))

    def fail(*_: Any, **__: Any) -> None:
        raise error("mine")

    if error is MemoryError:
        monkeypatch.setattr(detection_utils, "convert_PIL_to_numpy", fail)
    else:
        monkeypatch.setattr(loader.dataset.mapper, "augmentations", fail)
    with pytest.raises(error, match="mine"):
        next(iter(loader))
    assert not loader.dataset.unreadable.any()


@pytest.mark.parametrize("form", ["BGR", "RGB", "L", "YUV-BT.601"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("content", [encoded("jpeg"), turned("jpeg"), turned("png"), PALETTE])
def test_images_are_those_of_detectron2_opened_once(form, training, content, monkeypatch):
    cfg = coco_config("INPUT.FORMAT", form, *MASKS)
    Path("image").write_bytes(content)
    box = {"bbox": [4, 8, 20, 9], "bbox_mode": 1, "category_id": 0}
    record = {
        "file_name": "image",
        "sem_seg_file_name": "image",
        "annotations": [{**box, "segmentation": [TRIANGLE]}],
    }
    before = copy.deepcopy(record)
    expected = DatasetMapper(cfg, training)(record)
    opened, opening = [], PathManager.open
    monkeypatch.setattr(PathManager, "open", lambda *a, **k: opened.append(a) or opening(*a, **k))
    found = DetectionMapper(cfg, training)(record)
    assert len(opened) == 2  # with the segmentation
    assert record == before and found.keys() == expected.keys()
    assert found["image"].dtype in (torch.uint8, torch.float32)  # which models take
    torch.testing.assert_close(found["image"], expected["image"].to(found["image"].dtype))
    assert torch.equal(found["sem_seg"], expected["sem_seg"])
    assert str(found.get("instances")) == str(expected.get("instances"))


def test_no_annotations_of_a_test_set():
    write_coco(lambda content: content.pop("annotations"))
    cfg = coco_config()
    register_coco_from_config(cfg)
    check_datasets(cfg, training=False)


def test_evaluation_of_sets_that_are_not_parsed_beforehand():
    write_coco(without("annotations", "bbox"))
    cfg = not_parsed(coco_config())
    with pytest.raises(ValueError, match="Data set 'own_sky': annotation 2 has no bbox, not"):
        Trainer.build_evaluator(cfg, "own_sky")


def rle_is_taken(counts: Any) -> bool:
    write_coco(rle(counts))
    try:
        read_index("sky/labels.json", masks=1)
    except ValueError as error:
        assert "segmentation" in str(error)
        return False
    return True


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
def test_rle_of_any_mask_is_taken(share):
    mask = (np.random.default_rng(0).random((HEIGHT, WIDTH)) < share).astype(np.uint8)
    ends = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=2))
    assert rle_is_taken(compressed(mask)) and rle_is_taken(np.diff(ends, prepend=0).tolist())


@pytest.mark.parametrize(
    "counts",
    [
        *("0oooooooooo1", "", "111", FULL[:-1], FULL[1:], FULL + "1", FULL + "p", FULL + "\n"),
        *(FULL + chr(48 + 31), FULL + "\0", "o" * 100_000),  # the first is -1
        FULL + 6 * "P" + "0",  # a zero of seven digits
        *([HEIGHT * WIDTH, 1], [HEIGHT * WIDTH + 1, -1], [HEIGHT * WIDTH / 1], None),
    ],
)
def test_damaged_rle_is_refused(counts):
    """It would keep pycocotools busy for good, or give a mask of whatever is in its memory."""
    assert not rle_is_taken(counts)
