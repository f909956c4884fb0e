"""How figures look: the colour, dashes and marker of each feedback rule, and the size of text."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["COLOURS", "DASHES", "MARKERS", "RC", "RULE_STYLES", "Style", "style_of"]

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


class Style(NamedTuple):
    """How a rule is drawn, in every figure. Dashes and markers tell it apart in grey as well."""

    label: str
    colour: str
    dashes: str | tuple
    marker: str


# Okabe and Ito's colours: cool ones follow the weights' signs, warm ones do not.
RULE_STYLES = {
    "backpropagation": Style("BP", "#000000", "-", "o"),
    "sign_symmetry": Style("SS", "#0072B2", (0, (6, 1.5)), "s"),
    "sign_symmetry_fixed_magnitude": Style("frSF", "#56B4E9", (0, (6, 1.5, 1, 1.5)), "^"),
    "sign_symmetry_batchwise_magnitude": Style("brSF", "#009E73", (0, (1, 1)), "v"),
    "feedback_alignment": Style("FA", "#D55E00", (0, (3, 1.5)), "D"),
    "feedback_alignment_signed_init": Style("FA, signed init", "#E69F00", (0, (3, 3)), "P"),
    "kolen_pollack": Style("KP", "#CC79A7", (0, (3, 1.5, 1, 1.5, 1, 1.5)), "X"),
}
# Further ones, of Paul Tol's "muted" scheme.
_OTHER_COLOURS = ("#882255", "#117733", "#332288", "#999933", "#AA4499", "#44AA99", "#7F7F7F")
DASHES = ("-", (0, (8, 2)), (0, (2, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("h", "<", ">", "*", "p", "d", "8")

# The text of a figure that is printed as wide as it was made: a journal's text width.
RC = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#E0E0E0",
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    # Text stays text in PDF and SVG.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


def style_of(name: str, others: Iterable[str] = ()) -> Style:
    """
    How a rule is drawn: as :data:`RULE_STYLES` says, always. Any other name has a colour and a
    marker that follow from the name, as far as none of ``others`` has them already.

    Args:
        name: a rule's full name, or any other.
        others: all names of the figure.
    """
    if name in RULE_STYLES:
        return RULE_STYLES[name]
    taken: dict[str, int] = {}
    for other in sorted({name, *others} - RULE_STYLES.keys()):
        place = int.from_bytes(hashlib.sha256(other.encode()).digest()[:4], "big")
        free = set(range(len(_OTHER_COLOURS))) - set(taken.values())
        while free and place % len(_OTHER_COLOURS) not in free:
            place += 1
        taken[other] = place % len(_OTHER_COLOURS)
    place, number = taken[name], sorted(taken).index(name)
    dashes = DASHES[number % len(DASHES)]
    return Style(name, _OTHER_COLOURS[place], dashes, MARKERS[place])
