"""Kolen-Pollack folded into an offset and a number learns as it does with a parameter."""

import copy
import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ss_detectron import backpropagation, convert_feedback
from ss_detectron.layers import AsymmetricLayer
from ss_detectron.solver import SGD, fold_kolen_pollack, match_feedback_groups

CLOSE = {"rtol": 0, "atol": 1e-10}
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.05),
    "momentum": lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.05),
    "nesterov": lambda groups: SGD(
        groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05, maximize=True
    ),
    "dampening": lambda groups: torch.optim.SGD(
        groups, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05
    ),
    "manhattan": lambda groups: SGD(groups, lr=1e-3, weight_decay=0.05, batch_manhattan=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5),
}


class Net(nn.Module):
    """A convolution, two layers that share a weight, and one that some steps leave out."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.sometimes = nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x, whole=True):
        x = torch.tanh(self.conv(x)).flatten(1)
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.sometimes(x)) if whole else x)


def _start(optimizer, fold):
    torch.manual_seed(0)
    model = convert_feedback(Net().double(), "kp", scale="rms")
    groups = match_feedback_groups(
        [
            {"params": [p for n, p in model.named_parameters() if "last" not in n]},
            {"params": model.last.parameters(), "lr": 0.02},
        ],
        model,
    )
    if optimizer != "adam":
        groups[1]["weight_decay"] = 0.3
    built = OPTIMIZERS[optimizer](groups)
    if fold:
        assert fold_kolen_pollack(model, built) == 5
    return model, built


def _backward(model, number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 2, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (4,), generator=generator)
    loss = nn.functional.cross_entropy(model(x, whole=number % 3 != 0), y)
    loss.backward()
    return loss


def _steps(model, optimizer, numbers, within=nullcontext):
    """Steps whose backward passes, or that as a whole, are within a context."""
    for number in numbers:
        if number == 12:
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        optimizer.zero_grad()
        with within(model):
            _backward(model, number)
            if number % 2:
                optimizer.step()
        if not number % 2:
            optimizer.step()


def _learned(model):
    """W and B of all layers."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AsymmetricLayer)}
    found = {f"{name}.B": layer.current_feedback() for name, layer in layers.items()}
    return {**found, **dict(model.named_parameters())}


