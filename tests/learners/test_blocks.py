"""Direct feedback and target propagation: the identities that a right implementation has."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from core_utils import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ss_detectron import convert_feedback
from ss_detectron.alignment import backpropagation_gradients
from ss_detectron.learners import (
    AuxiliaryOutputTargetPropagation,
    Backpropagation,
    DifferenceTargetPropagation,
    DirectFeedbackAlignment,
    SimplifiedTargetPropagation,
)

TARGETS = [
    DifferenceTargetPropagation,
    SimplifiedTargetPropagation,
    AuxiliaryOutputTargetPropagation,
]
LEARNERS = [DirectFeedbackAlignment, *TARGETS]
each_learner = pytest.mark.parametrize("kind", LEARNERS)
each_target_learner = pytest.mark.parametrize("kind", TARGETS)
DEPTH, CLASSES = 4, 3


def _model(activation=nn.Tanh, width=5, bias=True):
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for _ in range(DEPTH - 1):
        layers += [nn.Linear(width, width, bias=bias), activation()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES, bias=bias)).double()


def _conv_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 8),
        nn.Tanh(),
        nn.Linear(8, CLASSES),
    ).double()


def _batch(count=6, shape=(5,)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % CLASSES


def _gradients(learner, x, y, scale=1.0):
    for parameter in learner.parameters():
        parameter.grad = None
    learner.backward(scale * F.cross_entropy(learner(x), y), target=y)
    return {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}


def _pass(learner, x, y):
    """What the learner computes from, before its backward pass: the pass, h, and the scale 1."""
    logits = learner(x)
    done = learner._pass_of(F.cross_entropy(logits, y), y)
    return done, [h.detach() for h in done.outputs[:-1]], torch.ones((), dtype=torch.float64)


def _steps(learner, x, y):
    return learner.target_steps(*_pass(learner, x, y))


def _hidden_gradients(model, x, y):
    """Backpropagation's gradients per sample at the outputs of the hidden blocks."""
    h, hidden = x, []
    for module in model:
        h = module(h)
        if isinstance(module, nn.Tanh | nn.Identity):
            h.retain_grad()
            hidden.append(h)
    F.cross_entropy(h, y, reduction="sum").backward()
    return [h.grad for h in hidden]


@pytest.mark.parametrize("make", [_model, _conv_model])
@each_learner
def test_each_gradient_is_that_of_the_layers_own_local_loss(kind, make):
    model = make()
    x, y = _batch(shape=(5,) if make is _model else (2, 9, 9))
    learner = kind(model)
    got = _gradients(learner, x, y)
    done, h, scale = _pass(learner, x, y)

    blocks = [nn.Sequential(*block) for block in learner.blocks]
    outputs = []
    for block in blocks:
        outputs.append(block(outputs[-1].detach() if outputs else x))
    losses = [F.cross_entropy(outputs[-1], y)]
    if kind is DirectFeedbackAlignment:
        error = (outputs[-1].softmax(1) - F.one_hot(y, CLASSES)).detach() / len(x)
        feedbacks = [learner.feedback(i, o, outputs[-1]) for i, o in enumerate(outputs[:-1])]
        for output, feedback in zip(outputs, feedbacks, strict=False):
            losses.append((output.flatten(1) * (error @ feedback.t())).sum())
    else:
        learner._passes -= 1  # the noise of the step above
        losses += learner.inverse_losses(done, h)
        for output, d in zip(outputs, learner.target_steps(done, h, scale), strict=False):
            losses.append((output - (output + d).detach()).square().sum() / len(x))
    learner.zero_grad()
    for loss in losses:
        touched = torch.autograd.grad(
            loss, [*learner.parameters()], retain_graph=True, allow_unused=True
        )
        names = {
            n
            for (n, _), g in zip(learner.named_parameters(), touched, strict=True)
            if g is not None
        }
        assert len({name.split(".")[-2] for name in names} | {kind}) == 2  # one layer alone
        loss.backward()
    expected = {n: p.grad for n, p in learner.named_parameters()}
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@each_learner
def test_the_last_block_learns_by_backpropagation(kind):
    model = _model()
    x, y = _batch()
    expected = _gradients(Backpropagation(copy.deepcopy(model)), x, y)
    got = _gradients(kind(model), x, y)
    for name in ("model.7.weight", "model.7.bias"):
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12)


