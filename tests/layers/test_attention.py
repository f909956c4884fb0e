"""nn.MultiheadAttention's asymmetric form against torch's own attention."""

import copy
import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from core_utils import assert_same, each_feedback_rule
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ss_detectron import (
    AsymmetricMultiheadAttention,
    advance_feedback,
    backpropagation,
    backpropagation_gradients,
    convert_feedback,
    feedback_report,
    gradient_angles,
    weight_alignment,
)
from ss_detectron.solver import match_feedback_groups


class _Through(torch.autograd.Function):
    """x W^T + b; in the backward pass W is B."""

    @staticmethod
    def forward(ctx, x, weight, bias, feedback):
        ctx.save_for_backward(x, feedback)
        return torch._C._nn.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, feedback = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad @ feedback, rows.t() @ x.flatten(0, -2), grad_bias, None


def _stock_through(monkeypatch, feedback: dict[Tensor, Tensor]) -> None:
    """Have torch's own attention send its error back through B: weight -> B."""

    def linear(x, weight, bias=None):
        for whole, through in feedback.items():
            if whole.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
                part = through.as_strided(weight.shape, weight.stride(), weight.storage_offset())
                return _Through.apply(x, weight, bias, part)
        raise AssertionError("a weight that nobody knows")

    monkeypatch.setattr(F, "linear", linear)


class Case(NamedTuple):
    options: dict[str, Any]
    same: str
    """Which of query, key and value are one tensor."""
    batched: bool
    call: dict[str, Any]
    training: bool
    masks: str
    rule: str
    seed: int

    def build(self) -> nn.MultiheadAttention:
        torch.manual_seed(self.seed)
        layer = nn.MultiheadAttention(4, 2, **self.options).double().train(self.training)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        return layer

    def run(self, layer: nn.MultiheadAttention) -> dict[str, Tensor]:
        """Outputs, and gradients of all inputs and parameters."""
        torch.manual_seed(self.seed + 1)
        length, source, batch = 3, 3 if self.same == "qkv" or self.call["is_causal"] else 5, 2
        sizes = [(length, 4), (source, layer.kdim), (source, layer.vdim)]
        if self.batched:
            sizes = [(batch, n, e) if layer.batch_first else (n, batch, e) for n, e in sizes]
        query, key, value = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in sizes)
        if self.same in ("qkv", "kv") and value.shape == key.shape:
            value = key
        if self.same in ("qkv", "qk") and query.shape == key.shape:
            query = key
        call, heads = dict(self.call), 2 * (batch if self.batched else 1)
        if self.call["is_causal"]:
            call["attn_mask"] = torch.ones(length, source).triu(1).bool()
        elif "float" in self.masks:
            call["attn_mask"] = torch.randn(heads, length, source, dtype=torch.float64)
        elif "bool" in self.masks:
            call["attn_mask"] = torch.rand(length, source) < 0.3
            call["attn_mask"][:, 0] = False
        if "padding" in self.masks:
            call["key_padding_mask"] = torch.zeros((batch, source)[not self.batched :]).bool()
            call["key_padding_mask"][..., -1] = True
            if call.get("attn_mask", query).dtype != torch.bool:
                call["key_padding_mask"] = call["key_padding_mask"].double() * -3
        y, weights = layer(query, key, value, **call)
        loss = (y * torch.randn_like(y)).sum()
        found = {"y": y.detach()}
        if weights is not None:
            found["weights"] = weights.detach()
            loss = loss + (weights * torch.randn_like(weights)).sum()
        inputs = {"query": query, "key": key, "value": value}
        wanted = {**inputs, **dict(layer.named_parameters())}
        # A value that is the key has the key's gradient; with one key alone, none has any.
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return found | dict(zip(wanted, grads, strict=True))


