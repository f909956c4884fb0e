"""Which values a config's keys take: others are refused by name, before anything is built."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm

from ss_detectron.config import add_ss_config
from ss_detectron.layers import FEEDBACK_REGISTRY, FEEDBACK_SCALES, get_rule
from ss_detectron.modeling import RETINANET_HEAD_REGISTRY

__all__ = ["check_values"]


def check_values(cfg: CfgNode) -> None:
    """
    Refuses values that their key cannot take, alone or with those of other keys: those of another
    type than the default's (Detectron2 lets None pass, and anything within lists), and of the keys
    of this package, SOLVER, DATALOADER, INPUT, TEST and MODEL.RETINANET also those out of range.
    Keys that neither Detectron2 nor this package has are left to who added them.

    Raises:
        ValueError: names the key, its value and what to choose.
    """
    wanted = _values()
    for key, default in _leaves(_defaults()):
        value = _get(cfg, key)
        for values in (_type_of(default), wanted.get(key)):
            if values is not None and not values.fit(value):
                raise ValueError(f"{key} is {value!r}; choose {values.choose}")
    for message in _conflicts(cfg):
        raise ValueError(message)


class _Values(NamedTuple):
    """Values that a key takes."""

    fit: Callable[[Any], bool]
    choose: str
    """What they are, for a message."""


# Far beyond what a run needs: more would fill the memory, or go on for ever, without a word.
_IMAGES = 1 << 20
_PIXELS = 1 << 16
_CLASSES = 1 << 20
_LAYERS = 1 << 8
_WORKERS = 1 << 10


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(least: int, most: int | None = None) -> _Values:
    upper = math.inf if most is None else most
    return _Values(
        lambda v: _is_number(v) and isinstance(v, Integral) and least <= v <= upper,
        f"a whole number from {least} {'on' if most is None else f'to {most}'}",
    )


def _number(least: float, most: float | None = None) -> _Values:
    upper = math.inf if most is None else most
    return _Values(
        lambda v: _is_number(v) and least <= v <= upper and math.isfinite(v),
        f"a number from {least} {'on' if most is None else f'to {most}'}",
    )


def _positive(below: float = math.inf) -> _Values:
    upper = "" if below == math.inf else f" and below {below}"
    return _Values(lambda v: _is_number(v) and 0 < v < below, f"a number above 0{upper}")


def _one_of(choices: Iterable[str]) -> _Values:
    choices = tuple(choices)
    return _Values(lambda v: v in choices, " or ".join(map(repr, choices)))


def _list(of: _Values, least: int = 0, most: float = math.inf) -> _Values:
    length = "" if not least else f" of {least}" + " or more" * (most > least)
    return _Values(
        lambda v: isinstance(v, (list, tuple)) and least <= len(v) <= most and all(map(of.fit, v)),
        f"a list{length}, each {of.choose}",
    )


def _or(values: _Values, other: Any) -> _Values:
    return _Values(lambda v: v == other or values.fit(v), f"{values.choose}, or {other!r}")


def _increasing(values: _Values) -> _Values:
    return _Values(
        lambda v: values.fit(v) and all(a < b for a, b in zip(v, v[1:], strict=False)),
        f"{values.choose}, in increasing order",
    )


def _taken_by(function: Callable[[Any], Any], choose: str) -> _Values:
    def fits(value: Any) -> bool:
        try:
            function(value)
        except (KeyError, RuntimeError, ValueError):
            return False
        return True

    return _Values(fits, choose)


def _training_device(name: str) -> None:
    if torch.device(name).type not in ("cpu", "cuda"):
        raise ValueError(name)


_ANY_NUMBER = _Values(lambda v: _is_number(v) and not math.isnan(v), "a number")
_NAME = _Values(lambda v: isinstance(v, str) and v != "", "a text that is not empty")


def _type_of(default: Any) -> _Values | None:
    """Values of the type of a key's default."""
    if isinstance(default, bool):
        return _Values(lambda v: isinstance(v, bool), "True or False")
    if isinstance(default, Integral):
        return _Values(lambda v: _is_number(v) and isinstance(v, Integral), "a whole number")
    if isinstance(default, Real):
        return _ANY_NUMBER
    if isinstance(default, str):
        return _Values(lambda v: isinstance(v, str), "a text")
    if isinstance(default, (list, tuple)):
        return _Values(lambda v: isinstance(v, (list, tuple)), "a list")
    return None