def test_direct_feedback_through_the_last_weights_is_backpropagation_one_block_down():
    model = _model()
    x, y = _batch()
    expected = _gradients(Backpropagation(copy.deepcopy(model)), x, y)
    learner = DirectFeedbackAlignment(model)
    learner.feedback = lambda index, output, logits: model[-1].weight.detach().t()
    got = _gradients(learner, x, y)
    for name in ("model.5.weight", "model.5.bias"):
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scale", "bound"), [("xavier", (6 / 8) ** 0.5), ("kaiming", 3**-0.5)])
def test_direct_feedback_is_drawn_from_seed_and_block(scale, bound):
    model = _model()
    x, y = _batch()

    def drawn(seed):
        learner = DirectFeedbackAlignment(copy.deepcopy(model), scale=scale, seed=seed)
        learner(x)
        outputs = learner._done.outputs
        return [learner.feedback(i, h, outputs[-1]) for i, h in enumerate(outputs[:-1])]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert [tuple(b.shape) for b in first] == [(5, CLASSES)] * 3
    assert_same(dict(enumerate(first)), dict(enumerate(again)))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])
    assert 0.8 * bound < max(b.abs().max() for b in first) <= bound


@pytest.mark.parametrize(
    ("kind", "still"),
    [
        (DifferenceTargetPropagation, {"alpha": 0.0}),
        (SimplifiedTargetPropagation, {"target_step": 0.0}),
        (AuxiliaryOutputTargetPropagation, {"target_step": 0.0}),
    ],
)
def test_a_target_that_is_the_activation_teaches_nothing(kind, still):
    x, y = _batch()
    learner = kind(_model(), **still)
    assert all(not d.any() for d in _steps(learner, x, y))
    got = _gradients(learner, x, y)
    assert not any(got[f"model.{i}.weight"].any() for i in (1, 3, 5))


def _set_inverses(learner, weight_of):
    """Linear inverses without bias, of the block below each."""
    for index, inverse in enumerate(learner.inverses, start=1):
        with torch.no_grad():
            inverse.layer.weight.copy_(weight_of(learner.blocks[index][0].weight))
            inverse.layer.bias.zero_()


def test_orthogonal_layers_and_their_transposes_pass_on_backpropagations_gradient():
    model = _model(nn.Identity)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
    learner = DifferenceTargetPropagation(model, alpha=0.3)
    _set_inverses(learner, torch.t)
    x, y = _batch()
    steps = _steps(learner, x, y)
    for d, gradient in zip(steps, _hidden_gradients(model, x, y), strict=True):
        torch.testing.assert_close(d, -0.3 * gradient, rtol=0, atol=1e-8)


def test_exact_inverses_reach_their_targets():
    learner = DifferenceTargetPropagation(_model(nn.Identity, bias=False))
    _set_inverses(learner, torch.linalg.inv)
    x, y = _batch()
    steps = _steps(learner, x, y)
    _, h, _ = _pass(learner, x, y)
    for i in range(1, len(h)):
        (layer, _) = learner.blocks[i]
        got = layer(h[i - 1] + steps[i - 1]) - h[i]
        torch.testing.assert_close(got, steps[i], rtol=0, atol=1e-8)


def test_small_steps_go_down_by_the_inverses_jacobians():
    learner = DifferenceTargetPropagation(_model(), alpha=1e-5)
    x, y = _batch()
    steps = _steps(learner, x, y)
    _, h, _ = _pass(learner, x, y)
    expected = steps[-1]
    for i in range(len(h) - 1, 0, -1):
        inverse = learner.inverses[i - 1]
        slope = 1 - inverse(h[i], h[i - 1]) ** 2
        expected = expected @ inverse.layer.weight.t() * slope
        torch.testing.assert_close(steps[i - 1], expected, rtol=1e-4, atol=0)


def test_the_auxiliary_output_without_weights_is_sdtp():
    x, y = _batch()
    plain = SimplifiedTargetPropagation(_model(), noise=0.0)
    auxiliary = AuxiliaryOutputTargetPropagation(_model(), auxiliary_units=7, noise=0.0)
    for one, other in zip(plain.inverses, auxiliary.inverses, strict=True):
        weight = torch.zeros_like(other.layer.weight)
        weight[:, : one.layer.in_features] = one.layer.weight.detach()
        other.layer.weight.data = weight
    torch.testing.assert_close(
        dict(enumerate(_steps(plain, x, y))),
        dict(enumerate(_steps(auxiliary, x, y))),
        rtol=0,
        atol=1e-15,
    )


