"""The config keys this package adds to Detectron2's, and where its config files are found."""

from . import _detectron2  # noqa: F401, first

# isort: split
import difflib
import logging
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .learners.learner import feedback_seed
from .utils.trust import is_url

__all__ = [
    "add_ss_config",
    "check_config",
    "choose",
    "feedback_seed",
    "find_config",
    "flatten_config",
    "merge_config_file",
    "runs_on_cpu",
]

logger = logging.getLogger(__name__)


def add_ss_config(cfg: CfgNode) -> None:
    """Add this package's keys, with their defaults, to a Detectron2 config."""
    if isinstance(cfg, _Config):
        return  # has them
    object.__setattr__(cfg, "__class__", _Config)  # yacs would take it for a key
    cfg.register_deprecated_key("SOLVER.COMPILED")  # may still be set, to no effect
    _C = cfg

    # How gradients arise: a name in ss_detectron.learners.LEARNER_REGISTRY. "backpropagation" goes
    # through whatever feedback rules the layers have.
    _C.MODEL.LEARNER = CfgNode()
    _C.MODEL.LEARNER.NAME = "backpropagation"
    # Of direct_feedback: how large its random matrices are, xavier or kaiming, times GAIN. Their
    # seed, and that of the learners below, is MODEL.FEEDBACK.SEED.
    _C.MODEL.LEARNER.SCALE = "xavier"
    _C.MODEL.LEARNER.GAIN = 1.0
    # Of target propagation: the step of the top target (difference_target_propagation), how far it
    # goes from the outputs to the labels (the simplified one and auxiliary_output_sdtp; 1 in the
    # paper), and the width of the auxiliary output.
    _C.MODEL.LEARNER.ALPHA = 0.2
    _C.MODEL.LEARNER.TARGET_STEP = 1.0
    _C.MODEL.LEARNER.AUXILIARY_UNITS = 256
    # The deviation of the noise that inverses learn by, and their learning rate; 0 for the model's.
    _C.MODEL.LEARNER.NOISE = 0.1
    _C.MODEL.LEARNER.INVERSE_LR = 0.0
    # Whether inverses and model learn in the same steps, "parallel", or in turns, "alternating", of
    # PERIOD steps each.
    _C.MODEL.LEARNER.SCHEDULE = "parallel"
    _C.MODEL.LEARNER.PERIOD = 0

    _C.MODEL.FEEDBACK = CfgNode()
    # Which rule the layers built by build_{ss,fa,feedback}_* and *RetinaNetHead learn by: a name
    # of ss_detectron.layers.feedback, in any case (bp, ss, frsf, brsf, fa, fasi, kp). Empty: the
    # one that the builder is named after; the generic ones (build_feedback_*) need it.
    _C.MODEL.FEEDBACK.RULE = ""
    # The rule of a network's last layers (RetinaNet: cls_score and bbox_pred).
    _C.MODEL.FEEDBACK.LAST_LAYER_RULE = "backpropagation"
    # How large the feedback weights are: mean_abs, rms, kaiming or xavier ...
    _C.MODEL.FEEDBACK.SCALE = "mean_abs"
    # ... times this.
    _C.MODEL.FEEDBACK.GAIN = 1.0
    # Determines all random feedback, together with the layers' names. -1 stands for SEED, or where
    # that is -1 too, for a number that is drawn for the run and stands in its checkpoints.
    _C.MODEL.FEEDBACK.SEED = -1
    # Before the first step of a run, feedback that is random at first (fa, kp, wm, ia) learns what
    # the weights are from noise through each layer: this many times as many inputs of noise as a
    # layer has inputs (ss_detectron.mirror_feedback), whatever MODEL.WEIGHTS bring. 0 for none.
    _C.MODEL.FEEDBACK.MIRROR_SAMPLES = 0
    # Layers that stay on backpropagation: shell-style patterns of module names in the whole model,
    # such as "backbone.fpn_*".
    _C.MODEL.FEEDBACK.EXCLUDE = []

    # The head of meta-architecture FeedbackRetinaNet: RetinaNetHead, SSRetinaNetHead,
    # FARetinaNetHead, FeedbackRetinaNetHead, or one's own in RETINANET_HEAD_REGISTRY.
    _C.MODEL.RETINANET.HEAD = "RetinaNetHead"

    # The meta-architecture ImageClassifier: its classes, which output of the backbone it classifies
    # (empty: the last one), and what its linear layer begins with: "torch", as nn.Linear does, or
    # "xavier", Glorot's uniform weights and biases of 0, as the layers of MODEL.CHAIN do.
    _C.MODEL.IMAGE_CLASSIFIER = CfgNode()
    _C.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES = 1000
    _C.MODEL.IMAGE_CLASSIFIER.IN_FEATURE = ""
    _C.MODEL.IMAGE_CLASSIFIER.INIT = "torch"

    # The backbones build_fc_backbone, build_lc_backbone (locally connected) and
    # build_conv_backbone: their layers from the first to the last, a number of units for a fully
    # connected one or, before the first of these, (kernel size, channels, stride), "max_pool" (2 x
    # 2) and "average_pool" (of the whole map); the nonlinearity of all, tanh or relu; and whether
    # zeros around a map keep its size, over the stride ("same", as TensorFlow has it), or there are
    # none ("valid").
    _C.MODEL.CHAIN = CfgNode()
    _C.MODEL.CHAIN.LAYERS = []
    _C.MODEL.CHAIN.ACTIVATION = "tanh"
    _C.MODEL.CHAIN.PADDING = "same"

    # Weights, feedback and feature maps laid out as (N, H, W, C) in memory (channels_last), which
    # is faster on GPUs with SOLVER.AMP and on many CPUs. Training and evaluation.
    _C.MODEL.CHANNELS_LAST = False
    # Compiles (torch.compile) the forward and backward passes of the model's backbone and, where
    # there is one, head; on the CPU it needs a C++ compiler. Training and evaluation; not with
    # TEST.ALIGNMENT_PERIOD.
    # With SOLVER.AMP on the CPU, use images of more than 128 pixels: of a map of a single pixel
    # (p7), torch's compiled bfloat16 gradient is not reliable.
    _C.MODEL.COMPILED = False

    # What MODEL.WEIGHTS is not to bring: shell-style patterns of the model's parameters and
    # modules, such as "linear" for another number of classes.
    _C.MODEL.WEIGHTS_EXCEPT = []
    # Which weights may be downloaded, and unpickled, which runs the code in them: paths and URLs,
    # shell-style. Others have to be files of torch.save that hold nothing but tensors and plain
    # values. Proposal files (MODEL.LOAD_PROPOSALS) are pickles too.
    _C.MODEL.TRUSTED_WEIGHTS = []

    # SGD or AdamW, over Detectron2's own parameter groups.
    _C.SOLVER.OPTIMIZER = "SGD"
    # With SGD, the options of Xiao et al. (2019). Batch Manhattan: only the gradient's sign counts.
    _C.SOLVER.BATCH_MANHATTAN = False
    # No-sign-change (Dale's law): a step carries no weight across zero; biases excluded.
    _C.SOLVER.NO_SIGN_CHANGE = False
    # The same for the last layers (those of MODEL.FEEDBACK.LAST_LAYER_RULE), which do not follow
    # the two keys above. A BASE_LR of 0 is SOLVER.BASE_LR.
    _C.SOLVER.LAST_LAYER = CfgNode()
    _C.SOLVER.LAST_LAYER.BASE_LR = 0.0
    _C.SOLVER.LAST_LAYER.BATCH_MANHATTAN = False
    _C.SOLVER.LAST_LAYER.NO_SIGN_CHANGE = False
    # Above 0, how many times the training goes over its images, in place of MAX_ITER. STEPS, the
    # periods of checkpoints and evaluation, and WARMUP_ITERS follow, see solver/schedule.py.
    _C.SOLVER.EPOCHS = 0
    # In place of STEPS: after which epochs, such as (8, 11), the learning rate falls.
    _C.SOLVER.STEP_EPOCHS = ()
    # One step on SOLVER.IMS_PER_BATCH images takes this many passes over a part of them each, to
    # save memory: their gradients are averaged. Batch statistics are those of a part.
    _C.SOLVER.ACCUMULATION_STEPS = 1
    # How many of the latest checkpoints are kept, beside the best; 0 for all.
    _C.SOLVER.CHECKPOINT_MAX_TO_KEEP = 2
    # How many steps of a run with a loss or gradient that is not finite are left out, with a
    # warning that tells all about them; the next one ends the run. The schedule goes on.
    _C.SOLVER.MAX_SKIPPED_STEPS = 0

    # One's own data sets in COCO's format, registered before training: triples of a name (for
    # DATASETS.TRAIN and TEST), an annotation file and an image folder.
    _C.DATASETS.COCO_INSTANCES = []
    # One's own classification data sets, registered before training: pairs of a name and a folder
    # that holds one folder of images per class.
    _C.DATASETS.IMAGE_FOLDERS = []
    # Whether cifar10_jpeg stands in TRAIN and TEST where they name cifar10: CIFAR-10 as JPEG files,
    # cifar10_jpeg/{train,test}/CLASS/*.jpg, whose pixels are not quite the original's.
    _C.DATASETS.CIFAR10_JPEG = False
    # Whether data sets may be downloaded: MNIST, Fashion-MNIST, CIFAR-10, and one's own whose paths
    # are URLs.
    _C.DATASETS.DOWNLOAD = False

    # For classification of small images of one size: decode them once, hold them in memory, and
    # augment a batch at a time. With INPUT.CLASSIFICATION.TRANSFORM resize, or pad_crop of images
    # that are SIZE x SIZE.
    _C.DATALOADER.IN_MEMORY = False

    # How images are made ready for classification; flipped as INPUT.RANDOM_FLIP says.
    #   resized_crop  train: a random part of 8 to 100 % of the area, resized to SIZE (ImageNet);
    #                 test: the shorter side resized to RESIZE, the centre of SIZE cut out
    #   pad_crop      train: PAD black pixels around, a random part of SIZE cut out (CIFAR);
    #                 test: the centre of SIZE cut out
    #   resize        resized to SIZE x SIZE
    _C.INPUT.CLASSIFICATION = CfgNode()
    _C.INPUT.CLASSIFICATION.TRANSFORM = "resized_crop"
    _C.INPUT.CLASSIFICATION.SIZE = 224
    _C.INPUT.CLASSIFICATION.RESIZE = 256
    _C.INPUT.CLASSIFICATION.PAD = 4
    # In training, resized_crop decodes a JPEG at a half, a quarter or an eighth of its size where
    # that leaves its crop at least SIZE pixels wide and high: the same crops, sooner, with pixels
    # that differ by about 1 of 255. Evaluation and DECODER dali always decode every pixel.
    _C.INPUT.CLASSIFICATION.REDUCED_DECODING = True

    # What decodes the images for the training of classifiers by resized_crop: "pillow", or "dali"
    # (NVIDIA DALI, the extra ss-detectron[dali]), which does so on the model's device. The order,
    # crops and flips are the same. Evaluation is always by Pillow.
    _C.DATALOADER.DECODER = "pillow"
    # What becomes of an image that cannot be used, as its file is damaged, missing or of another
    # size than its annotation says: "error" ends the run with its name; "skip" names and counts
    # it, trains on the next one in its place and evaluates without it (in detection, its objects
    # count as missed). Everything else in a data set that can be wrong: docs/bad_data.md.
    _C.DATALOADER.UNREADABLE_IMAGES = "error"

    # Every how many iterations of training the alignment of feedback weights and gradients with
    # backpropagation's is measured, which takes one more backward pass; 0 for never. Detectron2
    # writes the latest values to metrics.json every 20 iterations: a period below 40 is not there
    # in full.
    _C.TEST.ALIGNMENT_PERIOD = 0

    # Which package computes COCO's figures, which are the same: pycocotools, hotcoco in a fiftieth
    # of the time (`pip install hotcoco`), or fastest for hotcoco where it is installed.
    _C.TEST.COCO_API = "fastest"

    # The evaluation of classifiers: images per batch and process, and whether each class's error
    # is reported.
    _C.TEST.CLASSIFICATION = CfgNode()
    _C.TEST.CLASSIFICATION.IMS_PER_BATCH = 64
    _C.TEST.CLASSIFICATION.PER_CLASS = False