def _assert_alike(folded, plain):
    expected = _learned(plain)
    got = _learned(folded)
    torch.testing.assert_close(got, {n: expected[n] for n in got}, **CLOSE)
    assert {n.rpartition(".")[2] for n in expected if n not in got} == {"feedback_weight"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_learns_what_the_parameter_learns(optimizer):
    plain, folded = _start(optimizer, False), _start(optimizer, True)
    _assert_alike(folded[0], plain[0])
    before = _learned(plain[0])["conv.B"].clone()
    for model, built in plain, folded:
        _steps(model, built, range(20))
    _assert_alike(folded[0], plain[0])
    assert not torch.allclose(_learned(folded[0])["conv.B"], before, atol=1e-3)


def test_it_stands_still_where_the_parameter_does():
    plain, folded = _start("sgd", False), _start("sgd", True)
    for numbers, within in (
        (range(4), nullcontext),
        (range(4, 8), backpropagation),
        (range(8, 12), nullcontext),
    ):
        for model, built in plain, folded:
            _steps(model, built, numbers, within)
        _assert_alike(folded[0], plain[0])


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_closures_and_discarded_gradients_change_nothing(optimizer):
    plain, folded = _start(optimizer, False), _start(optimizer, True)
    for model, built in plain, folded:

        def closure(model=model, built=built):
            built.zero_grad()
            return _backward(model, 3)

        _steps(model, built, range(3))
        built.step(closure)
        with backpropagation(model):  # to look at
            _backward(model, 50)
        _steps(model, built, range(4, 8))
    _assert_alike(folded[0], plain[0])


def test_a_second_call_and_another_memory_format_change_nothing():
    plain, folded = _start("sgd", False), _start("sgd", True)
    fold_kolen_pollack(*folded)
    for model, built in plain, folded:
        model.to(memory_format=torch.channels_last)
        _steps(model, built, range(4))
        _steps(model, built, range(4, 6), backpropagation)
        _steps(model, built, range(6, 8))
    _assert_alike(folded[0], plain[0])


def test_it_keeps_one_copy_of_the_weight():
    model, optimizer = _start("momentum", True)
    _steps(model, optimizer, range(2))
    own = [(n, b) for n, b in model.named_buffers() if "feedback" in n]
    assert {n.rpartition(".")[2] for n, _ in own} == {"feedback_offset", "feedback_factor"}
    assert not [n for n, _ in model.named_parameters() if "feedback" in n]
    kept = optimizer.state[model.conv.feedback_factor]
    assert kept["momentum_buffer"].numel() == 1
    assert model.first.feedback_offset is model.second.feedback_offset


@pytest.mark.parametrize("rule", ["bp", "fa"])
def test_a_folded_model_is_converted_and_trained_on(rule):
    model, optimizer = _start("momentum", True)
    _steps(model, optimizer, range(3))
    convert_feedback(model, rule)
    _steps(model, optimizer, range(3, 6))


def test_it_is_resumed_bit_for_bit():
    model, optimizer = _start("momentum", True)
    _steps(model, optimizer, range(5))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    _steps(model, optimizer, range(5, 15))
    other, resumed = _start("momentum", True)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    _steps(other, resumed, range(5, 15))
    torch.testing.assert_close(_learned(other), _learned(model), rtol=0, atol=0)


@pytest.mark.parametrize("folds", [True, False])
def test_a_state_dict_of_the_other_form_is_converted(folds, caplog):
    saved, optimizer = _start("momentum", not folds)
    _steps(saved, optimizer, range(5))
    model, resumed = _start("momentum", folds)
    assert model.load_state_dict(saved.state_dict()) == ([], [])
    torch.testing.assert_close(
        {n: t for n, t in _learned(model).items() if n.endswith("B")},
        {n: t for n, t in _learned(saved).items() if n.endswith("B")},
        **CLOSE,
    )
    if folds:
        with caplog.at_level(logging.WARNING):
            resumed.load_state_dict(optimizer.state_dict())
        assert "of 4 of them: the run goes on, but not bit for bit" in caplog.text
        _steps(model, resumed, range(5, 8))


def test_weights_without_feedback_and_parts_load():
    model, optimizer = _start("momentum", True)
    start = model.last.current_feedback()
    stock = Net().double().state_dict()
    _steps(model, optimizer, range(5))
    assert model.load_state_dict(stock) == ([], [])
    assert (model.last.feedback_factor == 1).all()
    saved = _start("momentum", True)
    _steps(*saved, range(5))
    other = convert_feedback(Net().double(), "fa")
    assert other.load_state_dict(saved[0].state_dict()) == ([], [])
    torch.testing.assert_close(other.last.feedback_weight, saved[0].last.current_feedback())
    part = {n: t for n, t in saved[0].state_dict().items() if t.shape != (3, 12)}
    fresh, _ = _start("momentum", True)
    fresh.load_state_dict(part, strict=False)
    assert torch.equal(fresh.last.current_feedback(), start)


def test_an_optimizers_state_of_another_form_is_refused():
    saved, plain = _start("momentum", True), _start("momentum", False)
    _steps(*saved, range(2))
    with pytest.raises(ValueError, match="momentum_buffer that was loaded has shape .*folded"):
        plain[1].load_state_dict(saved[1].state_dict())


def test_a_second_optimizer_takes_it_over():
    plain, folded = _start("sgd", False), _start("sgd", True)
    models = plain[0], folded[0]
    for model, built in plain, folded:
        _steps(model, built, range(3))
    for model in models:
        groups = match_feedback_groups([{"params": model.parameters()}], model)
        built = OPTIMIZERS["momentum"](groups)
        fold_kolen_pollack(model, built) if model is folded[0] else None
        _steps(model, built, range(3, 9))
    _assert_alike(*reversed(models))


def test_a_fold_between_the_passes_counts_in_the_backward_pass():
    gradients = []
    for folds in (False, True):
        model, optimizer = _start("sgd", False)
        _steps(model, optimizer, range(2))
        x = torch.ones(2, 2, 4, 4, dtype=torch.float64)
        loss = model(x).square().sum()
        if folds:
            fold_kolen_pollack(model, optimizer)
        optimizer.zero_grad()
        loss.backward()
        gradients.append(model.conv.weight.grad)
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("RMSprop may treat W and B", lambda model, groups: torch.optim.RMSprop(groups)),
        ("Adam divides", lambda model, groups: torch.optim.Adam(groups, weight_decay=0.1)),
        ("no-sign-change looks", lambda model, groups: SGD(groups, no_sign_change=True)),
        ("different parameter groups", lambda model, groups: torch.optim.SGD(_torn(model), 0.1)),
    ],
)
def test_what_cannot_be_folded_is_refused_and_stays(reason, make):
    model = convert_feedback(Net(), "kp")
    optimizer = make(model, match_feedback_groups([{"params": model.parameters()}], model))
    before = [*model.named_parameters()]
    with pytest.raises(ValueError, match=f"cannot be folded: .*{reason}"):
        fold_kolen_pollack(model, optimizer)
    assert [*model.named_parameters()] == before


def _torn(model):
    feedback = [p for n, p in model.named_parameters() if "feedback" in n]
    rest = [p for n, p in model.named_parameters() if "feedback" not in n]
    return [{"params": feedback}, {"params": rest}]


def test_an_optimizer_that_has_begun_is_refused():
    model, optimizer = _start("momentum", False)
    _steps(model, optimizer, range(1))
    with pytest.raises(ValueError, match="the optimiser has begun"):
        fold_kolen_pollack(model, optimizer)


def test_a_model_that_was_moved_is_refused():
    model, optimizer = _start("sgd", True)
    model.float()
    model.double()
    with pytest.raises(RuntimeError, match="moved or converted after fold_kolen_pollack"):
        _steps(model, optimizer, range(1))


def test_a_copy_that_no_optimizer_moves_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr("ss_detectron.layers.asymmetric._PATIENCE", 3)
    model, optimizer = _start("sgd", True)
    _steps(model, optimizer, range(5))
    assert "no optimiser moved the folded feedback" not in caplog.text
    copied = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        _steps(copied, torch.optim.SGD(copied.parameters(), 0.1), range(5))
    assert "no optimiser moved the folded feedback in 3 backward passes" in caplog.text


def test_layers_of_other_rules_and_frozen_ones_are_left():
    model = convert_feedback(Net(), "fa", overrides={"sometimes": "kp", "last": "kp"})
    model.last.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, 0.1)
    assert fold_kolen_pollack(model, optimizer) == 1
    assert hasattr(model.last, "feedback_weight") and not hasattr(model.conv, "feedback_factor")
    assert fold_kolen_pollack(nn.Linear(1, 1), optimizer) == 0


@pytest.mark.slow
def test_it_is_compiled():
    plain, compiled = _start("momentum", True), _start("momentum", True)
    _steps(*plain, range(6))
    _steps(torch.compile(compiled[0], backend="aot_eager"), compiled[1], range(6))
    torch.testing.assert_close(_learned(compiled[0]), _learned(plain[0]), **CLOSE)