def test_sdtp_with_a_small_inverse_is_twice_direct_feedback_one_block_down():
    # d = g(y) - g(p) is about V (y - p), and the gradient of a square has a factor of 2.
    x, y = _batch()
    learner = SimplifiedTargetPropagation(_model())
    with torch.no_grad():
        learner.inverses[-1].layer.weight *= 1e-6
        learner.inverses[-1].layer.bias.zero_()
    direct = DirectFeedbackAlignment(copy.deepcopy(learner.model))
    direct.feedback = lambda *_: learner.inverses[-1].layer.weight.detach()
    got = _gradients(learner, x, y)["model.5.weight"]
    expected = _gradients(direct, x, y)["model.5.weight"]
    torch.testing.assert_close(got, 2 * expected, rtol=1e-6, atol=0)


@each_target_learner
def test_alternating_phases_update_one_part_alone_and_together_make_a_parallel_step(kind):
    x, y = _batch()
    learner = kind(_model(), schedule="alternating", period=2)
    parallel = kind(_model())
    optimizer = torch.optim.Adam(learner.parameter_groups(), lr=0.1)
    before = copy.deepcopy(learner.state_dict())
    both = _gradients(parallel, x, y)
    apart = {}
    for step in range(4):
        gradients = _gradients(learner, x, y)
        part = "inverses." if step < 2 else "model."
        assert {name for name in both if name.startswith(part)} == set(gradients)
        if step in (0, 2):
            learner.load_state_dict({**before, "_extra_state": torch.tensor([step, 0])})
            apart.update(_gradients(learner, x, y))
        optimizer.step()
        learner.step()
    assert_same(apart, both)


@each_target_learner
def test_an_idle_part_keeps_its_weights_and_its_optimisers_state(kind):
    x, y = _batch()
    learner = kind(_model(), schedule="alternating", period=1)
    optimizer = torch.optim.Adam(learner.parameter_groups(), lr=0.1, weight_decay=0.1)
    for step in range(4):
        parts = {"inverses": learner.inverses, "model": learner.model}
        idle = parts["inverses" if step % 2 else "model"]
        optimizer.zero_grad()
        before = {n: p.clone() for n, p in idle.named_parameters()}
        states = copy.deepcopy([optimizer.state.get(p) for p in idle.parameters()])
        learner.backward(F.cross_entropy(learner(x), y), target=y)
        optimizer.step()
        learner.step()
        assert_same(dict(idle.named_parameters()), before)
        assert str(states) == str([optimizer.state.get(p) for p in idle.parameters()])


@each_learner
def test_a_scaled_loss_scales_all_gradients(kind):
    x, y = _batch()
    expected = _gradients(kind(_model()), x, y)
    got = _gradients(kind(_model()), x, y, scale=0.25)
    torch.testing.assert_close({n: 4 * g for n, g in got.items()}, expected, rtol=1e-10, atol=1e-12)


@each_learner
def test_evaluation_is_the_models_own_and_keeps_nothing(kind):
    learner = kind(_model())
    x, y = _batch()
    learner.eval()
    x.requires_grad_()
    F.cross_entropy(learner(x), y).backward()
    assert x.grad.any() and learner.model[1].weight.grad.any()
    with pytest.raises(RuntimeError, match="needs a forward pass of the learner in training"):
        learner.backward(F.cross_entropy(learner(x), y), target=y)


@each_learner
def test_reference_gradients_are_backpropagations(kind):
    model = _model()
    x, y = _batch()
    expected = backpropagation_gradients(model, F.cross_entropy(model(x), y))
    learner = kind(model)
    loss = F.cross_entropy(learner(x), y)
    torch.testing.assert_close(learner.reference_gradients(loss), expected, rtol=0, atol=1e-12)
    learner.backward(loss, target=y)


