#!/usr/bin/env bash
# torch.nn.utils.clip_grad_norm_ and clip_grad_value_ differ where no parameter has a gradient: the first passes over it and
# returns a norm of 0, the second raises RuntimeError from an internal check that does not say what is wrong. One would have
# guessed that both pass over it. Who clips each parameter by itself, as Detectron2's optimisers do with
# SOLVER.CLIP_GRADIENTS.CLIP_TYPE "value" (its default), meets it in the first step in which one layer took no part.
#
# Output seen:
#   torch 2.14.1+cu130
#   clip_grad_norm_: tensor(0.)
#   clip_grad_value_: RuntimeError: Expected !nested_tensorlist[0].empty() to be true, but got false.
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
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

print("torch", torch.__version__)
unused = torch.nn.Parameter(torch.ones(3))
found = {}
for clip in (clip_grad_norm_, clip_grad_value_):
    try:
        found[clip] = str(clip(unused, 1.0))
    except RuntimeError as error:
        found[clip] = f"RuntimeError: {str(error).splitlines()[0].partition('  ')[0]}"
    print(f"{clip.__name__}: {found[clip]}")
sys.exit(not (found[clip_grad_norm_] == "tensor(0.)" and "RuntimeError" in found[clip_grad_value_]))
PY
echo "as described"
