"""The config keys this package adds to Detectron2's, and where its config files are found."""

import difflib
from pathlib import Path

from detectron2.config import CfgNode

__all__ = ["add_ss_config", "find_config"]


def add_ss_config(cfg: CfgNode) -> None:
    """Adds this package's keys, with their defaults, to a Detectron2 config."""
    _C = cfg

    _C.MODEL.FEEDBACK = CfgNode()
    # Which rule the layers built by build_{ss,fa,feedback}_* and *RetinaNetHead learn by: a name
    # or short name of ss_detectron.layers.feedback (bp, ss, frsf, brsf, fa, fasi, kp). Empty: the
    # one that the builder is named after; the generic ones (build_feedback_*) need it.
    _C.MODEL.FEEDBACK.RULE = ""
    # The rule of a network's last layers (RetinaNet: cls_score and bbox_pred).
    _C.MODEL.FEEDBACK.LAST_LAYER_RULE = "backpropagation"
    # How large the feedback weights are: mean_abs, rms, kaiming or xavier ...
    _C.MODEL.FEEDBACK.SCALE = "mean_abs"
    # ... times this.
    _C.MODEL.FEEDBACK.GAIN = 1.0
    # Determines all random feedback, together with the layers' names.
    _C.MODEL.FEEDBACK.SEED = 0
    # Layers that stay on backpropagation: shell-style patterns of module names in the whole model,
    # such as "backbone.fpn_*".
    _C.MODEL.FEEDBACK.EXCLUDE = []

    # The head of meta-architecture FeedbackRetinaNet: RetinaNetHead, SSRetinaNetHead,
    # FARetinaNetHead, FeedbackRetinaNetHead, or one's own in RETINANET_HEAD_REGISTRY.
    _C.MODEL.RETINANET.HEAD = "RetinaNetHead"

    # SGD or AdamW, over Detectron2's own parameter groups.
    _C.SOLVER.OPTIMIZER = "SGD"

    # One's own data sets in COCO's format, registered before training: triples of a name (for
    # DATASETS.TRAIN and TEST), an annotation file and an image folder.
    _C.DATASETS.COCO_INSTANCES = []


def find_config(name: str) -> str:
    """
    The path of a config file: ``name`` itself where such a file is, else the file of that name
    among those that ship with this package ("retinanet_ss.yaml", "quick/shapes_retinanet_ss.yaml").

    Raises:
        FileNotFoundError: there is none; names those that are like it.
    """
    if Path(name).is_file():
        return name
    package = Path(__file__).resolve().parent
    # Installed, the configs lie in the package; in a checkout, beside it.
    folders = [f for f in (package / "configs", package.parent / "configs") if f.is_dir()]
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    shipped = sorted({p.relative_to(f).as_posix() for f in folders for p in f.rglob("*.yaml")})
    near = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4) or shipped
    raise FileNotFoundError(
        f"there is no config file {name!r}, neither as a path (from {Path.cwd()}) nor among those "
        f"that ship with ss_detectron; did you mean {', '.join(near)}?"
    )
