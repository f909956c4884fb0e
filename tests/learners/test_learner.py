"""The learner interface: the default is plain training; what others keep is saved and loaded."""

import copy

import pytest
import torch
from core_utils import assert_same, each_rule
from torch import nn

from ss_detectron import advance_feedback, convert_feedback
from ss_detectron.alignment import backpropagation_gradients
from ss_detectron.learners import LEARNER_REGISTRY, Backpropagation, Learner, build_learner


def _model(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    return convert_feedback(model, rule, overrides={"3": "backpropagation"})


def _batches(count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(5, 2, 4, 4, generator=generator), torch.arange(5) % 4


@each_rule
def test_the_default_learner_is_a_plain_training_loop(rule):
    model = _model(rule)
    expected = copy.deepcopy(model)
    learner = Backpropagation(model)
    optimizer = torch.optim.SGD(learner.parameter_groups(), lr=0.1, momentum=0.9)
    for x, y in _batches():
        optimizer.zero_grad()
        learner.backward(nn.functional.cross_entropy(learner(x), y), target=y)
        optimizer.step()
        learner.step()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: advance_feedback(expected))
    for x, y in _batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(x), y).backward()
        optimizer.step()
    assert_same(model.state_dict(), expected.state_dict())
    assert learner.own_state_dict() == {"name": "backpropagation"}


def test_reference_gradients_are_backpropagations():
    model, (x, y) = _model("fa"), next(_batches())
    loss = nn.functional.cross_entropy(model(x), y)
    expected = backpropagation_gradients(model, loss)
    assert_same(Backpropagation(model).reference_gradients(loss), expected)


class Inverse(Learner):
    """Has a parameter and a counter of its own."""

    name = "inverse"
    short_name = "inv"

    def __init__(self, model, width=2):
        super().__init__(model)
        self.inverse = nn.Linear(width, width, bias=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_config(cls, cfg, model):
        return cls(model, cfg.MODEL.LEARNER.WIDTH)

    def step(self):
        super().step()
        self.steps += 1


@pytest.fixture
def inverse(monkeypatch):
    monkeypatch.setattr(LEARNER_REGISTRY, "_classes", dict(LEARNER_REGISTRY._classes))
    return LEARNER_REGISTRY.register(Inverse)


class Node(dict):
    __getattr__ = dict.__getitem__


def _cfg(**learner):
    return Node(MODEL=Node(LEARNER=Node(learner)))


@pytest.mark.parametrize("name", ["inverse", "inv"])
def test_a_config_names_a_learner_and_the_learner_reads_its_keys(inverse, name):
    model = _model("kp")
    learner = build_learner(_cfg(NAME=name, WIDTH=3), model)
    assert type(learner) is Inverse and learner.model is model
    assert learner.inverse.weight.shape == (3, 3)
    assert type(build_learner(_cfg(NAME="bp"), model)) is Backpropagation
    with pytest.raises(ValueError, match="unknown learner 'hebb'.*backpropagation .bp.*inverse"):
        build_learner(_cfg(NAME="hebb"), model)


@pytest.mark.parametrize("name", ["DFA", "direct feedback alignment", "Direct Feedback"])
def test_learners_go_by_the_names_of_the_literature(name):
    assert LEARNER_REGISTRY.get(name).name == "direct_feedback"


def test_own_parameters_have_a_group_and_own_state_is_saved_apart(inverse):
    model = _model("kp")
    learner = Inverse(model)
    models, own = learner.parameter_groups()
    assert own["params"] == [learner.inverse.weight]
    assert set(models["params"]) == set(model.parameters())
    assert model[0].feedback_weight in set(models["params"])
    learner.step()
    state = learner.own_state_dict()
    assert set(state) == {"name", "inverse.weight", "steps"}

    other = Inverse(_model("kp"))
    before = copy.deepcopy(other.model.state_dict())
    other.load_own_state_dict(state)
    assert int(other.steps) == 1 and torch.equal(other.inverse.weight, learner.inverse.weight)
    assert_same(other.model.state_dict(), before)
    with pytest.raises(ValueError, match="of the learner 'inverse', and .* MODEL.LEARNER.NAME inv"):
        Backpropagation(model).load_own_state_dict(state)
    del state["name"]  # as before it was saved
    other.load_own_state_dict(state)
    for wrong in ({}, {**state, "more": torch.zeros(1)}):
        with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
            other.load_own_state_dict(wrong)


class Forgetful(nn.BatchNorm2d):
    """Begins anew where a state dict does not mention it, as Detectron2's FrozenBatchNorm2d."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "running_mean" not in state_dict:
            self.running_mean.zero_()
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_loading_its_own_state_leaves_the_model_alone(inverse):
    learner = Inverse(nn.Sequential(Forgetful(2)))
    nn.init.constant_(learner.model[0].running_mean, 5)
    learner.load_own_state_dict(learner.own_state_dict())
    assert learner.model[0].running_mean.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (type("Nameless", (Learner,), {}), "needs a name"),
        (type("Plain", (nn.Module,), {"name": "plain"}), "no learner: it must extend Learner"),
        (type("Taken", (Learner,), {"name": "bp"}), "is Backpropagation's"),
    ],
)
def test_what_is_no_learner_or_takes_anothers_name_is_not_registered(wrong, message):
    with pytest.raises(ValueError, match=message):
        LEARNER_REGISTRY.register(wrong)