@pytest.mark.parametrize(
    ("kind", "options", "step"),
    [
        *((kind, {}, 0) for kind in LEARNERS),
        *(
            (kind, {"schedule": "alternating", "period": 1}, step)
            for kind, step in itertools.product(TARGETS, (0, 1))
        ),
    ],
)
def test_what_a_learner_measures_is_how_its_gradients_lie_and_changes_nothing(kind, options, step):
    x, y = _batch()

    def fresh():
        learner = kind(_model(), **options)
        for _ in range(step):
            learner.step()
        return learner

    expected = _gradients(fresh(), x, y)
    learner = fresh()
    loss = F.cross_entropy(learner(x), y)
    found = learner.measure(loss, y)
    learner.backward(loss, target=y)
    got = {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}
    assert_same(got, expected)

    hidden = _hidden_gradients(learner.model, x, y)
    if kind is DirectFeedbackAlignment:
        error = (learner.model(x).softmax(1) - F.one_hot(y, CLASSES)).detach()
        got = [error @ learner.feedback(i, h, error).t() for i, h in enumerate(hidden)]
    else:
        learner._passes -= 1
        done, h, scale = _pass(learner, x, y)
        if kind is DifferenceTargetPropagation:
            done.top_gradient = hidden[-1] / len(x)
        got = [-d for d in learner.target_steps(done, h, scale)]
        for name, d, output in zip(learner.block_names, got, h, strict=False):
            assert found[f"target_step/{name}"] == pytest.approx((d.norm() / output.norm()).item())
        losses = dict(zip(learner.block_names[1:], learner.inverse_losses(done, h), strict=False))
        for name, value in losses.items():
            assert found[f"inverse_loss/{name}"] == pytest.approx(value.item())
    for name, one, other in zip(learner.block_names, got, hidden, strict=False):
        cosine = F.cosine_similarity(one.flatten(), other.flatten(), 0).item()
        assert found[f"error_cosine/{name}"] == pytest.approx(cosine, abs=1e-12)
    if kind is DifferenceTargetPropagation:  # by the last block's own weights
        assert found["error_cosine/5"] == pytest.approx(1)


