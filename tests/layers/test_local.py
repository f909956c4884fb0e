"""Locally connected layers: against convolutions, their own adjoint, and stock autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from core_utils import FromInputs, assert_same, each_rule
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ss_detectron import advance_feedback, convert_feedback, feedback_report, weight_alignment
from ss_detectron.layers import (
    AsymmetricLocallyConnected2d,
    LocallyConnected2d,
    LocallyConnectedTranspose2d,
    backpropagation,
    local,
)
from ss_detectron.learners import DifferenceTargetPropagation
from ss_detectron.learners.target_propagation import Inverse

# in_channels, out_channels, kernel_size, input_size, stride, padding
SIZES = [
    (1, 3, 3, 8, 2, "same"),
    (2, 3, 5, 7, 2, "same"),
    (2, 2, (2, 3), (6, 5), (1, 3), "same"),
    (3, 2, 1, 5, 2, "same"),
    (2, 4, 3, 6, 1, 1),
    (2, 3, (3, 2), (7, 6), (2, 1), (2, 0)),
    (2, 3, 2, 7, 3, 0),
]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


@pytest.fixture(params=[1, 1 << 23], ids=["row by row", "at once"])
def at_once(request, monkeypatch):
    monkeypatch.setitem(local._AT_ONCE, "cpu", request.param)


def build(sizes, kind=LocallyConnected2d, **options):
    torch.manual_seed(0)
    layer = kind(*sizes, dtype=torch.float64, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def images(layer, count=3, **options):
    generator = torch.Generator().manual_seed(1)
    shape = count, layer.in_channels, *layer.grid.size
    return torch.randn(shape, generator=generator, dtype=torch.float64, **options)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def unfolded(layer, x):
    """The layer by its definition: all windows, each by its own weight."""
    (top, left), (bottom, right) = layer.grid.before, layer.grid.after
    padded = F.pad(x, (left, right, top, bottom))
    columns = F.unfold(padded, layer.grid.kernel_size, stride=layer.grid.stride)
    columns = columns.unflatten(1, (layer.in_channels, -1)).transpose(1, 2).flatten(1, 2)
    y = torch.einsum("nkp,pck->ncp", columns, layer.weight) + layer.bias.t()
    return y.unflatten(2, layer.grid.positions)


# What it computes.


@pytest.mark.parametrize(
    "size, kernel_size, stride, positions, before, after",
    [
        (28, 3, 2, 14, 0, 1),
        (32, 5, 2, 16, 1, 2),
        (224, 9, 4, 56, 2, 3),
        (8, 3, 1, 8, 1, 1),
        (7, 3, 2, 4, 1, 1),
        (6, 2, 1, 6, 0, 1),
        (5, 1, 3, 2, 0, 0),
    ],
)
def test_same_padding_is_tensorflows(size, kernel_size, stride, positions, before, after):
    grid = LocallyConnected2d(1, 1, kernel_size, size, stride, "same").grid
    assert (grid.positions, grid.before, grid.after) == (
        (positions,) * 2,
        (before,) * 2,
        (after,) * 2,
    )


@each_size
def test_with_tied_weights_it_is_the_convolution(sizes, at_once):
    layer = build(sizes)
    of_conv = torch.randn(layer.out_channels, layer.in_channels, *layer.grid.kernel_size).double()
    bias = torch.randn(layer.out_channels).double()
    with torch.no_grad():
        layer.weight.copy_(of_conv.permute(0, 2, 3, 1).flatten(1))
        layer.bias.copy_(bias)
    twin = [images(layer), of_conv, bias]
    x, *_ = twin = [t.requires_grad_() for t in twin]
    (top, left), (bottom, right) = layer.grid.before, layer.grid.after
    padded = F.pad(x, (left, right, top, bottom))
    expected = F.conv2d(padded, of_conv, bias, layer.grid.stride)
    y = layer(x)
    close(y, expected)
    grad = torch.randn_like(expected)
    gi, gw, gb = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    gw = gw.sum(0).unflatten(1, (*layer.grid.kernel_size, -1)).permute(0, 3, 1, 2)
    for a, e in zip((gi, gw, gb.sum(0)), torch.autograd.grad(expected, twin, grad), strict=True):
        close(a, e)


@each_size
@pytest.mark.parametrize("layout", ["contiguous", "batch last", "channels last"])
def test_with_weights_of_its_own_it_is_unfold_and_einsum(sizes, layout, at_once):
    layer = build(sizes)
    x = images(layer)
    if layout == "batch last":
        x = x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    elif layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    tensors = x.requires_grad_(), layer.weight, layer.bias
    y, expected = layer(x), unfolded(layer, x)
    close(y, expected)
    grad = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(y, tensors, grad),
        torch.autograd.grad(expected, tensors, grad),
        strict=True,
    ):
        close(a, e)


@each_size
def test_the_transposed_layer_is_the_adjoint_and_passes_gradients_back(sizes, at_once):
    layer = build(sizes, bias=False)
    adjoint = LocallyConnectedTranspose2d(layer)
    assert adjoint.weight.shape == layer.weight.shape
    assert not torch.equal(adjoint.weight, layer.weight)
    x = images(layer).requires_grad_()
    y = layer(x)
    error = torch.randn_like(y).requires_grad_()
    assert torch.autograd.gradcheck(adjoint, (error,), fast_mode=True)
    parameters = adjoint.weight, adjoint.bias
    nn.init.normal_(adjoint.bias)

    def by_parameters(weight, bias):
        return torch.func.functional_call(adjoint, {"weight": weight, "bias": bias}, (error,))

    assert torch.autograd.gradcheck(by_parameters, parameters, fast_mode=True)
    with torch.no_grad():
        adjoint.weight.copy_(layer.weight)
        adjoint.bias.zero_()
    close(adjoint(error), torch.autograd.grad(y, x, error)[0])
    close((y * error).sum(), (x * adjoint(error)).sum())


@pytest.mark.parametrize("size", [8, 7])
def test_an_inverse_with_the_blocks_own_weights_is_the_adjoint(size):
    layer = build((2, 4, 3, size, 2, "same"))
    inverse = Inverse(layer, nn.Tanh(), generator=torch.Generator().manual_seed(0))
    x = images(layer).requires_grad_()
    y = layer(x)
    bound = (6 / (2 * 9 + 4 * 9 / 4)) ** 0.5
    assert 0.95 * bound < inverse.layer.weight.abs().max() <= bound
    assert not inverse.layer.bias.any()
    inverse.layer.load_state_dict({"weight": layer.weight, "bias": inverse.layer.bias})
    error = torch.randn_like(y)
    close(inverse(error, x), torch.autograd.grad(y, x, error)[0].tanh())
    # Where the block below ends in Flatten.
    close(inverse(error, x.flatten(1)), inverse(error, x).flatten(1))


def test_target_propagation_trains_locally_connected_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(
        LocallyConnected2d(1, 3, 3, 6, 2, "same"),
        nn.Tanh(),
        LocallyConnected2d(3, 4, 3, 3, 1, "same"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 12),
        nn.Tanh(),
        nn.Linear(12, 5),
    )
    learner = DifferenceTargetPropagation(model, noise=0.1)
    kinds = [type(inverse.layer) for inverse in learner.inverses]
    assert kinds == [LocallyConnectedTranspose2d, nn.Linear]
    x, y = torch.randn(4, 1, 6, 6), torch.arange(4)
    loss = F.cross_entropy(learner(x), y)
    learner.backward(loss, target=y)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in learner.parameters())


# How.


def test_a_chain_copies_no_activations_and_keeps_no_windows():
    layers = build((2, 3, 3, 8, 2, "same")), build((3, 4, 3, 4, 1, 0))
    x = images(layers[0]).requires_grad_()
    saved = []

    def save(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        hidden = layers[0](x).tanh()
        y = layers[1](hidden)
    in_memory = hidden.permute(2, 3, 1, 0)
    assert in_memory.is_contiguous()
    # Without padding, what the second layer keeps for its backward pass is its input itself.
    assert sum(t.data_ptr() == hidden.data_ptr() for t in saved) == 2  # tanh's, and the layer's
    assert max(t.numel() for t in saved if t.shape != layers[0].weight.shape) <= 9 * 9 * 2 * 3 * 4
    (gradient,) = torch.autograd.grad(y, hidden, torch.ones_like(y))
    assert gradient.permute(2, 3, 1, 0).is_contiguous()


@pytest.mark.parametrize("needs_input", [False, True])
def test_multiply_adds_are_the_weights_times_the_batch_for_each_of_the_products(needs_input):
    layer = build(SIZES[1])
    x = images(layer, 5).requires_grad_(needs_input)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        assert counter.get_total_flops() == 2 * 5 * layer.weight.numel()
        y.sum().backward()
    assert counter.get_total_flops() == (2 + needs_input) * 2 * 5 * layer.weight.numel()


def test_it_starts_as_glorot_says():
    layer = LocallyConnected2d(3, 64, 5, 32, 2, "same")
    assert layer.weight.shape == (16 * 16, 64, 75) and layer.bias.shape == (16 * 16, 64)
    bound = (6 / 475) ** 0.5
    assert 0.999 * bound < layer.weight.max() <= bound and not layer.bias.any()
    # Under the scale "xavier", feedback begins as large as the weight.
    converted = convert_feedback(layer, "fa", scale="xavier")
    assert converted.fans() == (75, 400, False)
    ratio = converted.feedback_weight.square().mean() / layer.weight.square().mean()
    assert abs(ratio - 1) < 0.02


def mnist():
    yield LocallyConnected2d(1, 32, 3, 28, 2, "same")
    yield LocallyConnected2d(32, 64, 3, 14, 2, "same")
    yield from (nn.Flatten(), nn.Linear(7 * 7 * 64, 1024), nn.Linear(1024, 10))


def cifar():
    yield LocallyConnected2d(3, 64, 5, 32, 2, "same")
    yield LocallyConnected2d(64, 128, 5, 16, 2, "same")
    yield LocallyConnected2d(128, 256, 3, 8, 1, "same")
    yield from (nn.Flatten(), nn.Linear(8 * 8 * 256, 1024), nn.Linear(1024, 10))


def imagenet():
    yield LocallyConnected2d(3, 48, 9, 224, 4, "same")
    yield LocallyConnected2d(48, 48, 3, 56, 2, "same")
    yield LocallyConnected2d(48, 96, 5, 28, 1, "same")
    yield LocallyConnected2d(96, 96, 3, 28, 2, "same")
    yield LocallyConnected2d(96, 192, 3, 14, 1, "same")
    yield LocallyConnected2d(192, 192, 3, 14, 2, "same")
    yield LocallyConnected2d(192, 384, 3, 7, 1, "same")
    yield from (nn.Flatten(), nn.Linear(7 * 7 * 384, 1000))


@pytest.mark.parametrize(
    "network, images, classes, weights",
    [
        (mnist, (1, 28, 28), 10, 4_181_120),
        (cifar, (3, 32, 32), 10, 49_997_824),
        (imagenet, (3, 224, 224), 1000, 259_510_272),
    ],
)
def test_published_networks_have_their_size_on_the_meta_device(network, images, classes, weights):
    with torch.device("meta"):
        model = nn.Sequential(*network())
        y = model(torch.empty(2, *images, requires_grad=True))
    assert y.shape == (2, classes)
    y.sum().backward()
    assert sum(p.numel() for n, p in model.named_parameters() if "weight" in n) == weights
    convert_feedback(model, "ss")
    assert {row.rule for row in feedback_report(model)} == {"sign_symmetry"}


# Feedback.


@each_rule
def test_feedback_changes_the_input_gradient_alone(rule):
    stock = nn.Sequential(build(SIZES[1]), nn.Tanh(), build((3, 4, 3, 4, 1, 0)))
    model = convert_feedback(copy.deepcopy(stock), rule)
    kind = LocallyConnected2d if rule == "bp" else AsymmetricLocallyConnected2d
    assert type(model[0]) is type(model[2]) is kind
    x = images(stock[0]).requires_grad_()
    y, expected = model(x), stock(x)
    assert_same(y, expected)
    grad = torch.randn_like(y)
    with backpropagation(model):
        assert_same(
            torch.autograd.grad(y, x, grad, retain_graph=True),
            torch.autograd.grad(expected, x, grad, retain_graph=True),
        )
    y.backward(grad)
    expected.backward(grad)
    assert_same(model[2].weight.grad, stock[2].weight.grad)
    through = copy.deepcopy(stock)
    for layer, other in ((model[i], through[i]) for i in (0, 2)):
        feedback = layer.weight if rule == "bp" else layer.current_feedback()
        other.load_state_dict({"weight": feedback, "bias": layer.bias})
    hidden = stock[:2](x).detach().requires_grad_()
    (error,) = torch.autograd.grad(through[2](hidden), hidden, grad)
    (error,) = torch.autograd.grad(stock[0](x).tanh(), stock[0].bias, error)
    assert_same(model[0].bias.grad, error)
    if rule == "kp":
        assert_same(model[2].feedback_weight.grad, model[2].weight.grad)


@pytest.mark.parametrize("rule", ["wm", "ia", FromInputs])
def test_feedback_that_learns_by_itself_moves_towards_the_weight(rule):
    layer = convert_feedback(nn.Sequential(build((2, 3, 3, 5, 2, "same"), bias=False)), rule)
    assert_same(layer[0].linear_map(images(layer[0]), layer[0].weight), layer(images(layer[0])))
    before = weight_alignment(layer)["0"].angle
    for _ in range(300):
        layer(torch.randn(32, 2, 5, 5).double()).sum().backward()
        advance_feedback(layer)
    assert weight_alignment(layer)["0"].angle < before - 10


def test_report_and_alignment_take_it():
    model = nn.Sequential(build(SIZES[0]), nn.Flatten(), nn.Linear(48, 3))
    assert [row.reason for row in feedback_report(model)] == ["not converted"] * 2
    convert_feedback(model, "ss")
    assert [row.name for row in feedback_report(model)] == ["0", "2"]
    assert weight_alignment(model)["0"].sign_agreement == 1
    assert 20 < weight_alignment(model)["0"].angle < 40
    convert_feedback(model, "bp")
    assert type(model[0]) is LocallyConnected2d


# Types and compilers.


@pytest.mark.parametrize("kind", [LocallyConnected2d, LocallyConnectedTranspose2d])
@pytest.mark.parametrize("rule", ["bp", "fa"])
def test_autocast_computes_in_its_type_and_learns_in_the_weights(kind, rule):
    layer = LocallyConnected2d(3, 4, 3, 8, 2, "same")
    shape = 2, 3, 8, 8
    if kind is LocallyConnectedTranspose2d:
        layer, shape = kind(layer), (2, 4, 4, 4)
    layer = convert_feedback(nn.Sequential(layer), rule)
    x = torch.randn(shape, requires_grad=True)
    expected = layer(x)
    tensors = x, *(p for n, p in layer.named_parameters())
    gradients = torch.autograd.grad(expected.square().sum(), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    for a, e in zip(torch.autograd.grad(y.square().sum(), tensors), gradients, strict=True):
        assert a.dtype == torch.float32
        assert (a - e).norm() < 0.05 * e.norm()


@pytest.mark.parametrize("rule", ["bp", "kp", "brsf"])
def test_compiled_it_is_the_same(rule):
    torch._dynamo.reset()
    model = convert_feedback(build((2, 3, 3, 5, 2, "same")), rule)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        x = images(model).requires_grad_()
        y = forward(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters())])
    assert_same(*results)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason="this torch does not tell a program that is recorded from one that is compiled",
)
@pytest.mark.parametrize("rule", ["bp", "ss"])
def test_a_recorded_program_is_torchs_alone(rule):
    model = convert_feedback(nn.Sequential(build((2, 3, 3, 5, 2, "same"))), rule).eval()
    x = images(model[0])
    program = torch.export.export(model, (x,), strict=False)
    assert_same(program.module()(x), model(x))
    assert {
        str(node.target).split(".")[0] for node in program.graph.nodes if "." in str(node.target)
    } == {"aten"}


# What is refused.


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((1, 1, 3, 8, 1, "valid"), "padding is 'valid'; it must be 'same' or numbers"),
        ((1, 1, 9, 8, 1, 0), r"no window of \(9, 9\) fits"),
        ((1, 1, 3, 8, 1, -1), "no window"),
        ((1, 1, 3, 8, 0, "same"), r"stride \(0, 0\); none is below 1"),
    ],
)
def test_what_has_no_windows_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        LocallyConnected2d(*sizes)


def test_inputs_of_another_size_are_refused():
    layer = LocallyConnected2d(3, 4, 3, 8)
    message = (
        r"LocallyConnected2d takes inputs of shape \(N, 3, 8, 8\); this one's is \(2, 3, 9, 8\)"
    )
    with pytest.raises(ValueError, match=message):
        layer(torch.ones(2, 3, 9, 8))
    with pytest.raises(ValueError, match=r"takes inputs of shape \(N, 4, 6, 6\)"):
        LocallyConnectedTranspose2d(layer)(torch.ones(4, 6, 6))


@pytest.mark.parametrize("rule", ["bp", "ss"])
def test_a_second_derivative_is_refused(rule):
    layer = convert_feedback(build(SIZES[0]), rule)
    x = images(layer).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
