"""How figures look: colour, dashes and marker of rules and learners, axis labels, size of text."""

from collections.abc import Iterable
from typing import NamedTuple

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


class Style(NamedTuple):
    """How a rule is drawn, in every figure. Dashes and markers tell it apart in grey as well."""

    label: str
    colour: str
    dashes: str | tuple
    marker: str


# Cool colours follow the weights' signs, warm ones do not, purple ones learn; learners are earthy.
RULE_STYLES = {
    "backpropagation": Style("BP", "#000000", "-", "o"),
    "sign_symmetry": Style("SS", "#0072B2", (0, (6, 1.5)), "s"),
    "sign_symmetry_fixed_magnitude": Style("frSF", "#56B4E9", (0, (6, 1.5, 1, 1.5)), "^"),
    "sign_symmetry_batchwise_magnitude": Style("brSF", "#009E73", (0, (1, 1)), "v"),
    "feedback_alignment": Style("FA", "#D55E00", (0, (3, 1.5)), "D"),
    "feedback_alignment_signed_init": Style("FA, signed init", "#E69F00", (0, (3, 3)), "P"),
    "kolen_pollack": Style("KP", "#CC79A7", (0, (3, 1.5, 1, 1.5, 1, 1.5)), "X"),
    "weight_mirror": Style("WM", "#A0308C", (0, (1, 1, 1, 3)), "*"),
    "information_alignment": Style("IA", "#4B2A86", (0, (4, 1, 1, 1)), "d"),
    "direct_feedback": Style("DFA", "#8C510A", (0, (8, 2)), "h"),
    "difference_target_propagation": Style("DTP", "#4D5D10", (0, (2, 1)), "<"),
    "simplified_difference_target_propagation": Style(
        "SDTP", "#999933", (0, (5, 1, 1, 1, 1, 1)), ">"
    ),
    "auxiliary_output_sdtp": Style("AO-SDTP", "#C9B400", (0, (8, 1, 1, 1)), "p"),
}
# Of others: Paul Tol's "muted" scheme.
_OTHER_COLOURS = ("#44AA99", "#7F7F7F", "#661100", "#6699CC", "#BBBBBB", "#AA4466", "#B2182B")
DASHES = ("-", (0, (10, 2)), (0, (2, 2)), (0, (7, 1, 1, 1, 1, 1)))
MARKERS = ("8", "H", "1", "2", "3", "4", "x")

# The text of a figure that is printed as wide as it was made: a journal's text width.
RC = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#E0E0E0",
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    # Text stays text in PDF and SVG.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}

_LABELS = {
    "classification/top1_error": "top-1 error, %",
    "classification/top5_error": "top-5 error, %",
    "bbox/AP": "box AP, %",
    "segm/AP": "mask AP, %",
    "keypoints/AP": "keypoint AP, %",
    "bbox/AP50": "box AP at IoU 0.5, %",
    "bbox/AP75": "box AP at IoU 0.75, %",
    "train_top1_error": "training top-1 error, %",
    "total_loss": "total training loss",
    "loss_cls": "training loss, classes",
    "loss_box_reg": "training loss, boxes",
    "alignment/gradient_angle": "gradient angle to BP, °",
    "time": "time per step, s",
    "lr": "learning rate",
}


def label_of(key: str) -> str:
    """Labels a metric's axis, with its unit and test set; a metric not known here by its key."""
    dataset, _, base = key.partition("/")
    if key not in _LABELS and base in _LABELS:
        return f"{_LABELS[base]} ({dataset})"
    return _LABELS.get(key, key)


def style_of(name: str, others: Iterable[str] = ()) -> Style:
    """Styles a rule as :data:`RULE_STYLES` says, another name by its place among the figure's."""
    if name in RULE_STYLES:
        return RULE_STYLES[name]
    i = sorted({name, *others} - RULE_STYLES.keys()).index(name)
    colour, marker = _OTHER_COLOURS[i % len(_OTHER_COLOURS)], MARKERS[i % len(MARKERS)]
    return Style(name, colour, DASHES[i % len(DASHES)], marker)
