"""A small model with a last layer, normalisation and a frozen layer."""

import torch
from torch import nn

from ss_detectron import convert_feedback


class Net(nn.Module):
    last_layers = ("score",)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.hidden = nn.Linear(4, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.score = nn.Linear(5, 2)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.score(self.frozen(self.hidden(x)).relu())


def make_model(rule="bp", **options) -> nn.Module:
    torch.manual_seed(0)
    return convert_feedback(Net(), rule, **options)
