"""Optimisers from a config."""

import copy

import pytest
import torch
from solver_utils import make_model
from torch import nn

pytest.importorskip("detectron2")

from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.solver import LRMultiplier  # noqa: E402
from detectron2.solver import build_optimizer as detectron2_build_optimizer  # noqa: E402
from fvcore.common.param_scheduler import MultiStepParamScheduler  # noqa: E402

from ss_detectron import add_ss_config  # noqa: E402
from ss_detectron.solver import SGD  # noqa: E402
from ss_detectron.solver.build import build_optimizer  # noqa: E402


def make_cfg(**solver) -> CfgNode:
    """Keys of SOLVER; LAST_LAYER_X stands for LAST_LAYER.X, CLIP for the clipping of values."""
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.SOLVER.BASE_LR = 0.25
    clip = solver.pop("CLIP", None)
    if clip:
        cfg.SOLVER.CLIP_GRADIENTS.update(ENABLED=True, CLIP_VALUE=clip)
    for key, value in solver.items():
        node = cfg.SOLVER.LAST_LAYER if key.startswith("LAST_LAYER_") else cfg.SOLVER
        node[key.removeprefix("LAST_LAYER_")] = value
    return cfg


def train(model, optimizer, steps=4) -> None:
    for step in range(steps):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        x = x.to(model.conv.weight)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def settings_by_name(optimizer, model) -> dict[str, dict]:
    names = {p: name for name, p in model.named_parameters()}
    # What stands for learned feedback where that is folded.
    factors = [(n, b) for n, b in model.named_buffers() if n.endswith("feedback_factor")]
    names |= {b: name.replace("feedback_factor", "feedback_weight") for name, b in factors}
    return {
        names[p]: {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize(
    "solver",
    [
        {"CLIP": 1e-3},
        {"NESTEROV": True, "WEIGHT_DECAY": 0.1},
        {"BIAS_LR_FACTOR": 2.0, "WEIGHT_DECAY_BIAS": 0.3, "WEIGHT_DECAY_NORM": 0.2},
    ],
)
def test_without_options_it_is_detectron2s_optimizer(solver):
    cfg = make_cfg(**solver)
    model = make_model("kp")
    other = copy.deepcopy(model)
    ours, theirs = build_optimizer(cfg, model), detectron2_build_optimizer(cfg, other)
    settings, expected = settings_by_name(ours, model), settings_by_name(theirs, other)
    assert list(settings) == list(expected)
    for name, setting in expected.items():
        assert settings[name].items() >= (setting | {"foreach": None}).items(), name
    train(model, ours)
    train(other, theirs)
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-7)
    for a, b in zip(model.children(), other.children(), strict=True):
        if hasattr(a, "feedback_factor"):
            torch.testing.assert_close(a.current_feedback(), b.feedback_weight)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_last_layer_has_a_learning_rate_of_its_own_under_the_schedule(optimizer):
    model = make_model()
    cfg = make_cfg(OPTIMIZER=optimizer, LAST_LAYER_BASE_LR=0.03125, BIAS_LR_FACTOR=2.0)
    built = build_optimizer(cfg, model)
    assert isinstance(built, getattr(torch.optim, optimizer))
    # weights, norm weights (no weight decay), biases, norm biases, and the last layer's two
    assert len(built.param_groups) == 6

    def rates():
        return {name: group["lr"] for name, group in settings_by_name(built, model).items()}

    first = rates()
    assert first["conv.weight"] == first["norm.weight"] == first["hidden.weight"] == 0.25
    assert first["conv.bias"] == first["norm.bias"] == first["hidden.bias"] == 0.5
    assert (first["score.weight"], first["score.bias"]) == (0.03125, 0.0625)
    assert not any(name.startswith("frozen") for name in first)
    schedule = MultiStepParamScheduler([1.0, 0.5], milestones=[2], num_updates=4)
    scheduler = LRMultiplier(built, schedule, max_iter=4)
    for factor in (1.0, 0.5, 0.5):
        built.step()
        scheduler.step()
        assert rates() == {name: lr * factor for name, lr in first.items()}


@pytest.mark.parametrize("last", [False, True])
def test_the_options_hold_for_the_layers_that_the_keys_say(last):
    model = make_model()
    prefix = "LAST_LAYER_" if last else ""
    cfg = make_cfg(**{prefix + "BATCH_MANHATTAN": True, prefix + "NO_SIGN_CHANGE": True})
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is SGD
    assert len(optimizer.param_groups) == (4 if last else 5)
    settings = settings_by_name(optimizer, model)
    assert len(settings) == 8
    for name, setting in settings.items():
        held = name.startswith("score") == last
        assert setting["batch_manhattan"] == held, name
        assert setting["no_sign_change"] == (held and not name.endswith("bias")), name


def test_options_without_last_layers_hold_for_all_and_say_so(caplog):
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = build_optimizer(make_cfg(BATCH_MANHATTAN=True), model)
    assert [g["batch_manhattan"] for g in optimizer.param_groups] == [True]
    assert "SOLVER.BATCH_MANHATTAN" in caplog.text and "last_layers" in caplog.text


def test_gradients_are_clipped_before_the_options_apply():
    model = make_model()
    optimizer = build_optimizer(
        make_cfg(BATCH_MANHATTAN=True, MOMENTUM=0.0, WEIGHT_DECAY=0.0, CLIP=1e-4), model
    )
    hidden, score = (p.detach().clone() for p in (model.hidden.weight, model.score.weight))
    train(model, optimizer, steps=1)
    hidden_grad, score_grad = model.hidden.weight.grad, model.score.weight.grad
    assert score_grad.abs().max() == pytest.approx(1e-4)
    torch.testing.assert_close(model.hidden.weight - hidden, -0.25 * hidden_grad.sign())
    torch.testing.assert_close(model.score.weight - score, -0.25 * score_grad)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"OPTIMIZER": "Adam"}, "OPTIMIZER is 'Adam'; choose 'SGD' or 'AdamW'"),
        ({"LAST_LAYER_BASE_LR": -0.1}, "LAST_LAYER.BASE_LR is -0.1; choose 0 or more"),
        ({"OPTIMIZER": "AdamW", "NO_SIGN_CHANGE": True}, "NO_SIGN_CHANGE is an option of SGD"),
        (
            {"OPTIMIZER": "AdamW", "LAST_LAYER_BATCH_MANHATTAN": True},
            "LAST_LAYER.BATCH_MANHATTAN is an option of SGD",
        ),
    ],
)
def test_a_key_that_does_not_fit_is_named(solver, message):
    with pytest.raises(ValueError, match=f"SOLVER.{message}"):
        build_optimizer(make_cfg(**solver), make_model())


