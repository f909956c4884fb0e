#!/usr/bin/env bash
# torch 2.14.1: torch.distributed.checkpoint.state_dict.set_model_state_dict with full_state_dict=True and strict=True loads a
# state dict that lacks entries of the model without an error, and reports that all keys matched: what the file lacks is filled
# in with what the model held before, random initial weights perhaps. Without full_state_dict the same call raises, and so
# did torch 2.4.1 with it. It is how weights are loaded into a model that fully_shard has sharded. One would have guessed that
# strict=True, the default, means what it means in load_state_dict.
#
# Output seen (the state dict has a.weight and a.bias, the model b.weight and b.bias as well):
#   torch 2.14.1+cu130
#   full_state_dict=False, strict=True: RuntimeError
#   full_state_dict=True, strict=True: <All keys matched successfully>
#
# Needs Python 3.10 to 3.13 and some GB of space. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1
FOLDER=$folder "$folder/venv/bin/python" -W ignore - <<'PY'
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

print("torch", torch.__version__)
dist.init_process_group("gloo", init_method=f"file://{os.environ['FOLDER']}/init", rank=0, world_size=1)


def load(full):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    incomplete = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("a")}
    options = StateDictOptions(full_state_dict=full, strict=True)
    try:
        return str(set_model_state_dict(model, incomplete, options=options))
    except RuntimeError as error:
        assert "b.weight" in str(error)
        return "RuntimeError"


seen = [load(False), load(True)]
for full, outcome in zip((False, True), seen):
    print(f"full_state_dict={full}, strict=True: {outcome}")
dist.destroy_process_group()
sys.exit(seen != ["RuntimeError", "<All keys matched successfully>"])
PY
echo "as described"