_cases = st.builds(
    Case,
    st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "batch_first": st.booleans(),
            "add_bias_kv": st.booleans(),
            "add_zero_attn": st.booleans(),
            "dropout": st.sampled_from([0.0, 0.5]),
        },
        optional={"kdim": st.sampled_from([3, 4]), "vdim": st.sampled_from([2, 4])},
    ),
    st.sampled_from(["qkv", "qk", "kv", ""]),
    st.booleans(),
    st.fixed_dictionaries(
        {
            "need_weights": st.booleans(),
            "average_attn_weights": st.booleans(),
            "is_causal": st.sampled_from([False, False, True]),
        }
    ),
    st.booleans(),
    st.sampled_from(["", "bool", "float", "padding", "bool padding", "float padding"]),
    st.sampled_from(["ss", "brsf", "fa", "kp"]),
    st.integers(0, 9),
)


@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],  # to explain failures would trace every line
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=_cases)
def test_forward_is_stock_and_the_error_flows_through_feedback(case):
    stock = case.build()
    layer = convert_feedback(copy.deepcopy(stock), case.rule)
    plain, actual = case.run(stock), case.run(layer)
    feedback = {stock.out_proj.weight: layer.out_proj.current_feedback()}
    names = layer.weight_names(layer)
    widths = [stock.get_parameter(name).shape[1] for name in names]
    for name, part in zip(names, layer.current_feedback().split(widths, 1), strict=True):
        feedback[stock.get_parameter(name)] = part.contiguous()
    with pytest.MonkeyPatch.context() as monkeypatch:
        _stock_through(monkeypatch, feedback)
        expected = case.run(stock)
    learned = {key: actual.pop(key) for key in list(actual) if "feedback" in key}
    for name in {"y", "weights"} & plain.keys():
        assert torch.equal(actual[name], plain[name])
    torch.testing.assert_close(actual, expected)
    with backpropagation(layer):
        through_weights = case.run(layer)
    torch.testing.assert_close({name: through_weights[name] for name in plain}, plain)
    assert len(learned) == 2 * (case.rule == "kp")
    if learned:
        of_weight = torch.cat([actual[name] for name in names], 1)
        assert_same(learned["feedback_weight"], of_weight)
        assert_same(learned["out_proj.feedback_weight"], actual["out_proj.weight"])


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_gradient_it_is_the_stock_module(bias):
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True).eval()  # torch's fast path
    layer = convert_feedback(copy.deepcopy(stock), "kp")
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert_same(layer(x, x, x), stock(x, x, x))
    for module in (stock, layer):
        module.requires_grad_(False)
    layer.feedback_weight.requires_grad_()
    assert_same(layer(x, x, x), stock(x, x, x))


def test_what_stock_refuses():
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(4, 2)
    layer = convert_feedback(copy.deepcopy(stock))
    x, y = torch.randn(3, 2, 4), torch.randn(5, 2, 4)
    for arguments, options in [
        ((x, y, x), {}),
        ((x, y, y), {"attn_mask": torch.zeros(1, 5)}),
        ((x, y, y), {"attn_mask": torch.zeros(3, 3, 5)}),
        ((x, y, y), {"key_padding_mask": torch.zeros(2, 3)}),
        ((x, y, y), {"is_causal": True}),
        ((x, y[:, 0], y), {}),
        ((x[..., :3],) * 3, {}),
    ]:
        errors = []
        for module in (stock, layer):
            with pytest.raises((AssertionError, RuntimeError)) as caught:
                module(*arguments, **options)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("sizes", [{}, {"kdim": 4, "vdim": 6}])
@each_feedback_rule
def test_state_keys_and_the_way_back(rule, sizes):
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(8, 2, **sizes)
    layer = convert_feedback(copy.deepcopy(stock), rule, scale="kaiming")
    assert [(row.name, row.reason) for row in feedback_report(layer)] == [
        ("", ""),
        ("out_proj", ""),
    ]
    state = layer.state_dict()
    assert [key for key in state if "feedback" not in key] == list(stock.state_dict())
    built = AsymmetricMultiheadAttention(8, 2, **sizes, rule=rule, scale="kaiming")
    built.load_state_dict(stock.state_dict())
    assert_same(built.state_dict(), state)
    assert_same(built.current_feedback(), layer.current_feedback())
    assert weight_alignment(layer).keys() == {"", "out_proj"}
    groups = match_feedback_groups([{"params": list(layer.parameters())}], layer)
    assert len(groups[0]["params"]) == len(list(layer.parameters()))
    convert_feedback(layer, "bp")
    assert [type(m) for m in layer.modules()] == [type(m) for m in stock.modules()]
    assert_same(layer.state_dict(), stock.state_dict())


