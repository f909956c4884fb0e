"""The asymmetric layers as modules: stock forward, state, copies, checkpoints."""

import copy
import io
import logging
import pickle

import pytest
import torch
from core_utils import RULES, assert_same, each_rule, stock_net
from torch import nn
from torch.utils.checkpoint import checkpoint

from ss_detectron.layers import (
    AsymmetricConv2d,
    AsymmetricConvTranspose2d,
    AsymmetricLinear,
    advance_feedback,
    convert_feedback,
)

STATE = {
    "frsf": "feedback_magnitude",
    "brsf": "feedback_updates",
    "fa": "feedback_weight",
    "fasi": "feedback_weight",
    "kp": "feedback_weight",
    "wm": "feedback_weight",
    "ia": "feedback_weight",
}
COUNTING = ("brsf", "wm", "ia")
each_rule_with_state = pytest.mark.parametrize("rule", STATE)


def _images(seed=1, dtype=torch.float32):
    return torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _model(rule, seed=0, **options):
    return convert_feedback(stock_net(seed), rule, **options)


def _gradients(model, x=None):
    x = (_images() if x is None else x).clone().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def _train(model, steps=2):
    """What training leaves: the state after it, and gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        _gradients(model)
        optimizer.step()
        advance_feedback(model)
    return copy.deepcopy(model.state_dict()), _gradients(model)


# Forward.


@pytest.mark.parametrize("output_size", [None, [9, 10]])
def test_transposed_convolution_takes_an_output_size(output_size):
    torch.manual_seed(0)
    stock = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1)
    layer = convert_feedback(copy.deepcopy(stock), "ss")
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(layer(x, output_size), stock(x, output_size))


@pytest.mark.parametrize(
    "kind, stock, sizes",
    [
        (AsymmetricConv2d, nn.Conv2d, (3, 4, 3)),
        (AsymmetricConvTranspose2d, nn.ConvTranspose2d, (3, 4, 3)),
        (AsymmetricLinear, nn.Linear, (3, 4)),
    ],
)
def test_layers_built_directly_are_the_converted_ones(kind, stock, sizes):
    options = {"rule": "fa", "scale": "kaiming", "gain": 0.5, "seed": 3}
    layer = kind(*sizes, layer_name="0", **options)
    converted = convert_feedback(nn.Sequential(stock(*sizes)), **options)[0]
    assert type(layer) is type(converted)
    assert layer.stock_class is converted.stock_class is stock
    assert torch.equal(layer.feedback_weight, converted.feedback_weight)
    assert "rule=feedback_alignment" in repr(layer)


@each_rule
def test_hooks_keep_firing_after_conversion(rule):
    model, seen = stock_net(), []
    for layer in (model[0], model[2], model[4]):
        layer.register_forward_pre_hook(lambda *_: seen.append("pre"))
        layer.register_forward_hook(lambda *_: seen.append("forward"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    convert_feedback(model, rule)
    _gradients(model)
    assert seen == ["pre", "forward"] * 3 + ["backward"] * 3


@each_rule
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_activation_checkpointing_changes_no_gradient(rule, use_reentrant):
    results = []
    for forward in (
        lambda model, x: model(x),
        lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant),
    ):
        model = _model(rule)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            x = _images().requires_grad_()
            forward(model, x).square().sum().backward()
            optimizer.step()
            advance_feedback(model)
        results.append([x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert_same(*results)


@pytest.mark.parametrize("after", RULES)
@each_rule
def test_the_rule_and_the_state_at_backward_time_count(rule, after):
    layer = AsymmetricLinear(4, 3, rule=rule)
    x = torch.randn(2, 4, requires_grad=True)
    y = layer(x)
    convert_feedback(layer, after)
    through = layer.weight if after == "bp" else layer.current_feedback()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.ones(2, 3) @ through)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_rule
def test_models_of_another_type_train(rule, dtype):
    model = _model(rule).to(dtype)
    reference = _gradients(_model(rule).double(), _images(dtype=torch.float64))
    for actual, expected in zip(_gradients(model, _images(dtype=dtype)), reference, strict=True):
        assert actual.dtype == dtype
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 20 * torch.finfo(dtype).eps or dtype == torch.float64 and error < 1e-6
    assert all(b.dtype == dtype for n, b in model.named_buffers())


# State and checkpoints.


@each_rule
def test_state_dict_is_the_stock_one_and_what_begins_with_feedback(rule):
    keys = list(_model(rule).state_dict())
    assert [k for k in keys if "feedback" not in k] == list(stock_net().state_dict())
    layers = ("0", "2", "4")
    feedback = {f"{n}.{STATE[rule]}" for n in layers if rule in STATE}
    feedback |= {f"{n}.feedback_updates" for n in layers if rule in COUNTING}
    assert {k for k in keys if "feedback" in k} == feedback
    learned = [n for n, _ in _model(rule).named_parameters() if "feedback" in n]
    assert len(learned) == (3 if rule == "kp" else 0)


def _through_file(model, other):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def _assigned(model, other):
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other


@pytest.mark.parametrize(
    "copier",
    [
        _through_file,
        _assigned,
        lambda m, _: copy.deepcopy(m),
        lambda m, _: pickle.loads(pickle.dumps(m)),
    ],
    ids=["file", "assigned", "deepcopy", "pickle"],
)
@each_rule
def test_copies_and_checkpoints_go_on_as_the_original_and_share_nothing_with_it(
    rule, copier, caplog
):
    model = _model(rule, scale="rms")
    before, _ = _train(model)
    with caplog.at_level(logging.INFO, logger="ss_detectron"):
        other = copier(model, _model(rule, seed=5, scale="rms"))
    assert not caplog.records
    assert_same(other.state_dict(), model.state_dict())
    after = _train(other)
    assert_same(model.state_dict(), before)
    assert_same(_train(model), after)


@each_rule_with_state
def test_stock_checkpoint_derives_the_state_from_the_loaded_weight(rule, caplog):
    stock = stock_net(seed=7)
    expected = convert_feedback(copy.deepcopy(stock), rule)
    model = _model(rule)
    _train(model)
    with caplog.at_level(logging.INFO, logger="ss_detectron"):
        model.load_state_dict(stock.state_dict(), strict=True)
    if rule != "brsf":  # a count begins anew, nothing is derived
        assert [r.message.split(":")[0] for r in caplog.records] == ["0", "2", "4"]
        assert all(STATE[rule] in r.message for r in caplog.records)
    assert_same(model.state_dict(), expected.state_dict())
    assert_same(_train(model), _train(expected))


@pytest.mark.parametrize("rule", [rule for rule in STATE if rule != "brsf"])
def test_checkpoint_of_one_part_leaves_the_others_feedback(rule, caplog):
    model = _model(rule)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    part = {k: 2 * v for k, v in stock_net().state_dict().items() if k.startswith("2.")}
    with caplog.at_level(logging.INFO, logger="ss_detectron"):
        missing, unexpected = model.load_state_dict(part, strict=False)
    assert len(caplog.records) == 1 and not unexpected
    state = STATE[rule]
    assert f"0.{state}" in missing and f"2.{state}" not in missing
    after = model.state_dict()
    assert torch.equal(after[f"0.{state}"], before[f"0.{state}"])
    torch.testing.assert_close(after[f"2.{state}"], 2 * before[f"2.{state}"])


@pytest.mark.parametrize("assign", [True, False], ids=["assigned", "filled"])
@each_rule
def test_a_model_on_the_meta_device_converts_and_takes_a_checkpoint(rule, assign):
    with torch.device("meta"):
        model = convert_feedback(stock_net(), rule)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model(_images().to("meta")).shape == stock_net()(_images()).shape
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(stock_net().state_dict(), assign=assign)
    assert_same(model.state_dict(), _model(rule).state_dict())
    assert_same(_gradients(model), _gradients(_model(rule)))


@each_rule_with_state
def test_reset_feedback_derives_the_state_again_from_the_weight(rule):
    model = _model(rule)
    _train(model, steps=3)
    fresh = stock_net()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "feedback" not in k})
    convert_feedback(fresh, rule)
    for i in (0, 2, 4):
        model[i].reset_feedback()
        assert torch.equal(model[i].current_feedback(), fresh[i].current_feedback())
    assert_same(_train(model), _train(fresh))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_rule
def test_a_model_moved_to_the_gpu_agrees_with_the_cpu(rule):
    model = _model(rule).double()
    moved = copy.deepcopy(model).cuda()
    x = _images(dtype=torch.float64)
    for a, e in zip(_gradients(moved, x.cuda()), _gradients(model, x), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-9, atol=1e-9)
