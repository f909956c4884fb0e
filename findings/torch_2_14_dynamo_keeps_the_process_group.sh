#!/usr/bin/env bash
# torch 2.14.1: destroy_process_group does not end a process group, nor its gloo threads, if torch._dynamo was first imported
# while the group was there. The first DistributedDataParallel of a process imports it, so that a program of nothing but
# init_process_group, DDP and destroy_process_group keeps the group until Python ends; with `import torch._dynamo` as its first
# line the threads are gone. One would have guessed that when a module is imported decides nothing about a group's life.
#
# Output seen:
#   torch 2.14.1+cu130
#   torch._dynamo imported before the group: 0 gloo threads after destroy_process_group
#   torch._dynamo imported by DDP:           3 gloo threads after destroy_process_group
#   torch._dynamo imported in between:       3 gloo threads after destroy_process_group
#
# Needs Linux (it reads the names of threads), Python 3.10 to 3.14 and some GB of space. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
cat >"$folder/threads.py" <<'PY'
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def gloo_threads():
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


def train():
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()


when = sys.argv[1]
if when == "version":
    print("torch", torch.__version__)
    sys.exit()
if when == "before":
    import torch._dynamo
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
if when == "between":
    import torch._dynamo
else:
    train()
gc.collect()
dist.destroy_process_group()
gc.collect()
print(gloo_threads())
PY
export GLOO_SOCKET_IFNAME=lo
run() { "$folder/venv/bin/python" -W ignore "$folder/threads.py" "$1" 2>/dev/null; }
run version
before=$(run before) by_ddp=$(run ddp) between=$(run between)
echo "torch._dynamo imported before the group: $before gloo threads after destroy_process_group"
echo "torch._dynamo imported by DDP:           $by_ddp gloo threads after destroy_process_group"
echo "torch._dynamo imported in between:       $between gloo threads after destroy_process_group"
[ "$before" -eq 0 ] && [ "$by_ddp" -gt 0 ] && [ "$between" -gt 0 ]
echo "as described"