def _values() -> dict[str, _Values]:
    """By key; of keys that are not here, any value of the type will do."""
    rule = _taken_by(get_rule, " or ".join(repr(name) for name, _ in FEEDBACK_REGISTRY))
    norm = _one_of(
        ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
    )
    share = _number(0, 1)
    size = _whole(1, _PIXELS)
    # Smaller images than these, Detectron2 cannot flip.
    side = _whole(2, _PIXELS)
    side_or_unchanged = _or(side, 0)
    return {
        "OUTPUT_DIR": _Values(
            lambda v: _NAME.fit(v) and not os.path.isfile(v), "a folder, there or not yet"
        ),
        "SEED": _whole(-(1 << 31), (1 << 31) - 1),
        "MODEL.DEVICE": _taken_by(_training_device, "'cuda', 'cuda:N' or 'cpu'"),
        "MODEL.PIXEL_MEAN": _list(_number(-math.inf)),
        "MODEL.PIXEL_STD": _list(_positive()),
        "MODEL.WEIGHTS_EXCEPT": _list(_NAME),
        "MODEL.TRUSTED_WEIGHTS": _list(_NAME),
        "MODEL.FEEDBACK.RULE": _or(rule, ""),
        "MODEL.FEEDBACK.LAST_LAYER_RULE": rule,
        "MODEL.FEEDBACK.SCALE": _one_of(FEEDBACK_SCALES),
        "MODEL.FEEDBACK.GAIN": _positive(),
        "MODEL.FEEDBACK.EXCLUDE": _list(_NAME),
        "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES": _whole(1, _CLASSES),
        "MODEL.RESNETS.NORM": norm,
        "MODEL.FPN.NORM": norm,
        "MODEL.RETINANET.HEAD": _one_of(name for name, _ in RETINANET_HEAD_REGISTRY),
        "MODEL.RETINANET.NORM": norm,
        "MODEL.RETINANET.NUM_CLASSES": _whole(1, _CLASSES),
        "MODEL.RETINANET.NUM_CONVS": _whole(1, _LAYERS),
        "MODEL.RETINANET.IN_FEATURES": _list(_NAME, 1),
        "MODEL.RETINANET.IOU_THRESHOLDS": _increasing(_list(_positive(), 1)),
        "MODEL.RETINANET.IOU_LABELS": _list(_whole(-1, 1), 2),
        "MODEL.RETINANET.PRIOR_PROB": _positive(below=1),
        "MODEL.RETINANET.SCORE_THRESH_TEST": share,
        "MODEL.RETINANET.NMS_THRESH_TEST": share,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _whole(1),
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": _list(_positive(), 4, 4),
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _one_of(("smooth_l1", "giou", "diou", "ciou")),
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _number(0),
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA": _number(0),
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA": _or(share, -1),
        "SOLVER.OPTIMIZER": _one_of(("SGD", "AdamW")),
        "SOLVER.MAX_ITER": _whole(1, (1 << 31) - 1),
        "SOLVER.STEPS": _increasing(_list(_whole(1))),
        "SOLVER.GAMMA": _number(0),
        "SOLVER.NUM_DECAYS": _whole(1),
        "SOLVER.BASE_LR": _number(0),
        "SOLVER.BASE_LR_END": _number(0),
        "SOLVER.LAST_LAYER.BASE_LR": _number(0),
        "SOLVER.BIAS_LR_FACTOR": _number(0),
        "SOLVER.MOMENTUM": share,
        "SOLVER.WEIGHT_DECAY": _number(0),
        "SOLVER.WEIGHT_DECAY_NORM": _number(0),
        "SOLVER.WEIGHT_DECAY_BIAS": _or(_number(0), None),
        "SOLVER.WARMUP_METHOD": _one_of(("linear", "constant")),
        "SOLVER.WARMUP_FACTOR": _number(0),
        "SOLVER.WARMUP_ITERS": _whole(0),
        "SOLVER.CHECKPOINT_PERIOD": _whole(1),
        "SOLVER.IMS_PER_BATCH": _whole(1, _IMAGES),
        "SOLVER.REFERENCE_WORLD_SIZE": _whole(0),
        "SOLVER.ACCUMULATION_STEPS": _whole(1),
        "SOLVER.MAX_SKIPPED_STEPS": _whole(0),
        "SOLVER.CHECKPOINT_MAX_TO_KEEP": _whole(0),
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _one_of(("value", "norm")),
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _or(_positive(), math.inf),
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _or(_positive(), math.inf),
        "DATASETS.TRAIN": _list(_NAME),
        "DATASETS.TEST": _list(_NAME),
        "DATALOADER.NUM_WORKERS": _whole(0, _WORKERS),
        "DATALOADER.REPEAT_THRESHOLD": share,
        "INPUT.FORMAT": _one_of(_CHANNELS),
        "INPUT.MASK_FORMAT": _one_of(("polygon", "bitmask")),
        "INPUT.RANDOM_FLIP": _one_of(("horizontal", "vertical", "none")),
        "INPUT.MIN_SIZE_TRAIN": _list(side_or_unchanged, 1),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": _one_of(("choice", "range")),
        "INPUT.MAX_SIZE_TRAIN": side,
        "INPUT.MIN_SIZE_TEST": side_or_unchanged,
        "INPUT.MAX_SIZE_TEST": side,
        "INPUT.CROP.TYPE": _one_of(("relative_range", "relative", "absolute", "absolute_range")),
        "INPUT.CROP.SIZE": _list(_positive(), 2, 2),
        "INPUT.CLASSIFICATION.SIZE": size,
        "INPUT.CLASSIFICATION.RESIZE": size,
        "INPUT.CLASSIFICATION.PAD": _whole(0, _PIXELS),
        "TEST.EVAL_PERIOD": _whole(0),
        "TEST.ALIGNMENT_PERIOD": _whole(0),
        "TEST.DETECTIONS_PER_IMAGE": _whole(1),
        "TEST.EXPECTED_RESULTS": _list(
            _Values(
                lambda v: (
                    isinstance(v, (list, tuple))
                    and len(v) == 4
                    and all(map(_NAME.fit, v[:2]))
                    and all(map(_ANY_NUMBER.fit, v[2:]))
                ),
                "[task, metric, expected value, tolerance]",
            )
        ),
        "TEST.KEYPOINT_OKS_SIGMAS": _list(_positive()),
        "TEST.AUG.MIN_SIZES": _list(side, 1),
        "TEST.AUG.MAX_SIZE": side,
        "TEST.PRECISE_BN.NUM_ITER": _whole(1),
        "TEST.CLASSIFICATION.IMS_PER_BATCH": _whole(1, _IMAGES),
    }


