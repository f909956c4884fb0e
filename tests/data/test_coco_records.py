"""Annotation files that are read in places: Detectron2's dicts, read once, shared, never stale."""

import copy
import json
import logging
import multiprocessing
import os
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from coco_utils import SKY, coco_config, write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json, register_coco_instances
from hypothesis import given
from test_fuzz_coco import damaged_contents, quick

from ss_detectron.data import check_datasets, coco_index, register_coco_from_config
from ss_detectron.data.boxes import without_unusable_boxes
from ss_detectron.data.coco_file import repaired_file
from ss_detectron.data.coco_index import read_index
from ss_detectron.data.detection import load_detection_dicts
from ss_detectron.data.records import CocoRecords
from ss_detectron.engine import Trainer

pytestmark = pytest.mark.usefixtures("root")

TRIANGLE = [4, 8, 20.5, 9, 12, 25]
CROWD = {"size": [48, 64], "counts": [8, 48 * 64 - 8]}
CLASSES = ("kite", "balloon")


def of_all_kinds(content: dict) -> None:
    """More of what COCO's files hold, in no order; classes have numbers as COCO's."""
    content["categories"] = [{"id": 18, "name": "kite"}, {"id": 3, "name": "balloon", "x": "Ü"}]
    one, two, three, four = content["annotations"]
    for annotation in content["annotations"]:
        annotation["category_id"] = (18, 3)[annotation["id"] % 2]
    one |= {"segmentation": [TRIANGLE, [1, 2, 3, 4]], "caption": 'ein Käse 猫 { [ ] } " \\'}
    two |= {"segmentation": {"size": [48, 64], "counts": "PPYo0"}, "iscrowd": 1, "ignore": 0}
    three |= {"keypoints": [5, 5, 2, 7.25, 9, 1, 0, 0, 0], "num_keypoints": 2, "segmentation": []}
    del three["area"], three["iscrowd"]
    four |= {"image_id": 0, "segmentation": CROWD, "iscrowd": 1, "attributes": {"annotations": []}}
    content["annotations"] += [
        {**one, "id": 9, "image_id": 2, "segmentation": [[1, 2, 3, 4]]},  # no polygon: left out
        {**one, "id": 7, "image_id": 2, "bbox": [9, 9, 0, 5]},
        {**one, "id": 8, "image_id": 1, "keypoints": [1, 1, 2, 0, 0, 0, 4.5, 3, 1]},
        {**one, "id": 6, "image_id": 99},
    ]
    content["images"].reverse()
    content["images"][1] |= {"url": "ein Käse 猫", "width": 64.0}


def strings_for_ids(content: dict) -> None:
    of_all_kinds(content)
    for part, keys in (("images", ["id"]), ("annotations", ["id", "image_id"])):
        for entry in content[part]:
            entry.update({key: f"ü{entry[key]}" for key in keys})


def turned_round(content: dict) -> None:
    of_all_kinds(content)
    for part in list(content):
        content[part] = content.pop(part)  # images, annotations, categories
    content["images"] = content.pop("images")
    content["info"] = {"annotations": [{}], "x": 1e-3}


WRITTEN = {
    "as COCO's": (of_all_kinds, {}),
    "in another order": (turned_round, {"separators": (",", ":")}),
    "in UTF-8, indented": (of_all_kinds, {"ensure_ascii": False, "indent": 1}),
    "with strings for ids": (strings_for_ids, {"ensure_ascii": False}),
}


def write(change=of_all_kinds, **options) -> None:
    def spoil(content):
        change(content)
        return json.dumps(content, **options).encode()

    write_coco(spoil)


def config(*options, **sets):
    cfg = coco_config(*options, **sets)
    register_coco_from_config(cfg)
    return cfg


def records_of(name: str) -> CocoRecords:
    return MetadataCatalog.get(name).records()


def stock(name="own_stock") -> list[dict]:
    return load_coco_json("sky/labels.json", os.path.abspath("sky/images"), name)


