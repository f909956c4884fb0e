"""Parameter groups in which learned feedback weights stand with their weights."""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from ss_detectron.layers import AsymmetricLayer

__all__ = ["match_feedback_groups"]


def match_feedback_groups(groups: Iterable[dict[str, Any]], model: nn.Module) -> list[dict]:
    """
    Move each learned feedback weight (Kolen-Pollack) into the parameter group of its weight: with
    one learning rate and weight decay for both, the two converge (Akrout et al. 2019,
    arXiv:1904.05391). For any optimiser::

        groups = match_feedback_groups(my_parameter_groups(model), model)
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4)

    Args:
        groups: as optimisers take them, dicts of "params" and settings; they are left as they are.
        model: whose layers they are of.

    Returns:
        new groups, in the same order. One that held nothing but feedback weights is empty.

    Raises:
        ValueError: of a weight and its feedback weight, only one is in ``groups``.
    """
    groups = [{**group, "params": _as_list(group["params"])} for group in groups]
    group_of = {_parameter(m): group for group in groups for m in group["params"]}
    for name, layer in model.named_modules():
        if not (isinstance(layer, AsymmetricLayer) and layer.rule.learned):
            continue
        weights = layer.weight_names(layer)
        names = [cast(str, layer.rule.state_name), *weights]
        found = [key for key in names if layer.get_parameter(key) in group_of]
        missing = [key for key in names if key not in found]
        if found and missing:
            raise ValueError(
                f"{name}.{found[0]} is in a parameter group and {name}.{missing[0]} is in none: "
                "they learn together. Put both in a group, or none; frozen ones are often left "
                "out: see their requires_grad"
            )
        if found:
            group_of[layer.feedback_state] = group_of[layer.get_parameter(weights[0])]
    members = [member for group in groups for member in group["params"]]
    for group in groups:
        group["params"] = [m for m in members if group_of[_parameter(m)] is group]
    return groups


def _as_list(params: Any) -> list:
    return [params] if isinstance(params, Tensor) else list(params)


def _parameter(member: Tensor | tuple[str, Tensor]) -> Tensor:
    """Of a group's member, which may come with its name."""
    return member[1] if isinstance(member, tuple) else member
