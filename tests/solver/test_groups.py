"""A feedback weight that learns is in its weight's parameter group."""

import pytest
from solver_utils import make_model

from ss_detectron.solver import match_feedback_groups


def test_feedback_is_moved_into_its_weights_group_whatever_the_groups():
    model = make_model("kp")
    feedback = [p for n, p in model.named_parameters() if n.endswith("feedback_weight")]
    rest = [
        (n, p)
        for n, p in model.named_parameters()
        if not n.endswith("feedback_weight") and not n.startswith("score")
    ]
    groups = [
        {"params": iter(feedback), "lr": 0.1, "weight_decay": 0.0},
        {"params": rest, "lr": 0.2},
        {"params": model.score.weight, "lr": 0.3, "weight_decay": 0.5},
        {"params": [model.score.bias]},
    ]
    matched = match_feedback_groups(groups, model)
    assert [len(g["params"]) for g in groups[1:2]] == [len(rest)]
    assert [{k: v for k, v in g.items() if k != "params"} for g in matched] == [
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.2},
        {"lr": 0.3, "weight_decay": 0.5},
        {},
    ]
    assert [len(g["params"]) for g in matched] == [0, len(rest) + 3, 2, 1]
    assert [m for m in matched[1]["params"] if isinstance(m, tuple)] == rest
    for layer, i in ((model.conv, 1), (model.hidden, 1), (model.frozen, 1), (model.score, 2)):
        assert any(p is layer.feedback_weight for p in matched[i]["params"])
    # Nothing is left to be moved.
    again = match_feedback_groups(matched, model)
    assert [[id(p) for p in g["params"]] for g in again] == [
        [id(p) for p in g["params"]] for g in matched
    ]


def test_a_pair_in_torn_groups_is_refused_by_name():
    model = make_model("kp")
    weights = [p for n, p in model.named_parameters() if not n.endswith("feedback_weight")]
    with pytest.raises(ValueError, match="conv.weight is in .* conv.feedback_weight is in none"):
        match_feedback_groups([{"params": weights}], model)
    with pytest.raises(ValueError, match="score.feedback_weight is in .* score.weight is in none"):
        match_feedback_groups([{"params": [model.score.feedback_weight]}], model)
    assert match_feedback_groups([{"params": [model.conv.bias]}], model)
    model.conv.feedback_weight.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="conv.feedback_weight is in none.*requires_grad"):
        match_feedback_groups([{"params": learned}], model)
