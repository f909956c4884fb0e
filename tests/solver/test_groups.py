"""A feedback weight that learns is in its weight's parameter group."""

import pytest
from solver_utils import make_model

from ss_detectron.solver import match_feedback_groups


def test_feedback_is_moved_into_its_weights_group_whatever_the_groups():
    model = make_model("kp")
    named = list(model.named_parameters())
    feedback = [p for n, p in named if n.endswith("feedback_weight")]
    rest = [(n, p) for n, p in named if not n.endswith("feedback_weight") and "score" not in n]
    groups = [
        {"params": iter(feedback), "lr": 0.1, "weight_decay": 0.0},
        {"params": rest, "lr": 0.2},
        {"params": model.score.weight, "lr": 0.3, "weight_decay": 0.5},
        {"params": [model.score.bias]},
    ]
    matched = match_feedback_groups(groups, model)
    assert len(groups[1]["params"]) == len(rest)
    for new, old in zip(matched, groups, strict=True):
        assert {**new, "params": ()} == {**old, "params": ()}
    assert [len(g["params"]) for g in matched] == [0, len(rest) + 3, 2, 1]
    assert [m for m in matched[1]["params"] if isinstance(m, tuple)] == rest
    for layer, i in ((model.conv, 1), (model.hidden, 1), (model.frozen, 1), (model.score, 2)):
        assert any(p is layer.feedback_weight for p in matched[i]["params"])
    # Nothing is left to be moved.
    for new, old in zip(match_feedback_groups(matched, model), matched, strict=True):
        assert list(map(id, new["params"])) == list(map(id, old["params"]))


def test_a_pair_in_torn_groups_is_refused_by_name():
    model = make_model("kp")
    weights = [p for n, p in model.named_parameters() if not n.endswith("feedback_weight")]
    for params, first, second in (
        (weights, "conv.weight", "conv.feedback_weight"),
        ([model.score.feedback_weight], "score.feedback_weight", "score.weight"),
    ):
        with pytest.raises(
            ValueError, match=f"{first} is in .* {second} is in none.*requires_grad"
        ):
            match_feedback_groups([{"params": params}], model)
    assert match_feedback_groups([{"params": [model.conv.bias]}], model)