@each_learner
def test_training_lowers_the_loss(kind):
    torch.manual_seed(0)
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.arange(60) % CLASSES
    x += 2 * F.one_hot(y, 5)
    learner = kind(_model())
    optimizer = torch.optim.Adam(learner.parameter_groups(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(learner(x), y)
        learner.backward(loss, target=y)
        optimizer.step()
        learner.step()
    assert loss < 0.6


@each_learner
def test_a_resumed_learner_goes_on_bit_for_bit(kind):
    batches = [_batch(4 + i) for i in range(4)]
    options = {} if kind is DirectFeedbackAlignment else {"schedule": "alternating", "period": 1}

    def run(learner, optimizer, batches):
        for x, y in batches:
            optimizer.zero_grad()
            learner.backward(F.cross_entropy(learner(x), y), target=y)
            optimizer.step()
            learner.step()

    def fresh():
        learner = kind(_model(), **options)
        return learner, torch.optim.Adam(learner.parameter_groups(), lr=0.01)

    learner, optimizer = fresh()
    run(learner, optimizer, batches)
    first, its_optimizer = fresh()
    run(first, its_optimizer, batches[:2])
    second, optimizer = fresh()
    second.model.load_state_dict(first.model.state_dict())
    second.load_own_state_dict(first.own_state_dict())
    optimizer.load_state_dict(its_optimizer.state_dict())
    run(second, optimizer, batches[2:])
    assert_same(second.state_dict(), learner.state_dict())


# What must not go wrong in silence ----------------------------------------------------------------


@each_learner
def test_the_loss_is_of_one_forward_pass(kind):
    x, y = _batch()
    learner = kind(_model())
    first = F.cross_entropy(learner(x), y)
    with pytest.raises(RuntimeError, match="the loss is of several forward passes"):
        learner.backward(first + F.cross_entropy(learner(x), y), target=y)
    learner(x)
    with pytest.raises(RuntimeError, match="does not come from the learner's last forward pass"):
        learner.backward(F.cross_entropy(_model()(x), y), target=y)
    expected = _gradients(kind(_model()), x, y)
    learner = kind(_model())
    learner(x)  # thrown away
    assert_same(_gradients(learner, x, y), expected)


@each_target_learner
def test_a_step_before_the_backward_pass_is_refused_where_it_changes_the_phase(kind):
    x, y = _batch()
    for options in ({"schedule": "alternating", "period": 1}, {}):
        learner = kind(_model(), **options)
        loss = F.cross_entropy(learner(x), y)
        learner.step()
        if options:
            with pytest.raises(RuntimeError, match=r"step\(\) came between a forward pass and its"):
                learner.backward(loss, target=y)
        else:
            learner.backward(loss, target=y)


@each_learner
def test_an_evaluation_between_forward_and_backward_and_a_copy_change_nothing(kind):
    x, y = _batch()
    expected = _gradients(kind(_model()), x, y)
    learner = kind(_model())
    loss = F.cross_entropy(learner(x), y)
    learner.eval()
    learner(x)
    learner.train()
    copy.deepcopy(learner)
    learner.backward(loss, target=y)
    assert_same({n: p.grad for n, p in learner.named_parameters()}, expected)


@pytest.mark.parametrize("kind", LEARNERS[:2])
def test_the_losss_own_backward_does_the_same_and_refuses_a_second_derivative(kind):
    x, y = _batch()
    first, second = kind(_model()), kind(_model())
    for _ in range(2):  # target propagation draws its noise anew
        first.zero_grad()
        first.backward(F.cross_entropy(first(x), y))
        second.zero_grad()
        F.cross_entropy(second(x), y).backward()
        assert_same(*({n: p.grad for n, p in k.named_parameters()} for k in (first, second)))
    loss = F.cross_entropy(second(x), y)
    gradients = torch.autograd.grad(loss, [*second.parameters()], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(g.square().sum() for g in gradients).backward()


class Checkpointed(nn.Sequential):
    def forward(self, h):
        for module in self:
            h = checkpoint(module, h, use_reentrant=False)
        return h


@each_learner
def test_probabilities_compiled_models_and_reentrant_checkpoints_are_refused(kind):
    x, y = _batch()
    for end in (nn.Softmax(1), nn.LogSoftmax(1)):
        with pytest.raises(ValueError, match=f"ends in {type(end).__name__}.*starts at logits"):
            kind(nn.Sequential(*_model(), end))
    compiled = _model()
    compiled.compile()
    with pytest.raises(ValueError, match="cannot cut a compiled model"):
        kind(compiled)

    def checkpointed(reentrant):
        model = _model()
        inner, function = model[3].forward, functools.partial(checkpoint, use_reentrant=reentrant)
        model[3].forward = lambda h: function(inner, h)
        return kind(model)

    expected = _gradients(kind(_model()), x, y)
    assert_same(_gradients(checkpointed(False), x, y), expected)
    whole = kind(Checkpointed(*_model()))
    assert_same(_gradients(whole, x.clone().requires_grad_(), y), expected)
    with pytest.raises(ValueError, match="'3' ran without gradients.*use_reentrant=False"):
        _gradients(checkpointed(True), x, y)


@each_learner
def test_a_frozen_last_block_leaves_the_others_learning(kind):
    x, y = _batch()
    expected = _gradients(kind(_model()), x, y)
    model = _model()
    model[-1].requires_grad_(False)
    got = _gradients(kind(model), x, y)
    assert set(expected) - set(got) == {"model.7.weight", "model.7.bias"}
    assert_same(got, {name: expected[name] for name in got})


@each_learner
def test_backward_within_autocast_is_in_full_precision(kind):
    x, y = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _batch())
    learner = kind(_model().float())
    loss = F.cross_entropy(learner(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        learner.backward(loss, target=y)
    got = {name: p.grad for name, p in learner.named_parameters()}
    assert_same(got, _gradients(kind(_model().float()), x, y))


def test_what_is_computed_between_blocks_is_warned_of(caplog):
    class Functional(Twice):
        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    x, y = _batch()
    model = Functional().double()
    learner = DirectFeedbackAlignment(model, ["a", "b"])
    for _ in range(2):
        _gradients(learner, x, y)
    (record,) = caplog.records
    assert "Between the blocks 'a' and 'b' something is computed" in record.message
    with pytest.raises(ValueError, match="'b' does not take what 'a' gives"):
        _gradients(DifferenceTargetPropagation(model, ["a", "b"]), x, y)


def test_inverses_are_made_for_what_a_block_shows_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return torch.tanh(self.layer(x))

    x, y = _batch()
    model = nn.Sequential(Block(), Block(), nn.Linear(5, CLASSES)).double()
    with pytest.raises(ValueError, match="'0': its forward computes more than its layer"):
        _gradients(DifferenceTargetPropagation(model), x, y)
    with pytest.raises(ValueError, match="no inverse of Conv2d"):
        layers = [nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, padding="same")]
        DifferenceTargetPropagation(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)))


class Own(nn.Linear):
    def forward(self, h, like):
        return super().forward(h)


@pytest.mark.parametrize("kind", TARGETS[:2])
def test_blocks_with_batch_norm_and_functions_in_place_are_as_those_without(kind):
    x, y = _batch()
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(inplace), nn.Linear(5, 5)]
        model = nn.Sequential(*layers, nn.ReLU(inplace), nn.Linear(5, CLASSES)).double()
        count = 2 if kind is SimplifiedTargetPropagation else 1
        inverses = [Own(5, 5), Own(CLASSES, 5)][:count]
        blocks = [["0", "1"], ["2", "3"], ["4", "5"]]
        learner = kind(model, blocks, inverses=nn.ModuleList(inverses).double())
        found.append(_gradients(learner, x, y))
        assert int(model[1].num_batches_tracked) == 1
    assert_same(*found)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, y: F.cross_entropy(logits, y, label_smoothing=0.1),
        lambda logits, y: F.cross_entropy(logits, y, torch.tensor([1.0, 2, 3]).double()),
        lambda logits, y: F.cross_entropy(logits.div_(2), y),  # nor of logits that were changed
        lambda logits, y: F.mse_loss(logits, F.one_hot(y, CLASSES).double()),
    ],
)
@each_target_learner
def test_target_propagation_refuses_another_loss(kind, loss):
    x, y = _batch()
    model = _model()
    model[-1].weight.data *= 30  # at even probabilities, smoothing is a scale
    learner = kind(model)
    with pytest.raises(ValueError, match="mean cross entropy of the logits, and this loss is"):
        learner.backward(loss(learner(x), y), target=y)