def test_a_rule_for_the_output_projection_alone():
    layer = convert_feedback(
        nn.TransformerEncoderLayer(8, 2), "fa", overrides={"self_attn.out_proj": "bp"}
    )
    rules = {row.name: row.rule for row in feedback_report(layer)}
    assert rules.pop("self_attn.out_proj") == "backpropagation"
    assert set(rules.values()) == {"feedback_alignment"}


def _train(model, step, shape, steps=3):
    """Every gradient after each of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = []
    for i in range(steps):
        torch.manual_seed(i)
        optimizer.zero_grad()
        x = torch.randn(shape, requires_grad=True)
        step(x).square().mean().backward()
        seen += [x.grad, *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        advance_feedback(model)
    return seen


def _transformer(rule):
    torch.manual_seed(0)
    return convert_feedback(nn.Transformer(8, 2, 1, 1, 16, dropout=0.2, batch_first=True), rule)


@each_feedback_rule
def test_a_transformer_trains_by_the_rule(rule):
    model, recomputed, stock = (_transformer(r) for r in (rule, rule, "bp"))
    x = torch.randn(2, 5, 8)
    torch.manual_seed(1)
    loss = model(x, x).square().mean()
    torch.manual_seed(1)
    assert torch.equal(loss, stock(x, x).square().mean())
    reference = backpropagation_gradients(model, loss)
    loss.backward()
    angles = gradient_angles(model, reference).per_layer
    for layer in ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn.out_proj"):
        assert angles[layer] > 1
    expected = _train(model, lambda x: model(x, x), (2, 5, 8))
    recompute = functools.partial(checkpoint, recomputed, use_reentrant=False)
    assert_same(_train(recomputed, lambda x: recompute(x, x), (2, 5, 8)), expected)


class _Attention(nn.Module):
    """To itself, to the same keys and values, and to different ones."""

    def __init__(self):
        super().__init__()
        self.to_itself = nn.MultiheadAttention(8, 2, batch_first=True)
        self.to_others = nn.MultiheadAttention(8, 2, kdim=4, vdim=8, add_bias_kv=True)

    def forward(self, x):
        x = x + self.to_itself(x, x, x, need_weights=False)[0]
        y = x + self.to_itself(x, x.relu(), x)[0]
        return self.to_others(y, y[..., :4], x)[0]


@pytest.mark.parametrize("rule", ["ss", pytest.param("kp", marks=pytest.mark.slow)])
def test_compiled_attention_is_eager_attention(rule):
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager = convert_feedback(_Attention(), rule)
    compiled = copy.deepcopy(eager)
    expected = _train(eager, eager, (2, 3, 8), steps=2)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_train(compiled, step, (2, 3, 8), steps=2), expected)


def test_autocast_as_stock():
    torch.manual_seed(0)
    stock = _Attention()
    layer = convert_feedback(copy.deepcopy(stock))
    x = torch.randn(2, 3, 8)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y, expected = layer(x), stock(x)
        assert y.dtype == dtype and torch.equal(y, expected)
        with backpropagation(layer):
            gradients = torch.autograd.grad(y.sum(), list(layer.parameters()))
        expected = torch.autograd.grad(expected.sum(), list(stock.parameters()))
        torch.testing.assert_close(gradients, expected, rtol=0.05, atol=0.05)


def test_recorded_attention_is_stock():
    stock = _Attention().eval()
    layer, x = convert_feedback(copy.deepcopy(stock), "ss"), torch.randn(2, 3, 8)

    def recorded(model):
        exported = torch.export.export(model, (x,), strict=False)
        assert torch.equal(exported.module()(x), stock(x))
        return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]

    operations = recorded(layer), recorded(stock)
    if hasattr(torch.compiler, "is_exporting"):
        assert operations[0] == operations[1]
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), stock(x))
