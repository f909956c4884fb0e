"""Layers whose parent uses their weight without calling them: told after one forward pass."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ss_detectron import weight_alignment
from ss_detectron.layers import convert_feedback, feedback_report


class Parent(nn.Module):
    """Calls one of its layers, and does with the other what it is told."""

    def __init__(self, use=None):
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4, bias=False)
        self.attention = nn.MultiheadAttention(4, 1)
        self.cross = nn.MultiheadAttention(4, 1, kdim=2, vdim=2)
        self.use = use

    def forward(self, x):
        return self.use(self, self.called(x).relu())


class Net(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Parent(use), Parent(use)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def _model(use, rule="fa"):
    torch.manual_seed(0)
    return convert_feedback(Net(use), rule)


def _pass(model):
    x = torch.ones(2, 4)
    model(x).sum().backward()


def _bypassed(model):
    return [row.name for row in feedback_report(model) if "bypassed" in row.reason]


def _hooks(model):
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    ]


def _standardised(weight):
    return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


def linear(m, x):
    return F.linear(x, m.other.weight)


BYPASSES = {
    "linear": linear,
    "keyword": lambda m, x: F.linear(input=x, weight=m.other.weight),
    "matmul": lambda m, x: x @ m.other.weight.t(),
    "mm": lambda m, x: x.mm(m.other.weight.T),
    "addmm": lambda m, x: torch.addmm(x, x, m.other.weight),
    "einsum": lambda m, x: torch.einsum("ni,oi->no", x, m.other.weight),
    "bmm": lambda m, x: torch.bmm(x[None], m.other.weight[None])[0],
    "convolution": lambda m, x: F.conv1d(x[..., None], m.other.weight[..., None])[..., 0],
    "a part": lambda m, x: F.linear(x, m.other.weight[:2]).repeat(1, 2),
    "put together": lambda m, x: F.linear(x, torch.cat((m.other.weight, m.other.weight)))[:, :4],
    "standardised": lambda m, x: F.linear(x, _standardised(m.other.weight)),
    "pruned": lambda m, x: F.linear(x, m.other.weight * torch.ones(4, 4)),
    "cast": lambda m, x: F.linear(x.double(), m.other.weight.double()).float(),
    "detached": lambda m, x: F.linear(x, m.other.weight.detach()),
    "attention": lambda m, x: F.multi_head_attention_forward(
        *(x, x, x, 4, 1, torch.cat([m.other.weight] * 3), None, None, None, False, 0.0),
        *(torch.eye(4), None),
    )[0],
}


@pytest.mark.parametrize("use", BYPASSES.values(), ids=list(BYPASSES))
def test_a_bypassed_layer_is_reported_and_warned_of_once(use, caplog):
    model = _model(use)
    assert not _bypassed(model)
    _pass(model)
    assert _bypassed(model) == ["blocks.0.other", "blocks.1.other"]
    (message,) = caplog.messages
    assert message.startswith("2 converted layers learn by backpropagation")
    assert message.endswith(": blocks.*.other (2)")
    assert not _hooks(model)
    _pass(model)
    assert len(caplog.messages) == 1
    rows = {row.name: row for row in feedback_report(model)}
    assert rows["blocks.0.other"].rule == "backpropagation"
    assert rows["blocks.0.other"].reason.startswith("bypassed by its parent Parent;")
    assert rows["blocks.0.called"].rule == rows["stem"].rule == "feedback_alignment"


@pytest.mark.parametrize("use", [linear, BYPASSES["matmul"]])
def test_what_is_reported_is_true(use):
    """The rule of a bypassed layer changes no gradient; that of one that is called does."""

    def gradient(*layers):
        model = _model(use, "bp")
        for layer in layers:
            convert_feedback(model.get_submodule(layer), "fa")
        _pass(model)
        return model.stem.weight.grad

    assert torch.equal(gradient("blocks.0.other", "blocks.1.other"), gradient())
    model = _model(use)
    _pass(model)
    assert weight_alignment(model)["blocks.0.other"] == (pytest.approx(0, abs=1e-5), 1, 1)
    assert not torch.allclose(gradient("blocks.0.called"), gradient())


def _penalty(m, x):
    w = m.other.weight
    return x + w.square().sum() + w.norm() + (w @ w.t() - torch.eye(4)).square().sum()


QUIET = {
    "called": lambda m, x: m.other(x),
    "forward itself": lambda m, x: m.other.forward(x),
    "a penalty on what is not called": _penalty,
    "a penalty besides": lambda m, x: _penalty(m, m.other(x)),
    "tied, and called": lambda m, x: F.linear(m.other(x), m.other.weight.t()),
    "a table": lambda m, x: F.embedding(torch.tensor([0, 1]), m.other.weight) + x,
    "indexed": lambda m, x: m.other.weight[torch.tensor([0, 1])] + x,
    "attributes": lambda m, x: m.other(x).to(m.other.weight.device, m.other.weight.dtype),
    "not used": lambda m, x: x,
    "attention": lambda m, x: m.attention(x, x, x)[0],
    "attention of several sizes": lambda m, x: m.cross(x, x[:, :2], x[:, :2])[0],
    "without gradients": lambda m, x: x + torch.no_grad()(linear)(m, x),
}


@pytest.mark.parametrize("use", QUIET.values(), ids=list(QUIET))
def test_nothing_else_sets_it_off(use, caplog):
    model = _model(use)
    _pass(model)
    assert not _bypassed(model) and not caplog.messages and not _hooks(model)


def test_what_an_embedding_looks_up_hides_nothing():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 4)
            self.block = Parent(linear)
            self.score = nn.Linear(4, 3, bias=False)
            self.score.weight = self.table.weight

        def forward(self, index):
            return self.score(self.block(self.table(index)))

    model = convert_feedback(Tied())
    model(torch.arange(3)).sum().backward()
    assert _bypassed(model) == ["block.other"]


# When and where.


def test_a_pass_without_gradients_is_waited_out():
    model = _model(linear)
    with torch.no_grad():
        _pass_without = model(torch.ones(2, 4))
    assert not _bypassed(model) and _hooks(model) and not _pass_without.requires_grad
    _pass(model)
    assert len(_bypassed(model)) == 2


def test_a_frozen_part_is_not_accused():
    model = _model(linear)
    model.stem.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    model.blocks[0].use = QUIET["attention"]
    _pass(model)
    assert _bypassed(model) == ["blocks.1.other"]


def test_torch_fx_records_nothing_of_the_watch():
    model = _model(lambda m, x: F.linear(x, m.other.weight), "ss")
    stock = torch.fx.symbolic_trace(convert_feedback(copy.deepcopy(model), "bp"))
    graph = torch.fx.symbolic_trace(model).graph
    assert [node.target for node in graph.nodes] == [node.target for node in stock.graph.nodes]
    _pass(model)
    assert len(_bypassed(model)) == 2


def test_a_part_that_is_called_by_itself_is_watched(caplog):
    model = _model(linear)
    model.blocks[1](torch.ones(2, 4)).sum().backward()
    assert _bypassed(model) == ["blocks.1.other"]
    assert caplog.messages[0].endswith(": blocks.1.other")
    _pass(model)
    assert _bypassed(model) == ["blocks.0.other", "blocks.1.other"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations(reentrant):
    model = _model(linear)
    x = torch.ones(2, 4, requires_grad=True)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    x.sum().backward()
    assert len(_bypassed(model)) == 2 and not _hooks(model.blocks)


def test_a_pass_that_fails_leaves_nothing_behind():
    def fail(m, x):
        raise KeyError("mine")

    model = _model(fail)
    with pytest.raises(KeyError, match="mine"):
        _pass(model)
    assert not torch.overrides._get_current_function_mode_stack()
    for block in model.blocks:
        block.use = linear
    _pass(model)
    assert len(_bypassed(model)) == 2


def test_an_interrupted_pass_is_begun_anew():
    def interrupt(m, x):
        raise KeyboardInterrupt

    model = _model(interrupt)
    with pytest.raises(KeyboardInterrupt):
        _pass(model)
    for block in model.blocks:
        block.use = linear
    _pass(model)
    assert len(_bypassed(model)) == 2
    assert not torch.overrides._get_current_function_mode_stack()


def test_copies_and_pickles_are_watched_too():
    model = _model(linear)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _pass(other)
        assert len(_bypassed(other)) == 2 and not _hooks(other)
    assert not _bypassed(model)
    _pass(model)
    assert _bypassed(copy.deepcopy(model)) == ["blocks.0.other", "blocks.1.other"]


def test_a_new_conversion_looks_again():
    model = _model(linear)
    _pass(model)
    convert_feedback(model, "ss")
    assert not _bypassed(model)
    for block in model.blocks:
        block.use = QUIET["called"]
    _pass(model)
    assert not _bypassed(model)
    convert_feedback(model, "fa")
    convert_feedback(model, "bp")
    assert not _hooks(model) and not any("feedback_watch" in m.__dict__ for m in model.modules())


def test_weights_are_known_by_what_they_are_at_the_time():
    model = _model(linear)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, weights, torch.ones(2, 4)).sum().backward()
    assert len(_bypassed(model)) == 2


def test_autocast():
    model = _model(linear)
    with torch.autocast("cpu", torch.bfloat16):
        _pass(model)
    assert len(_bypassed(model)) == 2


def test_torchs_own_transformer_is_not_accused(caplog):
    layer = convert_feedback(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    with torch.no_grad():
        layer.eval()(torch.ones(1, 3, 4))  # the fast path takes weights alone
    layer.train()(torch.ones(1, 3, 4)).sum().backward()
    assert not _bypassed(layer) and not caplog.messages


@pytest.fixture
def group():
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(group):
    model = _model(linear, "ss")
    _pass(DistributedDataParallel(model))
    assert len(_bypassed(model)) == 2


def test_fsdp2(group):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("needs FSDP2")
    model = _model(linear, "ss")
    mesh = dist.init_device_mesh("cpu", (1,))
    for part in (*model.blocks, model):
        fsdp.fully_shard(part, mesh=mesh)
    _pass(model)
    assert len(_bypassed(model)) == 2


# Compiled.


def test_a_compiled_model_is_not_watched_and_is_compiled_once():
    torch._dynamo.reset()
    model = _model(linear, "ss")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        _pass(compiled)
        _pass(compiled)
    assert not _bypassed(model)


@pytest.mark.parametrize("wrap", [True, False])
def test_a_part_that_is_compiled_is_compiled_once(wrap):
    torch._dynamo.reset()
    model = _model(linear, "ss")
    options = {"fullgraph": True, "backend": "aot_eager"}
    if wrap:
        model.blocks[1] = torch.compile(model.blocks[1], **options)
    else:
        model.blocks[1].compile(**options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        _pass(model)
        _pass(model)
