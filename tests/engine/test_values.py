"""Values that keys do not take, alone or together; tests of random ones are in test_fuzz_config."""

import math

import pytest
from modeling_utils import load_config

from ss_detectron.values import check_values

DETECTION = "quick/shapes_retinanet_ss.yaml"

ALONE = {
    "SOLVER.BASE_LR": (None, math.nan, math.inf, -0.1),
    "SOLVER.MAX_ITER": (None, 0, -1, 1 << 31),
    "SOLVER.STEPS": ((0,), (2, 1), (1, 1), (1.5,), (None,), ((1,),)),
    "SOLVER.WARMUP_METHOD": ("", "Linear"),
    "SOLVER.IMS_PER_BATCH": (0, 1 << 21),
    "DATALOADER.NUM_WORKERS": (-1, 10**6),
    "INPUT.MIN_SIZE_TRAIN": ((), (1,), (64, "64")),
    "MODEL.FEEDBACK.RULE": ("nope",),
    "MODEL.FEEDBACK.GAIN": (0.0, math.inf),
    "MODEL.FEEDBACK.EXCLUDE": ([""], [3]),
    "MODEL.RETINANET.PRIOR_PROB": (0.0, 1.0),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": ((1.0,) * 3, (1.0, 1.0, 0.0, 1.0)),
    "MODEL.DEVICE": ("gpu", "meta", "mps"),
    "OUTPUT_DIR": ("", __file__),
    "TEST.EXPECTED_RESULTS": ([["bbox", "AP", 40]], [["bbox", "AP", 40, "1"]]),
}
TOGETHER = [
    ({"MODEL.RETINANET.IOU_LABELS": [0, 1]}, r"IOU_LABELS is \[0, 1\] and IOU_THRESHOLDS"),
    ({"MODEL.RETINANET.IN_FEATURES": ["p3", "p4"]}, "IN_FEATURES is .*ANCHOR_GENERATOR.SIZES"),
    ({"INPUT.FORMAT": "L"}, "FORMAT is 'L' and MODEL.PIXEL_MEAN .*choose 1 number$"),
    ({"MODEL.PIXEL_STD": [1.0]}, r"FORMAT is 'BGR' and MODEL.PIXEL_STD \[1.0\]; choose 3 numbers"),
    ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}, "SAMPLING is 'range' and INPUT.MIN_SIZE_TRAIN"),
    ({"INPUT.CROP.ENABLED": True, "INPUT.CROP.SIZE": [0.5, 1.5]}, r"CROP.SIZE is \[0.5, 1.5\]"),
    ({"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute"}, "CROP.TYPE 'absolute'"),
    ({"SOLVER.NESTEROV": True, "SOLVER.MOMENTUM": 0.0}, "NESTEROV is True and SOLVER.MOMENTUM 0"),
    ({"SOLVER.RESCALE_INTERVAL": True, "SOLVER.WARMUP_ITERS": 400}, "RESCALE_INTERVAL is True"),
    ({"SOLVER.REFERENCE_WORLD_SIZE": 3}, "REFERENCE_WORLD_SIZE is 3 and SOLVER.IMS_PER_BATCH 8"),
    ({"SOLVER.LAST_LAYER": {"NOPE": 1}}, "SOLVER.LAST_LAYER.BASE_LR is missing"),
]
TAKEN = [
    {"SOLVER.BASE_LR": 0.0},
    {"SOLVER.WEIGHT_DECAY_BIAS": None},
    {"SOLVER.CLIP_GRADIENTS.CLIP_VALUE": math.inf, "SOLVER.CLIP_GRADIENTS.NORM_TYPE": math.inf},
    {"INPUT.FORMAT": "L", "MODEL.PIXEL_MEAN": [127.5], "MODEL.PIXEL_STD": [64.0]},
    {"INPUT.FORMAT": "YUV-BT.601"},
    {"INPUT.MIN_SIZE_TRAIN": (0,), "INPUT.MIN_SIZE_TEST": 0},
    {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT.MIN_SIZE_TRAIN": (64, 96)},
    {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [32, 48]},
    {"INPUT.CROP.ENABLED": True, "INPUT.CROP.SIZE": [1.0, 1.0]},
    {"MODEL.RETINANET.FOCAL_LOSS_ALPHA": -1.0},
    {"MODEL.RETINANET.IN_FEATURES": ["p3"], "MODEL.ANCHOR_GENERATOR.SIZES": [[16.0]]},
    {"MODEL.FEEDBACK.RULE": "", "MODEL.RETINANET.NORM": "SyncBN"},
    {"TEST.EXPECTED_RESULTS": [["bbox", "AP", 40.0, 0.5]], "SOLVER.REFERENCE_WORLD_SIZE": 4},
]


def changed(changes):
    return load_config(DETECTION, *(word for pair in changes.items() for word in pair))


@pytest.mark.parametrize("key", ALONE)
def test_a_value_that_a_key_does_not_take_is_named(key):
    for value in ALONE[key]:
        cfg = changed({key: value})
        with pytest.raises(ValueError) as refused:
            check_values(cfg)
        assert str(refused.value).startswith(f"{key} is {value!r}; choose ")


@pytest.mark.parametrize(("changes", "message"), TOGETHER, ids=lambda x: str(x)[:40])
def test_values_that_do_not_go_together_are_named(changes, message):
    cfg = changed(changes)
    with pytest.raises(ValueError, match=message):
        check_values(cfg)


@pytest.mark.parametrize("changes", TAKEN, ids=lambda x: str(x)[:40])
def test_values_that_have_a_meaning_are_taken(changes):
    check_values(changed(changes))


def test_keys_that_others_have_added_are_theirs():
    cfg = load_config(DETECTION)
    cfg.MODEL.OWN = None
    check_values(cfg)


def test_several_processes_on_the_cpu_have_no_synchronised_batch_norm(monkeypatch):
    cfg = changed({"MODEL.FPN.NORM": "SyncBN"})
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="MODEL.FPN.NORM is 'SyncBN'.*choose 'naiveSyncBN'"):
        check_values(cfg)
