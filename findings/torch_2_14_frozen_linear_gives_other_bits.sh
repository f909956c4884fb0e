#!/usr/bin/env bash
# torch.nn.functional.linear of a batch that is transposed in memory, as nn.MultiheadAttention(batch_first=True) projects it, on
# an x86-64 CPU: whether the *weight* requires a gradient changes the output in its last bits, under torch.no_grad() too. (With
# a gradient torch folds the batch into one matrix product, without one it multiplies a batch of matrices.) One would have
# guessed that requires_grad, a note for the backward pass, leaves the forward pass alone: freezing a layer, or computing it
# inside an autograd Function from a part of a weight, does not reproduce its outputs. A contiguous input gives the same bits.
#
# Output seen:
#   torch 2.14.1+cu130
#   transposed: 20702 of 25216 outputs differ, by 1.1e-05 at most
#   contiguous: 0 of 25216 outputs differ, by 0.0e+00 at most
#
# Needs Python 3.11 to 3.14 and some GB of space. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
import torch.nn.functional as F

print("torch", torch.__version__)
torch.manual_seed(0)
transposed = torch.randn(2, 197, 64).transpose(0, 1)
weight = torch.randn(64, 64)
learning = weight.clone().requires_grad_()
differ = {}
for name, x in (("transposed", transposed), ("contiguous", transposed.contiguous())):
    with torch.no_grad():
        frozen, trained = F.linear(x, weight), F.linear(x, learning)
    differ[name] = int((frozen != trained).sum())
    most = (frozen - trained).abs().max()
    print(f"{name}: {differ[name]} of {frozen.numel()} outputs differ, by {most:.1e} at most")
sys.exit(not (differ["transposed"] and not differ["contiguous"]))
PY
echo "as described"
