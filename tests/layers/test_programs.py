"""Converted models in torch's other tools: each works as on a stock model, or says what to do."""

import copy
import io

import pytest
import torch
from core_utils import FromInputs, assert_same, each_feedback_rule, each_rule, stock_net
from torch import nn
from torch.autograd import forward_ad

from ss_detectron.layers import (
    AsymmetricLinear,
    advance_feedback,
    asymmetric,
    convert_feedback,
)

REMEDY = r"convert_feedback\(.*model.*, 'backpropagation'\)"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def images():
    return torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def gradients(model):
    x = images().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    return x.grad, [p.grad for p in model.parameters()]


def _exported(model, x):
    return torch.export.export(model, (x,), strict=False).module()


def _vmapped(model, x):
    with torch.no_grad():
        return torch.func.vmap(model)(x.unsqueeze(1)).squeeze(1)


def _feature_extractor(model, x):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    return extraction.create_feature_extractor(model, {"4": "out"})(x)["out"]


def _saved_trace(model, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    return torch.jit.load(file)(x)


def _onnx(model, x, **how):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, verbose=False, **how)
    session = runtime.InferenceSession(file.getvalue())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


PROGRAMS = {
    "vmap": _vmapped,
    "export": lambda model, x: _exported(model, x)(x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x),
    "feature extractor": _feature_extractor,
    "jit.trace": _saved_trace,
    "onnx": lambda model, x: _onnx(model, x, dynamo=True),
    "onnx of a trace": lambda model, x: _onnx(model, x, dynamo=False),
}
PROGRAMS_AND_COST = [
    pytest.param(name, marks=pytest.mark.slow if "onnx" in name else ()) for name in PROGRAMS
]


@each_feedback_rule
@pytest.mark.parametrize("program", PROGRAMS_AND_COST)
def test_a_program_made_of_a_model_computes_the_same(program, rule):
    model = convert_feedback(stock_net(), rule).eval()
    made = PROGRAMS[program](model, images())
    torch.testing.assert_close(made, model(images()), rtol=1e-4, atol=1e-5)


def test_what_is_recorded_is_stock():
    model, stock = convert_feedback(stock_net(), "brsf"), stock_net()

    def recorded(model):
        exported = torch.export.export(model, (images(),), strict=False)
        return [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]

    assert recorded(model) == recorded(stock)
    flops = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    expected = flops(stock, images()).by_module()
    assert flops(model, images()).by_module() == expected and expected["4"] > 0


@each_rule
def test_a_model_traced_by_fx_learns_by_its_rule(rule):
    model = convert_feedback(stock_net(), rule)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert_same(gradients(traced), gradients(model))
    convert_feedback(traced, "bp")
    assert_same(gradients(traced), gradients(convert_feedback(model, "bp")))
    assert type(traced.get_submodule("4")) is nn.Linear
    assert traced.get_submodule("4").__module__ == nn.Linear.__module__


@each_rule
def test_functional_call_goes_by_the_rule_and_the_tensors_it_is_given(rule):
    model, other = convert_feedback(stock_net(), rule), convert_feedback(stock_net(1), rule)
    tensors = {n: t.detach().clone() for n, t in other.state_dict().items() if "updates" not in n}
    parameters = [tensors[n].requires_grad_() for n, _ in other.named_parameters()]
    x = images().requires_grad_()
    torch.func.functional_call(model, tensors, (x,)).square().sum().backward()
    assert_same((x.grad, [p.grad for p in parameters]), gradients(other))


@each_rule
def test_a_batch_of_gradients_is_each_of_them(rule):
    model = convert_feedback(stock_net(), rule)
    x = images().requires_grad_()
    y, wanted = model(x), [x, *model.parameters()]
    errors = torch.eye(y.numel()).view(-1, *y.shape)
    each = [torch.autograd.grad(y, wanted, error, retain_graph=True) for error in errors]
    batch = torch.autograd.grad(y, wanted, errors, is_grads_batched=True)
    torch.testing.assert_close(batch, tuple(torch.stack(g) for g in zip(*each, strict=True)))


def test_an_ensemble_of_models_is_evaluated():
    models = [convert_feedback(stock_net(seed), "frsf") for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)

    def one(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    with torch.no_grad():
        outputs = torch.func.vmap(one, in_dims=(0, 0, None))(parameters, buffers, images())
    torch.testing.assert_close(outputs, torch.stack([m(images()) for m in models]))


def _dual(model, x):
    with forward_ad.dual_level():
        model(forward_ad.make_dual(x, x))


def _quantised(model, x):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def _prepared(model, x):
    model.qconfig = torch.ao.quantization.default_qconfig
    torch.ao.quantization.prepare_qat(model.train())


REFUSED = {
    "func.grad": lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
    "func.vjp": torch.func.vjp,
    "func.jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "jacfwd without grad mode": torch.no_grad()(lambda model, x: torch.func.jacfwd(model)(x)),
    "vmap in grad mode": lambda model, x: torch.func.vmap(model)(x.unsqueeze(1)),
    "vmap of inputs that require a gradient": lambda model, x: torch.func.vmap(
        model.requires_grad_(False)
    )(x.clone().requires_grad_().unsqueeze(1)),
    "forward mode": _dual,
    "jit.script": lambda model, x: torch.jit.script(model),
    "quantize_dynamic": _quantised,
    "prepare_qat": _prepared,
}


@pytest.mark.parametrize("layer", ["linear", "all"])
@pytest.mark.parametrize("tool", REFUSED)
def test_a_tool_that_cannot_follow_feedback_names_the_remedy(tool, layer):
    model = convert_feedback(stock_net(), "ss", exclude="[02]" if layer == "linear" else ())
    with pytest.raises((RuntimeError, ValueError), match=REMEDY):
        REFUSED[tool](model, images())
    assert type(model[4]) is AsymmetricLinear
    REFUSED[tool](convert_feedback(copy.deepcopy(model), "backpropagation"), images())


def test_a_frozen_part_may_stand_within_torch_func():
    model = convert_feedback(stock_net(), "ss").requires_grad_(False)
    head = torch.ones(5)

    def loss(head, x):
        return (torch.func.vmap(model)(x.unsqueeze(1)) * head).sum()

    torch.testing.assert_close(torch.func.grad(loss)(head, images()), model(images()).sum(0))


def test_recording_in_training_mode_warns_that_the_program_learns_by_backpropagation(caplog):
    asymmetric._warn_of_recording.cache_clear()
    model = convert_feedback(stock_net(), "fa").eval()
    _exported(model, images())
    assert not [r for r in caplog.records if r.name.startswith("ss_detectron")]
    program = _exported(model.train(), images())
    torch.jit.trace(model, images())
    (record,) = (r for r in caplog.records if r.name.startswith("ss_detectron"))
    assert "learns by backpropagation" in record.getMessage()
    expected = gradients(convert_feedback(copy.deepcopy(model), "bp"))[0]
    torch.testing.assert_close(gradients(program)[0], expected)


def test_what_is_recorded_is_no_input_to_learn_from():
    model = convert_feedback(stock_net(), FromInputs)
    before = model[4].feedback_weight.clone()
    _exported(model, images())
    torch.jit.trace(model, images())
    advance_feedback(model)
    assert_same(model[4].feedback_weight, before)