@each_target_learner
def test_a_batch_that_is_fitted_to_the_last_bit_gives_finite_gradients(kind):
    x, y = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _batch())
    learner = kind(_model().float())
    _gradients(learner, x, y)
    with torch.no_grad():
        learner.model[-1].weight.zero_()
    x, y = x[:1].repeat(300, 1), y[:1].repeat(300)
    learner.model[-1].bias.data = 200 * F.one_hot(y, CLASSES).float()[0]
    assert all(g.isfinite().all() for g in _gradients(learner, x, y).values())


@pytest.mark.parametrize("rule", ["fa", "frsf", "kp"])
@each_learner
def test_measuring_leaves_a_network_on_feedback_rules_trainable(kind, rule):
    x, y = _batch()
    learner = kind(convert_feedback(_model(), rule, overrides={"7": "bp"}))
    loss = F.cross_entropy(learner(x), y)
    learner.measure(loss, y)
    learner.reference_gradients(loss)
    learner.backward(loss, target=y)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(x + self.block(x)))


def test_direct_feedback_on_a_residual_network_and_target_propagation_refuses_it():
    model = Residual().double()
    x, y = _batch(shape=(2, 5, 5))
    learner = DirectFeedbackAlignment(model, ["stem", "block", "head"])
    assert all(g.any() for g in _gradients(learner, x, y).values())
    with pytest.raises(ValueError, match="no inverse follows from the block 'block'.*inverses="):
        DifferenceTargetPropagation(model, ["stem", "block", "head"])

    class Copy(nn.Module):
        def forward(self, h, like):
            return like

    chain = DifferenceTargetPropagation(model, ["stem", "block", "head"], inverses=[Copy()])
    with pytest.raises(ValueError, match="needs a chain of blocks, and 'head' does not take what"):
        _gradients(chain, x, y)


class Twice(nn.Module):
    def __init__(self, output=lambda h: h):
        super().__init__()
        self.a, self.b, self.output = nn.Linear(5, 5), nn.Linear(5, CLASSES), output

    def forward(self, x):
        return self.b(self.a(self.a(x)))