# The same dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("written", WRITTEN)
def test_dicts_are_those_of_detectron2(written, caplog):
    change, options = WRITTEN[written]
    write(change, **options)
    config()
    found = records_of("own_sky")
    assert isinstance(found, CocoRecords) and len(found) == 4
    assert DatasetCatalog.get("own_sky") == found[:]
    assert list(found) == found[:] == stock()
    types = [[type(v) for v in record.values()] for record in found]
    assert types == [[type(v) for v in record.values()] for record in stock()]
    assert found[-1] == found[3] and found[1:3] == [found[1], found[2]]
    assert pickle.loads(pickle.dumps(found))[2] == found[2]
    with pytest.raises(IndexError):
        found[4]
    said = [r.getMessage() for r in caplog.records if r.name == "ss_detectron.data.coco_index"]
    assert all("1 of 8 annotations" in text for text in said)


@quick
@given(content=damaged_contents())
def test_one_pass_finds_what_the_check_of_every_entry_finds(tmp_path, content):
    """What it takes is right as it is, to Detectron2 as well; what it does not, is not."""
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(content))
    try:
        right = repaired_file(str(file), False) == str(file)
    except ValueError:
        right = False
    try:
        index = coco_index._scan(str(file), str(file), 0)
    except ValueError as error:
        assert right and "boxes" in str(error)  # none in pixels
        return
    assert right == (index is not None)
    if index:
        found = index.records("", "own_fuzzed")[:]
        assert found == load_coco_json(str(file), "", "own_fuzzed")
        MetadataCatalog.pop("own_fuzzed")


@pytest.mark.parametrize("training", [True, False])
def test_what_is_left_out_is_what_detectron2_and_lists_leave_out(training):
    write()
    config()
    for keypoints in (0, 1, 2):
        dicts = get_detection_dataset_dicts(
            ["own_sky"], filter_empty=training, min_keypoints=keypoints
        )
        records = records_of("own_sky")
        records = records.with_objects() if training else records
        records = records.with_keypoints(keypoints) if keypoints else records
        assert records[:] == dicts
    found = without_unusable_boxes(records, "here", training=training)
    assert found[:] == without_unusable_boxes(dicts, "here", training=training)
    twice = CocoRecords.joined([found, records, found])
    assert twice[:] == [*found, *records, *found]
    with_objects = [r for r in twice if not all(a.get("iscrowd", 0) for a in r["annotations"])]
    assert twice.with_objects()[:] == with_objects


SAMPLERS = {
    "TrainingSampler": [],
    "RepeatFactorTrainingSampler": ["DATALOADER.REPEAT_THRESHOLD", 0.9],
    "WeightedTrainingSampler": [],
}


def test_proposals_are_added_to_the_dicts():
    """In place, by Detectron2, of which nothing must be lost."""
    write_coco()
    proposals = {"ids": [2, 0, 1, 3], "bbox_mode": 0}
    proposals["boxes"] = [np.array([[1.0, 2, 3, 4 + i]]) for i in proposals["ids"]]
    proposals["objectness_logits"] = [np.zeros(1)] * 4
    Path("proposals.pkl").write_bytes(pickle.dumps(proposals))
    cfg = config("MODEL.LOAD_PROPOSALS", True)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ("proposals.pkl",)
    for training in (True, False):
        found = load_detection_dicts(cfg, ["own_sky"], training=training)
        assert [record["proposal_boxes"][0, 3] for record in found] == [4, 5, 6, 7]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_loaders_give_the_same_batches(sampler, grouped):
    write()
    images = []
    register_coco_instances("own_list", {}, *map(os.path.abspath, SKY[1:]))
    for name in ("own_sky", "own_list"):
        cfg = config("DATALOADER.SAMPLER_TRAIN", sampler, *SAMPLERS[sampler], train=(name,))
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouped
        cfg.DATASETS.TRAIN_REPEAT_FACTOR = []  # which some versions of Detectron2 lack
        loader = Trainer.build_train_loader(cfg)
        assert isinstance(loader.dataset.records._lst, CocoRecords) == (name == "own_sky")
        images.append([str(image) for batch in islice(loader, 5) for image in batch])
    assert images[0] == images[1]


# Read once ---------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch, tmp_path):
    """The files that were read and not found in the cache, which small ones are in as well."""
    files, build = [], coco_index._build

    def noted(file: str, masks: int) -> coco_index.CocoIndex:
        files.append(file)
        return build(file, masks)

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(coco_index, "CACHED_FROM", 0)
    monkeypatch.setattr(coco_index, "_build", noted)
    return files


def forget() -> None:
    coco_index._known.clear()


FILE = SKY[1]


