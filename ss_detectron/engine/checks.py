"""What is refused, or warned of, before a run begins."""

import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ss_detectron.checkpoint.files import is_checkpoint_name
from ss_detectron.config import choose, runs_on_cpu
from ss_detectron.data.images import FLIPS
from ss_detectron.layers import FEEDBACK_REGISTRY, FeedbackReport, check_exclude, get_rule
from ss_detectron.layers.feedback import Backpropagation
from ss_detectron.learners import LEARNER_REGISTRY
from ss_detectron.modeling import RETINANET_HEAD_REGISTRY
from ss_detectron.modeling.cifar_resnet import NARROW_DEPTHS
from ss_detectron.modeling.compilation import check_compiler
from ss_detectron.utils.text import abbreviate
from ss_detectron.utils.trust import check_download, check_pickle, is_url, needs_pickle

__all__ = ["check_conversion", "check_options", "check_proposals", "check_weights"]

logger = logging.getLogger(__name__)

# Of detectron2.layers.get_norm.
_NORMS = ("", "BN", "FrozenBN", "GN", "LN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


def check_options(cfg: CfgNode, *, training: bool = True) -> None:
    """Refuse unknown names, and options that do not go together, or not with this machine."""
    feedback, on_cpu = cfg.MODEL.FEEDBACK, runs_on_cpu(cfg)
    learner = cfg.MODEL.LEARNER.NAME
    if learner in FEEDBACK_REGISTRY and learner not in LEARNER_REGISTRY:
        raise ValueError(
            f"MODEL.LEARNER.NAME is {learner!r}, a feedback rule: set MODEL.FEEDBACK.RULE {learner}"
        )
    if training:
        LEARNER_REGISTRY.get(learner)
    for rule in filter(None, (feedback.RULE, feedback.LAST_LAYER_RULE)):
        if rule in LEARNER_REGISTRY and rule not in FEEDBACK_REGISTRY:
            raise ValueError(
                f"MODEL.FEEDBACK: {rule!r} is no feedback rule but a learner: set "
                f"MODEL.LEARNER.NAME {rule}"
            )
        get_rule(rule)(feedback.SCALE, feedback.GAIN)
    choose(cfg, "SOLVER.OPTIMIZER", "SGD", "AdamW")
    choose(cfg, "INPUT.RANDOM_FLIP", *FLIPS, "none")
    samplers = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")
    choose(cfg, "DATALOADER.SAMPLER_TRAIN", *samplers)
    if "resnet" in cfg.MODEL.BACKBONE.NAME:
        narrow = NARROW_DEPTHS if "cifar_resnet" in cfg.MODEL.BACKBONE.NAME else ()
        choose(cfg, "MODEL.RESNETS.DEPTH", 18, 34, 50, 101, 152, *narrow)
        choose(cfg, "MODEL.RESNETS.NORM", *_NORMS)
    choose(cfg, "MODEL.RETINANET.HEAD", *(name for name, _ in RETINANET_HEAD_REGISTRY))
    if on_cpu and torch.cuda.is_available() and comm.get_world_size() > 1:
        raise ValueError(
            "MODEL.DEVICE is cpu, but several processes use the GPUs that are here: hide them with "
            "CUDA_VISIBLE_DEVICES='' in the environment"
        )
    if cfg.TEST.ALIGNMENT_PERIOD and cfg.MODEL.COMPILED:
        raise ValueError(
            f"TEST.ALIGNMENT_PERIOD is {cfg.TEST.ALIGNMENT_PERIOD} and MODEL.COMPILED is True: a "
            "compiled model cannot give backpropagation's gradients beside its own"
        )
    if on_cpu and cfg.MODEL.COMPILED:
        check_compiler()
    if on_cpu and cfg.SOLVER.AMP.ENABLED and "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        logger.warning(
            "SOLVER.AMP.ENABLED on the CPU: of a feature map of one pixel (p7 of images of up to "
            "128), torch's gradient in bfloat16 is now and then not finite. Use larger images."
        )


def check_conversion(cfg: CfgNode, model: nn.Module, report: FeedbackReport) -> None:
    """
    Refuse MODEL.FEEDBACK keys to no effect, and warn of a model that follows them only in part, as
    stock and converting builders can be mixed.
    """
    feedback = cfg.MODEL.FEEDBACK
    check_exclude(model, feedback.EXCLUDE)
    asymmetric = any(row.rule != Backpropagation.name for row in report)
    if feedback.RULE and get_rule(feedback.RULE) is not Backpropagation and not asymmetric:
        raise ValueError(
            f"MODEL.FEEDBACK.RULE is {feedback.RULE!r}, but no layer of this model follows it "
            f"(MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r}, MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE!r}, MODEL.FEEDBACK.EXCLUDE {feedback.EXCLUDE}): use a "
            "build_feedback_* backbone and ImageClassifier or FeedbackRetinaNet"
        )
    left = [row.name for row in report if row.reason == "not converted"]
    if asymmetric and left:
        logger.warning(
            "%d layers that no builder converted stay on backpropagation: %s",
            len(left),
            abbreviate(left),
        )


def check_weights(cfg: CfgNode, *, training: bool) -> None:
    """
    Refuse weights that are not there or not trusted, or that a training would archive; announce a
    download, and warn of a start from none where that cannot work.
    """
    weights = cfg.MODEL.WEIGHTS
    file = weights.partition("?")[0]
    check_download(weights, cfg.MODEL.TRUSTED_WEIGHTS)
    if needs_pickle(weights):
        check_pickle(weights, cfg.MODEL.TRUSTED_WEIGHTS)
    if is_url(weights):
        logger.info(
            "MODEL.WEIGHTS is %s: it is downloaded unless it is in the cache. Without a network, "
            "set a local file, or '' to start from scratch.",
            weights,
        )
    elif weights and not os.path.isfile(file):
        raise FileNotFoundError(
            f"MODEL.WEIGHTS is {weights!r}, and there is no such file: give another, or '' to "
            "start from scratch"
        )
    elif (
        weights
        and training
        and is_checkpoint_name(os.path.basename(file))
        and os.path.realpath(os.path.dirname(file)) == os.path.realpath(cfg.OUTPUT_DIR)
    ):
        raise ValueError(
            f"MODEL.WEIGHTS is {weights!r}, of an earlier run in OUTPUT_DIR, whose files a new run "
            "archives: give this run another OUTPUT_DIR, or go on with the earlier one by --resume"
        )
    elif not weights and not training:
        logger.warning("MODEL.WEIGHTS is empty: this evaluates a network that was never trained.")
    elif (
        not weights and "resnet" in cfg.MODEL.BACKBONE.NAME and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    ):
        logger.warning(
            "MODEL.WEIGHTS is empty and MODEL.RESNETS.NORM is FrozenBN, which does not learn: to "
            "start from scratch, see retinanet_scratch_*.yaml and imagenet_*.yaml."
        )


def check_proposals(cfg: CfgNode) -> None:
    """Refuse proposals, which Detectron2 downloads and unpickles, that are not trusted."""
    for key in ("PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):
        for file in cfg.DATASETS[key] if cfg.MODEL.LOAD_PROPOSALS else ():
            check_download(file, cfg.MODEL.TRUSTED_WEIGHTS, f"DATASETS.{key}")
            check_pickle(file, cfg.MODEL.TRUSTED_WEIGHTS)
            logger.warning("The proposals %s are unpickled, which runs the code in them.", file)
