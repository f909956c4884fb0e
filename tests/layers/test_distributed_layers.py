"""Two processes: the same feedback on each, and the gradients of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from core_utils import RULES, FromInputs, assert_same, stock_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ss_detectron.layers import AsymmetricLayer, advance_feedback, convert_feedback

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

KINDS = {**{rule: rule for rule in RULES}, "from_inputs": FromInputs}
each_rule = pytest.mark.parametrize("rule", KINDS)
STEPS = 3
BATCH = 4


class _Attend(nn.Module):
    """Of each place to the others."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x):
        y = x.flatten(2).transpose(1, 2)
        return x + self.attention(y, y, y)[0].transpose(1, 2).view_as(x)


def _net(seed=0):
    layers = list(stock_net(seed))
    return nn.Sequential(*layers[:3], _Attend(), *layers[3:]).double()


def _train(model, images):
    """Gradients and feedback after each step, by name, and the weights in the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-3)
    record = []
    for batch in images:
        optimizer.zero_grad()
        model(batch).square().sum(1).mean().backward()  # the mean over images
        inner = getattr(model, "module", model)
        gradients = {n: p.grad.clone() for n, p in inner.named_parameters()}
        feedback = {n: t.clone() for n, t in inner.state_dict().items() if "feedback" in n}
        record.append((gradients, feedback))
        optimizer.step()
        advance_feedback(model)
    record.append(({n: p.detach().clone() for n, p in inner.named_parameters()}, {}))
    return record


def _images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS, BATCH, 2, 4, 4, generator=generator, dtype=torch.float64)


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    half = BATCH // 2
    results = {}
    for rule, kind in KINDS.items():
        # A seed for each rank, as in Detectron2.
        model = convert_feedback(_net(seed=100 + rank), kind)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
            convert_feedback(wrapped)
        # Weights are rank 0's now, and so must be the scale and signs that come from them.
        for layer in model.modules():
            if isinstance(layer, AsymmetricLayer):
                layer.reset_feedback()
        start = copy.deepcopy(model.state_dict())
        torch.manual_seed(200 + rank)
        results[rule] = start, _train(wrapped, _images()[:, rank * half : (rank + 1) * half])
    # One of them takes in nothing.
    layer = convert_feedback(_net()[-1], FromInputs)
    if rank == 0:
        layer(torch.ones(2, layer.in_features, dtype=torch.float64))
    advance_feedback(layer)
    results["idle"] = layer.feedback_weight
    torch.save(results, f"{folder}/{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


@each_rule
def test_feedback_is_the_same_on_both_processes(ranks, rule):
    (start0, record0), (start1, record1) = (rank[rule] for rank in ranks)
    assert_same(start0, start1)
    assert_same(record0, record1)
    first, last = record0[0][1], record0[STEPS - 1][1]
    assert bool(first) == (rule not in ("bp", "ss"))
    assert any(not torch.equal(first[n], last[n]) for n in first) == (
        rule in ("brsf", "kp", "wm", "ia", "from_inputs")
    )


@each_rule
def test_two_processes_train_as_one(ranks, rule):
    start, two = ranks[0][rule]
    model = convert_feedback(_net(), KINDS[rule])
    model.load_state_dict(start)
    one = _train(model, _images())
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10)


def test_a_process_whose_layer_takes_in_nothing_learns_with_the_other(ranks):
    layer = convert_feedback(_net()[-1], FromInputs)
    before = layer.feedback_weight.clone()
    layer(torch.ones(2, layer.in_features, dtype=torch.float64))
    advance_feedback(layer)
    assert not torch.equal(layer.feedback_weight, before)
    assert_same([rank["idle"] for rank in ranks], [layer.feedback_weight] * 2)