@pytest.mark.parametrize("solver", [{"BASE_LR": 0.1}, {"NO_SIGN_CHANGE": True}])
def test_last_layers_that_the_model_does_not_have_are_named(solver):
    (key,) = solver
    cfg = make_cfg(**{f"LAST_LAYER_{key}": solver[key]})
    message = f"SOLVER.LAST_LAYER.{key} is set, but Sequential .*last_layers"
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "solver",
    [
        {"BIAS_LR_FACTOR": 3.0, "WEIGHT_DECAY_BIAS": 0.7, "WEIGHT_DECAY_NORM": 0.5},
        {"LAST_LAYER_BATCH_MANHATTAN": True, "LAST_LAYER_BASE_LR": 0.0625},
    ],
)
def test_feedback_approaches_its_weight_by_the_closed_form(solver):
    model = make_model("kp").double()
    optimizer = build_optimizer(make_cfg(MOMENTUM=0.0, WEIGHT_DECAY=0.25, **solver), model)
    layers = {"conv": 0.25, "hidden": 0.25, "score": solver.get("LAST_LAYER_BASE_LR", 0.25)}
    before = {n: getattr(model, n).current_feedback() for n in layers}
    apart = {n: getattr(model, n).weight - before[n] for n in layers}
    frozen = model.frozen.feedback_weight.clone()
    steps = 5
    train(model, optimizer, steps)
    for name, lr in layers.items():
        layer = getattr(model, name)
        expected = apart[name] * (1 - lr * 0.25) ** steps
        feedback = layer.current_feedback()
        torch.testing.assert_close(layer.weight - feedback, expected)
        # And not by weight decay alone: the gradient moves it too.
        assert (feedback - before[name] * (1 - lr * 0.25) ** steps).abs().max() > 1e-4
    assert torch.equal(model.frozen.feedback_weight, frozen)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_state_of_other_shapes_is_refused(optimizer):
    model = make_model()
    built = build_optimizer(make_cfg(OPTIMIZER=optimizer), model)
    train(model, built)
    state = built.state_dict()
    of_first = state["state"][0]
    name = next(key for key, value in of_first.items() if value.dim())
    of_first[name] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=rf"{name} that was loaded has shape \(1,\), its parameter"
    ):
        built.load_state_dict(state)