def test_a_file_is_read_once(read):
    write()
    cfg = config()
    check_datasets(cfg)
    Trainer.build_train_loader(cfg), Trainer.build_evaluator(cfg, "own_sky")
    before = DatasetCatalog.get("own_sky")[:]
    assert len(read) == 1
    forget()  # as another process
    check_datasets(cfg)
    assert DatasetCatalog.get("own_sky")[:] == before and len(read) == 1
    read_index(FILE), read_index(str(Path(FILE).absolute()))  # another name of it
    assert len(read) == 1


def replaced(file: Path) -> None:
    """Of the same size and time."""
    status = file.stat()
    other = file.with_name("other.json")
    other.write_text(file.read_text().replace("kite", "kita"))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(file)


def rewritten(file: Path) -> None:
    status, text = file.stat(), file.read_text()
    file.write_text(text.replace("kite", "kita"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "change", [replaced, rewritten, lambda file: file.write_text(file.read_text() + "\n")]
)
def test_a_file_that_changed_is_read_again(change, cached, read):
    write()
    read_index(FILE)
    change(Path(FILE))
    if cached:
        forget()
    found = read_index(FILE)
    assert len(read) == 2
    names = {category["name"] for category in json.loads(Path(FILE).read_text())["categories"]}
    assert {name for _, name in found.categories} == names


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"no"])
def test_a_damaged_cache_is_not_used(damage, read, tmp_path):
    write()
    read_index(FILE)
    (cache,) = tmp_path.glob("cache/ss_detectron/*.npz")
    cache.write_bytes(damage(cache.read_bytes()))
    forget()
    assert read_index(FILE).names and len(read) == 2
    forget()
    assert read_index(FILE).names and len(read) == 2


def test_masks_that_were_not_checked_are_checked(read):
    write(lambda content: content["annotations"][0].update(segmentation=[[1, 2, "x", 4, 5, 6]]))
    read_index(FILE)
    forget()
    with pytest.raises(ValueError, match="4 of 4 annotations .* expected polygons"):
        read_index(FILE, masks=1)
    read_index(FILE, annotated=True)
    assert len(read) == 2


def test_a_repaired_copy_is_not_cached(read, tmp_path):
    write(lambda content: content["images"][0].update(id=0.0))
    for _ in range(2):
        assert read_index(FILE).path != FILE
        forget()
    assert len(read) == 2 and not list(tmp_path.glob("cache/ss_detectron/*.npz"))


def raises(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("where", ["np.savez", "file_lock"])
def test_a_cache_that_cannot_be_written_is_said(where, read, monkeypatch, tmp_path, caplog):
    write()
    full = raises(OSError("No space left on device"))
    monkeypatch.setattr(f"ss_detectron.data.coco_index.{where}", full)
    assert read_index(FILE).names
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "every process will read it anew: No space left" in warning
    assert {file.suffix for file in tmp_path.glob("cache/ss_detectron/*")} <= {".lock"}


def test_others_may_read_the_cache_who_may_not_write_it(read, monkeypatch, tmp_path, caplog):
    write()
    read_index(FILE)
    (cache,) = tmp_path.glob("cache/ss_detectron/*.npz")
    assert cache.stat().st_mode == Path(FILE).stat().st_mode
    forget()
    monkeypatch.setattr(coco_index, "file_lock", raises(PermissionError("not yours")))
    assert read_index(FILE).names and len(read) == 1 and "not yours" not in caplog.text


def _in_process(rank: int, ready, found, read) -> None:
    ready.wait()
    index = read_index(FILE, annotated=True)
    records = index.records("sky/images", "own_sky")
    found.put((rank, len(read), records[:]))


def test_processes_read_it_once_together(read):
    write()
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_in_process, args=(rank, ready, found, read)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    answers = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert {rank for rank, _, _ in answers} == {0, 1}
    assert sum(count for _, count, _ in answers) == 1
    assert answers[0][2] == answers[1][2] == load_coco_json(FILE, "sky/images", "own_sky")


def test_a_file_that_changes_in_use_is_named():
    write()
    config()
    records = records_of("own_sky")
    before = copy.deepcopy(records[0])
    os.rename(FILE, "sky/moved.json")
    Path(FILE).write_text("another")  # what is open remains
    assert records[0] == before
    Path("sky/moved.json").write_text("{}")
    with pytest.raises(OSError, match="sky/labels.json' was changed while it is in use"):
        records[0]
