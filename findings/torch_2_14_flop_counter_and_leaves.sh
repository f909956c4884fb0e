#!/usr/bin/env bash
# torch 2.14.1: under FlopCounterMode, torch.autograd.grad with respect to a leaf that a module was given raises a
# RuntimeError about a function that the caller never named; without the counter the same line works. A view of the leaf in
# its place is counted (4 x 3 weights, 2 samples: 48 operations forward, 48 for the gradient of the input), and so is
# .backward() with the leaf itself. One would have guessed that a counter changes nothing about what can be computed: it
# hooks into the inputs of modules, and its hook does not work for leaves within autograd.grad.
#
# Output seen:
#   torch 2.14.1+cu130
#   not counted             gradient of shape (2, 4)
#   counted, a leaf         RuntimeError: A leaf node was passed to _will_engine_execute_node
#   counted, a view         96 operations
#   counted, .backward()    144 operations
#
# Needs Python 3.10 to 3.14 and some GB of space. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

warnings.filterwarnings("ignore")  # of NumPy, which is not needed
import torch
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)
layer = torch.nn.Linear(4, 3)
leaf = torch.randn(2, 4, requires_grad=True)


def gradient(x):
    return torch.autograd.grad(layer(x).sum(), x)[0]


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


print("not counted             gradient of shape", tuple(gradient(leaf).shape))
try:
    counted(lambda: gradient(leaf))
    refused = ""
except RuntimeError as error:
    refused = str(error).split(" but ")[0]
print("counted, a leaf         RuntimeError:", refused)
view = counted(lambda: gradient(leaf.view_as(leaf)))
print("counted, a view        ", view, "operations")
backward = counted(lambda: layer(leaf).sum().backward())
print("counted, .backward()   ", backward, "operations")
sys.exit(not ("_will_engine_execute_node" in refused and (view, backward) == (96, 144)))
PY
echo "as described"
