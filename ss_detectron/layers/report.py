"""Which layer of a model learns by which rule."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .asymmetric import AsymmetricLayer, obstacle
from .feedback import Backpropagation

__all__ = ["FeedbackReport", "FeedbackRow", "feedback_report", "weight_layers"]

# Layers that multiply their input by a weight, which they may compute from parameters elsewhere.
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)


class FeedbackRow(NamedTuple):
    """One layer of a :class:`FeedbackReport`."""

    name: str
    rule: str
    reason: str
    """Why the layer stays on backpropagation; empty for a converted layer."""


class FeedbackReport(list[FeedbackRow]):
    """One row per layer with a weight, in the model's order; ``str()`` is a table."""

    def __str__(self) -> str:
        rows = [("layer", "rule", "why on backpropagation"), *self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        rule = FeedbackRow(*("-" * width for width in widths))
        lines = [" | ".join(map(str.ljust, row, widths)) for row in (rows[0], rule, *rows[1:])]
        return "\n".join(f"| {line} |" for line in lines)


def feedback_report(model: nn.Module) -> FeedbackReport:
    """
    Return which layer of ``model`` learns by which rule, now.

    There is one row per layer with a weight, in the order of ``named_modules``. A layer that stays
    on backpropagation comes with the reason.
    """
    report = FeedbackReport()
    for name, layer in weight_layers(model):
        if isinstance(layer, AsymmetricLayer):
            rule = Backpropagation if layer.bypass_feedback else layer.rule
            reason = "bypassed for a moment" if layer.bypass_feedback else ""
            report.append(FeedbackRow(name, rule.name, reason))
        else:
            reason = getattr(layer, "feedback_reason", None) or obstacle(layer) or "not converted"
            report.append(FeedbackRow(name, Backpropagation.name, reason))
    return report


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that belongs in a report, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, _WEIGHTED) or _owns_matrix(module):
            yield name, module


def _owns_matrix(module: nn.Module) -> bool:
    """Return whether the module holds a parameter of two or more dimensions: perhaps a weight."""
    parameters = module.parameters(recurse=False)
    return any(nn.parameter.is_lazy(p) or p.dim() >= 2 for p in parameters)