RENAMED_KEYS = {"SOLVER.SKIP_NOT_FINITE": "SOLVER.MAX_SKIPPED_STEPS"}
"""Keys that are still read: former name -> name, in the same group."""

_ALLOW = "or let tools/train_net.py have it with --allow-unsafe-config"


class _Config(CfgNode):
    """Detectron2's config, which knows former keys and downloads nothing where it is to be safe."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        # Also called for each file that this one builds on: the nearest to the run holds.
        if not allow_unsafe:
            _refuse_download(filename)
        content = super().load_yaml_with_base(filename, allow_unsafe=allow_unsafe)
        for old in RENAMED_KEYS:
            group, name = old.split(".")
            keys = content.get(group)
            if isinstance(keys, dict) and name in keys:
                keys[_current_name(old).split(".")[1]] = keys.pop(name)
        return content

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """
        Merge KEY, VALUE, KEY, VALUE, ...

        Raises:
            ValueError: a key that there is not, one without a value, or a value of another type.
        """
        words = [word if i % 2 else _current_name(word) for i, word in enumerate(cfg_list)]
        for key in words[::2]:
            name, equals, value = key.partition("=")
            if equals:
                raise ValueError(
                    f"{key}: options are pairs KEY VALUE, with a space: {name} {value}"
                )
        if len(words) % 2:
            raise ValueError(f"{words[-1]} has no value: options are pairs KEY VALUE")
        try:
            super().merge_from_list(words)
        except (AssertionError, ValueError) as error:
            raise ValueError(_explain(error, self)) from error
        self._name_datasets()

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        super().merge_from_other_cfg(cfg_other)
        self._name_datasets()

    def _name_datasets(self) -> None:
        if self.DATASETS.CIFAR10_JPEG:
            for key in ("TRAIN", "TEST"):
                names = self.DATASETS[key]
                parts = r"^cifar10(?=_(train|test|fit|val)$)"
                self.DATASETS[key] = tuple(re.sub(parts, "cifar10_jpeg", name) for name in names)

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        return CfgNode._decode_cfg_value(value)  # whose class the groups have


def _current_name(key: str) -> str:
    name = RENAMED_KEYS.get(key, key)
    if name != key:
        logger.warning("The key %s is now called %s.", key, name)
    return name


def _known(cfg: CfgNode) -> list[str]:
    """Every key, and every group of keys."""
    keys = list(flatten_config(cfg))
    return keys + sorted({key[:i] for key in keys for i, c in enumerate(key) if c == "."})


def _no_key(key: str, cfg: CfgNode) -> str:
    """Says that there is no such key, and which are like it."""
    known, wanted = _known(cfg), key.upper()
    last = [name for name in known if name.split(".")[-1] == wanted.split(".")[-1]]
    near = difflib.get_close_matches(wanted, last or known, n=3, cutoff=0.0 if last else 0.8)
    near = [wanted] if wanted in known else near
    return f"there is no key {key}" + (f"; did you mean {' or '.join(near)}?" if near else "")


# What yacs says of files and command lines.
_UNKNOWN = re.compile(r"Non-existent (?:config )?key: (\S+)")
_MISMATCH = re.compile(
    r"\(<class '(?:.*\.)?(?P<kind>\w+)'> vs.*\) with values \((?P<now>.*) vs\. (?P<given>.*)\) for "
    r"config key: (?P<key>\S+)",
    re.DOTALL,
)


def _explain(error: Exception, cfg: CfgNode) -> str:
    """Says in one line which key or value does not fit, and what would."""
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    text = " ".join(text.split()) or repr(error)
    if unknown := _UNKNOWN.search(text):
        return _no_key(unknown[1], cfg)
    found = _MISMATCH.search(text)
    if not found:
        return text
    kind, example, given = found["kind"], found["now"], found["given"]
    if kind in ("CfgNode", "_Config"):
        return f"{found['key']} is a group of keys, not {given!r}"
    if kind in ("tuple", "list"):
        if set(given) & set("()[]"):
            return (
                f"{found['key']} is {given!r}, which is no {kind} as Python writes it: look at its "
                "brackets, quotes and commas"
            )
        values = tuple(CfgNode._decode_cfg_value(word) for word in given.split(","))
        example = f'"{values}"'
    elif kind == "float" and given.isdecimal():
        example = f"{given}.0"
    return f"{found['key']} is {given!r}; choose a value of type {kind}, such as {example}"


def _refuse_download(file: str) -> None:
    if is_url(file):
        raise ValueError(f"the config {file} would be downloaded: look at it first, {_ALLOW}")


def merge_config_file(cfg: CfgNode, name: str, *, allow_unsafe: bool = False) -> str:
    """
    Merge a config file and those it builds on (``_BASE_``) into ``cfg``, and return its path. No
    code in them runs.

    Args:
        cfg: of :func:`add_ss_config`; it is changed.
        name: see :func:`find_config`.
        allow_unsafe: runs the Python in YAML's tags, as Detectron2 does, and downloads files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file, or one it builds on, has tags of Python or is a URL, or is no YAML of
            keys and values; or a key is not there, or a value does not fit.
    """
    path = name if is_url(name) else find_config(name)
    if allow_unsafe:
        logger.warning("%s: Python in its tags is run, and URLs are downloaded.", name)
        path = PathManager.get_local_path(path)
    else:
        _refuse_download(path)
    try:
        cfg.merge_from_file(path, allow_unsafe=allow_unsafe)
    except RecursionError as error:
        raise ValueError(f"the config {path} builds on itself (_BASE_)") from error
    except (
        *(AssertionError, AttributeError, KeyError, TypeError, ValueError),
        yaml.YAMLError,
    ) as error:
        reason = _explain(error, cfg)
        if isinstance(error, (AttributeError, TypeError)):
            reason = f"it does not consist of keys and values ({reason})"
        if "for the tag" in reason:
            reason += f". Tags of Python would run code: write out what they stand for, {_ALLOW}"
        raise ValueError(f"the config {path} does not fit: {reason}") from error
    return path


_LEAST = {
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.FEEDBACK.MIRROR_SAMPLES": 0,
    "MODEL.FEEDBACK.SEED": -1,
    "SEED": -1,
    "SOLVER.ACCUMULATION_STEPS": 1,
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.EPOCHS": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.MAX_SKIPPED_STEPS": 0,
    "TEST.ALIGNMENT_PERIOD": 0,
}


def check_config(cfg: CfgNode) -> None:
    """
    Refuse what would fail in silence or late, of values that no other place looks at: keys
    without a value, which Detectron2 lets pass, and keys of this package.

    Raises:
        ValueError: names the key, its value and what to choose.
    """
    defaults = get_cfg()
    add_ss_config(defaults)
    values = flatten_config(cfg)
    for key, default in flatten_config(defaults).items():
        if values[key] is None and default is not None:
            raise ValueError(f"{key} is None; choose a value such as its default, {default!r}")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        device = cfg.MODEL.DEVICE
        raise ValueError(f"MODEL.DEVICE is {device!r}; choose 'cuda' or 'cpu'") from error
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and batch % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch}, which SOLVER.REFERENCE_WORLD_SIZE {reference} does "
            "not divide: batch and schedule are for so many GPUs, and scaled to those here. Set "
            "SOLVER.REFERENCE_WORLD_SIZE 0 for them as they are"
        )
    for key in ("MODEL.FEEDBACK.EXCLUDE", "MODEL.WEIGHTS_EXCEPT", "MODEL.TRUSTED_WEIGHTS"):
        if not all(isinstance(pattern, str) for pattern in values[key]):
            raise ValueError(f"{key} is {values[key]!r}; choose a list of texts")
    for key in ("SOLVER.STEPS", "SOLVER.STEP_EPOCHS"):
        steps = list(values[key])
        numbers = all(isinstance(step, (int, float)) and 0 < step < 1e9 for step in steps)
        if not numbers or steps != sorted(set(steps)):
            raise ValueError(f"{key} is {steps}; choose rising numbers above 0, or none")
    solver = cfg.SOLVER
    stepwise = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    if stepwise and not (solver.EPOCHS or solver.STEP_EPOCHS) and solver.MAX_ITER in solver.STEPS:
        raise ValueError(
            f"SOLVER.MAX_ITER is {solver.MAX_ITER}, and one of SOLVER.STEPS {solver.STEPS}: choose "
            "steps before it"
        )
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR is '', where nothing is saved; choose a folder")
    for key, least in _LEAST.items():
        if values[key] < least:
            raise ValueError(f"{key} is {values[key]}; choose at least {least}")


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Write keys as on a command line: {"SOLVER": {"MAX_ITER": 4}} as {"SOLVER.MAX_ITER": 4}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": v for inner, v in flatten_config(value).items()}
        else:
            flat[key] = value
    return flat


def choose(cfg: CfgNode, key: str, *choices: Any) -> Any:
    """Return the value of a key, which has to be one of ``choices``."""
    value = reduce(getattr, key.split("."), cfg)
    if value not in choices:
        raise ValueError(f"{key} is {value!r}; choose {' or '.join(map(repr, choices))}")
    return value


def runs_on_cpu(cfg: CfgNode) -> bool:
    """Return whether MODEL.DEVICE is the CPU."""
    return torch.device(cfg.MODEL.DEVICE).type == "cpu"


def find_config(name: str) -> str:
    """
    Find a config file: ``name`` itself where such a file is, else the file of that name
    among those that ship with this package ("retinanet_ss.yaml", "quick/shapes_retinanet_ss.yaml").

    Raises:
        FileNotFoundError: there is none; names those that are like it.
    """
    if Path(name).is_file():
        return name
    package = Path(__file__).resolve().parent
    # Installed, the configs lie in the package; in a checkout, beside it.
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    if (folder / name).is_file():
        return str(folder / name)
    shipped = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
    near = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4) or shipped
    raise FileNotFoundError(
        f"there is no config file {name!r} in {Path.cwd()} nor in the package; did you mean "
        f"{', '.join(near)}?"
    )
