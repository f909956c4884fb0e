"""Two processes that hold a half of every parameter each (FSDP2), against one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from core_utils import RULES, assert_same
from torch import nn

from ss_detectron import backpropagation_gradients, weight_alignment
from ss_detectron.layers import (
    advance_feedback,
    backpropagation,
    convert_feedback,
    feedback_report,
    mirror_feedback,
    reset_feedback,
)
from ss_detectron.layers.sharded import gather

STEPS, BATCH = 2, 4
HALVES = slice(0, 2), slice(2, 4)


def _images():
    return torch.randn(STEPS, BATCH, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def _stock(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.Flatten(2),
        nn.Linear(64, 8),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        nn.Flatten(),
    )


def _model(rule):
    return convert_feedback(_stock(), rule)


def _sharded(model, dtype=torch.float32, **options):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options["mesh"] = dist.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model[4], model[5]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def _whole(tensors):
    return {n: gather(t).detach().clone() for n, t in tensors if t is not None}


def _train(model, backward):
    """Gradients of each step, and the state dict in the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-3)
    record = []
    for batch in _images():
        optimizer.zero_grad()
        backward(model, batch)
        record.append(_whole((n, p.grad) for n, p in model.named_parameters()))
        optimizer.step()
        advance_feedback(model)
    return [*record, _whole(model.state_dict().items())]


def _loss(output):
    return output.float().square().sum(1).mean()


def _on_both(model, batch):
    _loss(model(batch[HALVES[dist.get_rank()]])).backward()


def _on_one(dtype):
    """What the two compute, by one process: each half in ``dtype``, the sums in float32."""

    def backward(model, batch):
        for half in HALVES:
            tensors = {n: p.to(dtype) for n, p in model.named_parameters()}
            output = torch.func.functional_call(model, tensors, (batch[half].to(dtype),))
            (_loss(output) / 2).backward()

    return backward


def _learns_as_one_process(rule, reshard=True):
    for dtype in (torch.float32, torch.bfloat16):
        one = _train(_model(rule), _on_one(dtype))
        two = _train(_sharded(_model(rule), dtype, reshard_after_forward=reshard), _on_both)
        # The order of sums differs.
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
        reshard = not reshard


def _learns_the_other_way_round(rule):
    _learns_as_one_process(rule, reshard=False)


def _may_be_reset_bypassed_and_measured(rule):
    one = _model(rule)
    two = _sharded(copy.deepcopy(one))
    with torch.no_grad():
        two(_images()[0])  # leaves the root's parameters gathered
        for model in (one, two):
            for parameter in model.parameters():
                parameter.mul_(-3)
    for renew in (mirror_feedback, reset_feedback):
        assert renew(one) == renew(two)
        assert_same(_whole(two.state_dict().items()), _whole(one.state_dict().items()))
        with torch.no_grad():
            two(_images()[0])
    torch.testing.assert_close(weight_alignment(two), weight_alignment(one))
    with backpropagation(one), backpropagation(two):
        _on_both(two, _images()[0])
        _on_one(torch.float32)(one, _images()[0])
    gradients = [_whole((n, p.grad) for n, p in model.named_parameters()) for model in (two, one)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="of a sharded model"):
        backpropagation_gradients(two, _loss(two(_images()[0])))


def _is_not_converted(rule):
    model = _sharded(_model(rule))
    before = feedback_report(model), list(model.state_dict()), list(map(type, model.modules()))
    for part, other in ((model, "ss"), (model, "kp"), (model, "bp"), (model[0], "fa")):
        with pytest.raises(ValueError, match="convert it before fully_shard"):
            convert_feedback(part, other)
    after = feedback_report(model), list(model.state_dict()), list(map(type, model.modules()))
    assert after == before


def _loads_checkpoints(rule):
    """A stock one and its own, by torch's way for sharded models."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True, strict=False)
    one = _model(rule)
    for meta in (False, True):
        with torch.device("meta" if meta else "cpu"):
            two = _sharded(convert_feedback(_stock(1), rule))
        if meta:
            two.to_empty(device="cpu")
        dcp.set_model_state_dict(two, _stock().state_dict(), options=options)
        reset_feedback(two)  # torch completes the state dict by the model's own feedback
        assert_same(_whole(two.state_dict().items()), _whole(one.state_dict().items()))
    advance_feedback(one)
    dcp.set_model_state_dict(two, one.state_dict(), options=options)
    saved = dcp.get_model_state_dict(two, options=dcp.StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        assert_same(saved, dict(one.state_dict()))


def _worker(rank, folder, checks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for rule in RULES:
        for check in checks:
            check(rule)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "checks",
    [
        pytest.param([_learns_as_one_process, _is_not_converted], id="learning"),
        pytest.param(
            [
                _learns_the_other_way_round,
                _may_be_reset_bypassed_and_measured,
                _loads_checkpoints,
            ],
            id="changes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fully_sharded_model_is_one_process_s(tmp_path, checks):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not (dist.is_gloo_available() and hasattr(fsdp, "fully_shard")):
        pytest.skip("needs gloo, and a torch whose FSDP2 works on the CPU")
    mp.spawn(_worker, (str(tmp_path), checks), nprocs=2)