# Of an image in each of INPUT.FORMAT's.
_CHANNELS = {"BGR": 3, "RGB": 3, "YUV-BT.601": 3, "L": 1}


def _conflicts(cfg: CfgNode) -> Iterator[str]:
    """What is wrong with values that would do alone."""
    model, solver, given, retinanet = cfg.MODEL, cfg.SOLVER, cfg.INPUT, cfg.MODEL.RETINANET
    if len(retinanet.IOU_LABELS) != len(retinanet.IOU_THRESHOLDS) + 1:
        yield (
            f"MODEL.RETINANET.IOU_LABELS is {retinanet.IOU_LABELS} and IOU_THRESHOLDS "
            f"{retinanet.IOU_THRESHOLDS}; choose one label more than thresholds"
        )
    if "RetinaNet" in model.META_ARCHITECTURE:
        for key in ("SIZES", "ASPECT_RATIOS"):
            value = model.ANCHOR_GENERATOR[key]
            if len(value) not in (1, len(retinanet.IN_FEATURES)):
                yield (
                    f"MODEL.RETINANET.IN_FEATURES is {retinanet.IN_FEATURES} and "
                    f"MODEL.ANCHOR_GENERATOR.{key} {value}; choose one list, or one per feature"
                )
    channels = _CHANNELS[given.FORMAT]
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(model[key]) != channels:
            yield (
                f"INPUT.FORMAT is {given.FORMAT!r} and MODEL.{key} {model[key]}; choose "
                f"{channels} number{'s' * (channels > 1)}"
            )
    on_cpu = not torch.cuda.is_available() or torch.device(model.DEVICE).type == "cpu"
    if on_cpu and comm.get_world_size() > 1:
        for part in ("RESNETS", "FPN", "RETINANET"):
            if model[part].NORM in ("SyncBN", "nnSyncBN"):
                yield (
                    f"MODEL.{part}.NORM is {model[part].NORM!r}, which several processes can train "
                    "on GPUs only, and the model runs on the CPU; choose 'naiveSyncBN'"
                )
    if given.MIN_SIZE_TRAIN_SAMPLING == "range" and len(given.MIN_SIZE_TRAIN) != 2:
        yield (
            "INPUT.MIN_SIZE_TRAIN_SAMPLING is 'range' and INPUT.MIN_SIZE_TRAIN "
            f"{given.MIN_SIZE_TRAIN}; choose two sizes, the smallest and the largest"
        )
    sizes = _list(_whole(1, _PIXELS) if "absolute" in given.CROP.TYPE else _positive(1 + 1e-9), 2)
    if given.CROP.ENABLED and not sizes.fit(given.CROP.SIZE):
        yield (
            f"INPUT.CROP.SIZE is {given.CROP.SIZE} and INPUT.CROP.TYPE {given.CROP.TYPE!r}; choose "
            "pixels for the absolute types, and shares, above 0 and at most 1, for the relative"
        )
    if solver.NESTEROV and solver.MOMENTUM == 0:
        yield "SOLVER.NESTEROV is True and SOLVER.MOMENTUM 0; choose a momentum above 0, or False"
    if solver.RESCALE_INTERVAL and solver.WARMUP_ITERS >= solver.MAX_ITER:
        yield (
            f"SOLVER.RESCALE_INTERVAL is True, SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} and "
            f"SOLVER.MAX_ITER {solver.MAX_ITER}; choose a shorter warm-up, or False"
        )
    if solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
        yield (
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE} and "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}; choose a multiple of the former"
        )


@cache
def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_ss_config(cfg)
    return cfg


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below ``node`` with its value."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _get(cfg: CfgNode, key: str) -> Any:
    value = cfg
    for name in key.split("."):
        if not isinstance(value, CfgNode) or name not in value:
            raise ValueError(f"{key} is missing: something else was put in the place of its group")
        value = value[name]
    return value
