"""Random values for every key of this package.

A run either refuses them, by an error that names a key or a value, or trains a step with finite
losses and evaluates. Keys that are added later are covered by themselves.
"""

import gc
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from time_limit import within

from ss_detectron import FEEDBACK_REGISTRY, add_ss_config
from ss_detectron.config import flatten_config
from ss_detectron.data import generate_shapes, generate_shapes_cls
from ss_detectron.engine import Trainer, argument_parser, command_line, setup

SECONDS = 120  # an example takes about one

# The smallest training there is, of the two quick networks.
TASKS = {
    "quick/shapes_retinanet_ss.yaml": {
        "MODEL.RETINANET.NUM_CONVS": 1,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
    },
    "quick/shapes_resnet18_ss.yaml": {
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

# Every key of this package, with its default.
CFG = get_cfg()
add_ss_config(CFG)
STOCK = flatten_config(get_cfg())
KEYS = {key: value for key, value in flatten_config(CFG).items() if key not in STOCK}
del KEYS["MODEL.COMPILED"]  # compiling takes half a minute; test_precision.py has it

# Names that are known somewhere, which chance would not find.
NAMES = [
    *(rule.short_name for _, rule in FEEDBACK_REGISTRY),
    *("mean_abs", "rms", "kaiming", "xavier", "SGD", "AdamW", "backpropagation"),
    *("resized_crop", "pad_crop", "resize", "pillow", "dali", "error", "skip"),
    *("RetinaNetHead", "FARetinaNetHead", "res5", "shapes_train", "backbone*", "linear"),
]
SCALARS = {
    bool: st.booleans(),
    int: st.sampled_from([-1, 0, 1, 2, 3, 48, 10**9]),
    float: st.sampled_from([math.nan, math.inf, -1.0, 0.0, 1e-300, 0.3, 1.0, 2.0, 1e308]),
    str: st.sampled_from(["", "nope", "../nope", "no\npe", "nöpe", *NAMES]),
    type(None): st.none(),
}
ANYTHING = st.recursive(
    st.one_of(*SCALARS.values()), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


@st.composite
def changes(draw: Any, most: int) -> dict[str, Any]:
    """Up to so many keys with other values."""
    keys = draw(st.lists(st.sampled_from(list(KEYS)), min_size=1, max_size=most, unique=True))
    return {key: draw(SCALARS.get(type(KEYS[key]), ANYTHING) | ANYTHING) for key in keys}


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
    for name in ("set_up_logging", "collect_env_info"):
        monkeypatch.setattr(command_line, name, lambda *args, **kwargs: None)
    catalog = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - catalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def train(config: str, changes: dict[str, Any]) -> None:
    """A step, or two, as the tool would take them, and what follows the last."""
    options = {**ALWAYS, **TASKS[config], **changes}
    args = argument_parser().parse_args(["--config-file", config])
    args.opts = [word for pair in options.items() for word in pair]
    trainer = Trainer(setup(args))
    trainer.checkpointer.save = lambda *args, **kwargs: None  # 50 MB each
    trainer.max_iter = min(trainer.max_iter, 2)
    trainer.train()
    losses = [v for k, (v, _) in trainer.storage.latest().items() if "loss" in k]
    assert losses and all(map(math.isfinite, losses))
    del trainer
    gc.collect()  # worker processes and their memory


def parts(value: Any) -> Iterator[str]:
    """The texts of a value and of what it is made of."""
    yield from {str(value), repr(value)}
    for element in value if isinstance(value, (list, tuple)) else ():
        yield from parts(element)


def assert_clear(error: BaseException, changes: dict[str, Any]) -> None:
    message = str(error)
    if isinstance(error, FloatingPointError):  # of a run that has begun: it reports
        assert message.startswith("Loss or gradient not finite")
        return
    assert isinstance(error, (ValueError, KeyError, FileNotFoundError, ImportError)), repr(error)
    named = [key.rpartition(".")[2] for key in changes]
    given = [part for value in changes.values() for part in parts(value)]
    assert any(re.search(rf"\b{name}\b", message) for name in named) or any(
        part in message for part in given
    ), message


@pytest.mark.parametrize("examples, most", [(8, 1), pytest.param(200, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", TASKS)
def test_values_are_refused_by_name_or_train(config, examples, most):
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
                train(config, changes)
            counts["taken"] += 1
        except AssertionError:
            raise
        except Exception as error:
            assert_clear(error, changes)
            counts["refused"] += 1

    run()
    assert min(counts["taken"], counts["refused"]) > examples / 20, counts
