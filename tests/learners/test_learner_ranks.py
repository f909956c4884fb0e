"""Learners in two processes, equal to one."""

import copy

import pytest

pytest.importorskip("detectron2")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from group_utils import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ss_detectron.learners import LEARNER_REGISTRY, Backpropagation, DirectFeedbackAlignment

CASES = [
    (kind, options)
    for _, kind in LEARNER_REGISTRY
    for options in (
        [{}]
        if kind in (Backpropagation, DirectFeedbackAlignment)
        else [{}, {"schedule": "alternating", "period": 2}]
    )
]


def _train(wrap, part):
    """Returns each case's state after a few steps of two passes on a part of every batch."""
    states = []
    for kind, options in CASES:
        torch.manual_seed(0)
        hidden = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()]
        learner = kind(nn.Sequential(*hidden, nn.Linear(4, 3)).double(), **options)
        wrapped = wrap(learner)
        optimizer = torch.optim.SGD(learner.parameter_groups(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            x = torch.randn(8, 5, generator=generator, dtype=torch.float64)[part]
            y = (torch.arange(8) % 3)[part]
            learner.backward(F.cross_entropy(wrapped(x), y), target=y)
            optimizer.step()
            learner.step()
        states.append(copy.deepcopy(learner.state_dict()))
    return states


def _work(rank, folder):
    states = _train(DistributedDataParallel, slice(rank, None, 2))
    if dist.get_rank() == 0:
        torch.save(states, f"{folder}/states.pth")


def test_two_processes_equal_one(tmp_path):
    run_ranks(_work, tmp_path)
    expected = _train(lambda learner: learner, slice(None))
    for got, want in zip(torch.load(tmp_path / "states.pth"), expected, strict=True):
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-10)
