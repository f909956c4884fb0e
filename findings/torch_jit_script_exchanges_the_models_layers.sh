#!/usr/bin/env bash
# torch 2.14.1 and 2.4.1: torch.jit.script(model) exchanges layers of the model that it is given. A layer that has
# __prepare_scriptable__ (torch's hook for layers that script cannot compile as they are: it returns a scriptable stand-in)
# is gone from the eager model afterwards: the stand-in is there in its place. The model goes on to compute, and learn,
# otherwise than before it was scripted, without a word. One would have guessed that scripting makes a new object and leaves
# its argument as it was, as it does with every model whose layers have no such method.
#
# Output seen:
#   torch 2.14.1+cu130
#   before: Doubling 2.0   after torch.jit.script: Identity 1.0
#
# Needs Python 3.10 to 3.13 and some GB of space. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from torch import nn

print("torch", torch.__version__)


class Doubling(nn.Module):
    """Twice its input; scripted, its input."""

    def forward(self, x):
        return 2 * x

    def __prepare_scriptable__(self):
        return nn.Identity()


model = nn.Sequential(Doubling())
x = torch.ones(1)
before = type(model[0]).__name__, model(x).item()
torch.jit.script(model)
after = type(model[0]).__name__, model(x).item()
print("before:", *before, "  after torch.jit.script:", *after)
sys.exit((before, after) != (("Doubling", 2.0), ("Identity", 1.0)))
PY
echo "as described"
