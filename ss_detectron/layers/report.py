"""Which layer of a model learns by which rule."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .asymmetric import AsymmetricLayer, obstacle
from .feedback import Backpropagation
from .names import grouped, plain_modules, without_numbers

__all__ = [
    "EXCLUDED",
    "NOT_CONVERTED",
    "OWN_RULE",
    "FeedbackReport",
    "FeedbackRow",
    "feedback_report",
    "weight_layers",
]

# Reasons that are somebody's choice; the first goes on with a pattern.
EXCLUDED = "excluded by "
OWN_RULE = "its own rule is backpropagation"
NOT_CONVERTED = "not converted"
PAUSED = "bypassed for a moment"

# Layers that multiply their input by a weight, which they may compute from parameters elsewhere.
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
# What is looked up or multiplied element by element, and where the layer's own row stands already.
_NO_MATRIX = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.utils.parametrize.ParametrizationList,
)
# Names of parameters that are added, looked up or multiplied element by element.
_ADDED = re.compile(
    "pos|rel_|_rel|embed|token|bias|table|gamma|alpha|scale|temperature|quer|latent|probe|prompt"
)


class FeedbackRow(NamedTuple):
    """One layer of a :class:`FeedbackReport`."""

    name: str
    rule: str
    reason: str
    """Why the layer stays on backpropagation; empty for a converted layer."""

    @property
    def why(self) -> str:
        """The reason in short."""
        return self.reason.partition(";")[0]

    @property
    def by_choice(self) -> bool:
        """Whether the layer stays on backpropagation because somebody said so."""
        return self.reason.startswith((EXCLUDED, OWN_RULE, NOT_CONVERTED, PAUSED))

    @property
    def left_out(self) -> bool:
        """Whether the layer stays on backpropagation though nobody said so."""
        return bool(self.reason) and not self.by_choice


class FeedbackReport(list[FeedbackRow]):
    """
    One row per layer with a weight, in the model's order.

    ``str()`` is a table in which layers that differ in the numbers in their names alone share a
    row, and under it a line that counts them.
    """

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for name, rule, reason in self:
            groups.setdefault((without_numbers(name), rule, reason), []).append(name)
        rows = [(*grouped(names), *key[1:]) for key, names in groups.items()]
        rows.insert(0, ("layer", "rule", "why on backpropagation"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        rows.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2]))
        lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
        return "\n".join([*(f"| {line} |" for line in lines), self.summary()])

    def summary(self) -> str:
        """Return how many layers are converted, on backpropagation by choice, and left out."""
        converted = Counter(row.rule for row in self if not row.reason)
        chosen = Counter(row.why for row in self if row.by_choice)
        left_out = Counter(row.why for row in self if row.left_out)
        return "; ".join(
            [
                _count("converted", converted),
                _count("on backpropagation by choice", chosen),
                _count("left out", left_out),
            ]
        )


def _count(what: str, parts: Counter[str]) -> str:
    reasons = ", ".join(f"{n} {part}" for part, n in parts.most_common())
    return f"{what}: {parts.total()}" + (f" ({reasons})" if reasons else "")


def feedback_report(model: nn.Module) -> FeedbackReport:
    """
    Return which layer of ``model`` learns by which rule, now.

    There is one row per layer with a weight, in the order of ``named_modules`` and under the names
    that they have without wrappers (DistributedDataParallel, Lightning Fabric, torch.compile). A
    layer that stays on backpropagation comes with the reason. That a module bypasses a layer is
    known after its first forward pass with gradients; a compiled one is not looked into.

    Embeddings and norms have no row, and a parameter of another kind of module counts as a weight
    unless its name or shape says that it is added or scales (``pos_embed``, ``gamma``).
    """
    report = FeedbackReport()
    for name, layer in weight_layers(model):
        reason = getattr(layer, "feedback_reason", None)
        rule = Backpropagation.name
        if not isinstance(layer, AsymmetricLayer):
            reason = reason or obstacle(layer) or NOT_CONVERTED
        elif layer.bypass_feedback:
            reason = reason or PAUSED
        elif not reason:
            rule, reason = layer.rule.name, ""
        report.append(FeedbackRow(name, rule, reason or ""))
    return report


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that belongs in a report, with its name."""
    for name, module in plain_modules(model):
        if isinstance(module, _WEIGHTED) or _owns_matrix(module):
            yield name, module


def _owns_matrix(module: nn.Module) -> bool:
    """Return whether a parameter of the module may multiply activations as a matrix."""
    if isinstance(module, _NO_MATRIX):
        return False
    for name, parameter in module.named_parameters(recurse=False):
        if nn.parameter.is_lazy(parameter):
            return True
        is_matrix = parameter.dim() == 2 or sum(size > 1 for size in parameter.shape) >= 2
        if is_matrix and not _ADDED.search(name):
            return True
    return False
