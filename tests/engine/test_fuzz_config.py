"""Random values for every key of this package, and for the keys of Detectron2 that users change.

A run either refuses them, by an error that names a key and a value, or trains a step with finite
losses and evaluates. Keys that are added later are covered by themselves.
"""

import gc
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import defaults
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from time_limit import within

from ss_detectron import FEEDBACK_REGISTRY, add_ss_config
from ss_detectron.data import generate_shapes, generate_shapes_cls
from ss_detectron.engine import Trainer, argument_parser, setup
from ss_detectron.engine import command_line as engine

SECONDS = 120  # an example takes about one

# The smallest training there is, of the two quick networks.
TASKS = {
    "detection": {
        "config": "quick/shapes_retinanet_ss.yaml",
        "MODEL.RETINANET.NUM_CONVS": 1,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
    },
    "classification": {
        "config": "quick/shapes_resnet18_ss.yaml",
        "INPUT.CLASSIFICATION.SIZE": 64,
        "SOLVER.OPTIMIZER": "SGD",
    },
}
ALWAYS = {
    "MODEL.DEVICE": "cpu",
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.STEPS": (),
}


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _keys() -> dict[str, Any]:
    """Every key that is tried, with its default."""
    stock, cfg = get_cfg(), get_cfg()
    add_ss_config(cfg)
    known = dict(leaves(stock))
    groups = ("SOLVER.", "DATALOADER.", "INPUT.", "TEST.", "MODEL.RETINANET.")
    return {k: v for k, v in leaves(cfg) if k not in known or k.startswith(groups)}


KEYS = _keys()

# Names that are known somewhere, which chance would not find.
NAMES = [
    *(rule.short_name for _, rule in FEEDBACK_REGISTRY),
    *("mean_abs", "rms", "kaiming", "xavier", "SGD", "AdamW", "linear", "constant"),
    *("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", "value", "norm"),
    *("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"),
    *("horizontal", "vertical", "none", "choice", "range", "RGB", "BGR", "L", "YUV-BT.601"),
    *("relative", "relative_range", "absolute", "absolute_range", "polygon", "bitmask"),
    *("resized_crop", "pad_crop", "resize", "pillow", "dali", "error", "skip"),
    *("RetinaNetHead", "FARetinaNetHead", "smooth_l1", "giou", "diou", "ciou"),
    *("BN", "GN", "SyncBN", "FrozenBN", "LN", "res5", "p3", "p7", "shapes_train", "backbone*"),
]