@pytest.mark.parametrize(
    ("model", "blocks", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 3)), None, "two blocks or more"),
        (_model, ["1", "5", "7"], r"3.weight, 3.bias of Sequential is in no block"),
        (_model, ["1", "9"], "no module '9'"),
        (lambda: nn.Sequential(_model(), nn.Linear(3, 3)), ["0", "0.1", "1"], "in two blocks"),
        (Residual, None, "does not say what its blocks are: .*LEARNER.NAME needs .*Classifier"),
    ],
)
@each_learner
def test_what_are_no_blocks_is_refused_by_name(kind, model, blocks, message):
    with pytest.raises(ValueError, match=message):
        kind(model(), blocks)


def test_blocks_that_run_otherwise_or_give_two_tensors_are_refused_by_name():
    x, _ = _batch()
    with pytest.raises(ValueError, match="once each and in their order: 'a' ran after 1"):
        DirectFeedbackAlignment(Twice().double(), ["a", "b"])(x)
    with pytest.raises(ValueError, match="did not run the block '5'"):
        model = _model()
        model.forward = lambda x: model[:5](x)
        DirectFeedbackAlignment(model)(x)

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="the block '0' gives a tuple"):
        DirectFeedbackAlignment(nn.Sequential(Pair(5, 5), nn.Linear(5, 3)).double())(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "random"}, "schedule is 'random'; choose one of parallel, alternating"),
        ({"schedule": "alternating"}, "period is 0"),
        ({"noise": -1.0}, "noise -1.0"),
        ({"inverses": []}, "needs 2 inverses, not 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DifferenceTargetPropagation(_model(), **options)
    with pytest.raises(ValueError, match="scale is 'rms'"):
        DirectFeedbackAlignment(_model(), scale="rms")


@pytest.mark.parametrize("kind", TARGETS[1:])
def test_labels_are_asked_for(kind):
    learner = kind(_model())
    x, y = _batch()
    with pytest.raises(ValueError, match=r"needs the labels: backward\(loss, target=y\)"):
        learner.backward(F.cross_entropy(learner(x), y))


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        (Backpropagation, {}, 1),
        (DirectFeedbackAlignment, {}, 1),
        (DifferenceTargetPropagation, {}, 1),
        (DifferenceTargetPropagation, {"schedule": "alternating", "period": 1}, 2),
        (SimplifiedTargetPropagation, {}, 1),
        (AuxiliaryOutputTargetPropagation, {"auxiliary_units": 7}, 1),
    ],
)
def test_multiply_adds_are_those_of_a_hand_count(kind, options, steps):
    count, sizes = 8, (20, 12, 10, 9, 4)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    learner = kind(nn.Sequential(*layers), **options)
    x, y = torch.randn(count, sizes[0]), torch.arange(count) % sizes[-1]

    def train():
        for _ in range(steps):
            learner.backward(F.cross_entropy(learner(x), y), target=y)
            learner.step()

    train()  # the first pass is looked at
    with FlopCounterMode(display=False) as counter:
        train()

    products = [a * b for a, b in itertools.pairwise(sizes)]
    middle, top, all_layers = sum(products[1:-1]), products[-1], sum(products)
    # Forward, and the gradients of the weights.
    expected = {"backpropagation": 2 * all_layers + middle + top}
    expected["direct_feedback"] = 2 * all_layers + sum(sizes[1:-1]) * sizes[-1]
    # Of an inverse: its input, itself, its gradient; twice for the target. DTP's top target is a
    # gradient through the last layer.
    expected["difference_target_propagation"] = 2 * all_layers + 5 * middle + top
    expected["simplified_difference_target_propagation"] = 2 * all_layers + 5 * (middle + top)
    # z is made for the inverse, and for the target twice, and is as wide at the inverse's input.
    wide = 7 * sizes[-2]
    expected["auxiliary_output_sdtp"] = 2 * all_layers + 5 * (middle + top) + (3 + 4) * wide
    # The step of the inverses alone has a forward pass, the model's no inverses of its own.
    expected = expected[kind.name] + (all_layers if steps == 2 else 0)
    assert counter.get_total_flops() == 2 * count * expected


@each_learner
def test_autocast_in_the_forward_pass_gives_nearly_the_same_gradients(kind):
    x, y = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _batch())
    expected = _gradients(kind(_model().float()), x, y)
    learner = kind(_model().float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(learner(x), y)
    learner.backward(loss, target=y)
    for name, gradient in expected.items():
        got = learner.get_parameter(name).grad
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got.flatten(), gradient.flatten(), 0) > 0.98