SCALARS = {
    bool: st.booleans(),
    int: st.sampled_from([-1, 0, 1, 2, 3, 48, 10**9, 10**30]),
    float: st.sampled_from(
        [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 0.3, 0.9, 1.0, 1.5, 2.0, 1e308]
    ),
    str: st.sampled_from(["", "nope", "../nope", "no\npe", "nöpe", *NAMES]),
    type(None): st.none(),
}
ANY_SCALAR = st.one_of(*SCALARS.values())
ANYTHING = st.recursive(ANY_SCALAR, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@st.composite
def alike(draw: Any, value: Any) -> Any:
    """Values that are built as this one is."""
    if isinstance(value, (list, tuple)):
        elements = [draw(st.just(v) | alike(v)) for v in value if draw(st.integers(0, 5))]
        more = alike(value[0]) if value else ANYTHING
        return elements + draw(st.lists(more, max_size=2))
    return draw(SCALARS[type(value)])


# What takes long: compiling half a minute (test_compile.py has it), processes a second each.
LEFT_OUT = {"MODEL.COMPILED": [True], "SOLVER.COMPILED": [True], "DATALOADER.NUM_WORKERS": [48]}


@st.composite
def changes(draw: Any, most: int) -> dict[str, Any]:
    """Up to so many keys with other values."""
    keys = draw(st.lists(st.sampled_from(list(KEYS)), min_size=1, max_size=most, unique=True))
    return {
        key: draw(
            (alike(KEYS[key]) | ANYTHING).filter(lambda v, k=key: v not in LEFT_OUT.get(k, []))
        )
        for key in keys
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    generate_shapes(folder, train=4, val=2, size=64)
    generate_shapes_cls(folder, train=10, val=10, size=32)
    return folder


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path, sets):
    """In an empty folder, with no log files; afterwards the catalogs are as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(sets))
    for module in (engine, defaults):
        monkeypatch.setattr(module, "setup_logger", lambda *args, **kwargs: logging.getLogger())
    monkeypatch.setattr(defaults, "collect_env_info", str)  # the same every time
    catalog = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - catalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def prepare(task: str, changes: dict[str, Any]) -> CfgNode:
    """The config as the tool would have it."""
    options = {**ALWAYS, **TASKS[task], **changes}
    args = argument_parser().parse_args(["--config-file", options.pop("config")])
    args.opts = [word for pair in options.items() for word in pair]
    return setup(args)


def train(cfg: CfgNode) -> None:
    """A step, or two, and what follows the last."""
    trainer = Trainer(cfg)
    trainer.checkpointer.save = lambda *args, **kwargs: None  # 50 MB each
    trainer.max_iter = min(trainer.max_iter, 2)
    trainer.train()
    losses = [v for k, (v, _) in trainer.storage.latest().items() if "loss" in k]
    assert losses and all(map(math.isfinite, losses))
    del trainer
    gc.collect()  # worker processes and their memory


def parts(value: Any) -> Iterator[str]:
    """The texts of a value and of what it is made of."""
    yield str(value)
    yield repr(value)
    if value is True:
        yield ""  # the key says it all
    for element in value if isinstance(value, (list, tuple)) else ():
        yield from parts(element)


def plain(text: str) -> str:
    """Without what differs between lists and tuples."""
    return re.sub(r"[][(), ]", "", text)


def assert_clear(error: BaseException, changes: dict[str, Any]) -> None:
    message = str(error)
    if isinstance(error, FloatingPointError):  # of a run that has begun: it reports
        assert message.startswith("Loss or gradient not finite")
    elif isinstance(error, SystemExit):  # Detectron2's verdict
        assert error.code == 1 and "TEST.EXPECTED_RESULTS" in changes
    elif not message.startswith("Expected more than 1 value per channel when training"):
        # (Which is torch on a single image of a single pixel.)
        assert isinstance(error, (ValueError, FileNotFoundError, ImportError)), repr(error)
        names = [r"[A-Z]+(\.[A-Z0-9_]+)+", *(key.split(".")[-1] for key in changes)]
        assert re.search(rf"\b({'|'.join(names)})\b", message), message
        given = [text for value in changes.values() for text in parts(value)]
        assert any(plain(text) in plain(message) for text in given), message


def fuzz(task: str, examples: int, most: int, whole: bool) -> Counter:
    """
    Args:
        task: one of TASKS.
        examples: how many; the same in every run.
        most: keys changed at once.
        whole: whether what is not refused is trained.
    """
    counts = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],  # to explain failures would trace every line
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changes(most))
    def run(changes):
        try:
            with within(SECONDS):
                cfg = prepare(task, changes)
                if whole:
                    train(cfg)
            counts["taken"] += 1
        except (Exception, SystemExit) as error:
            if isinstance(error, AssertionError):
                raise
            assert_clear(error, changes)
            counts["refused"] += 1

    run()
    assert min(counts["taken"], counts["refused"]) > examples / 20, counts
    return counts


each_task = pytest.mark.parametrize("task", TASKS)


@each_task
def test_values_are_taken_or_refused_by_name(task, monkeypatch):
    monkeypatch.setattr(engine, "default_setup", lambda cfg, args: None)
    fuzz(task, 100, most=2, whole=False)


@each_task
def test_values_that_are_taken_train(task, monkeypatch):
    monkeypatch.setattr(engine, "default_setup", lambda cfg, args: None)
    fuzz(task, 10, most=1, whole=True)


@pytest.mark.slow
@each_task
def test_many_values_are_refused_by_name_or_train(task):
    fuzz(task, 250, most=2, whole=True)
