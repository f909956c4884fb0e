#!/usr/bin/env bash
# torch 2.14.1, CPU: a training loop within one autocast block computes every step with the first step's bfloat16 copies of
# the weights. The optimiser changes the weights, the copies in autocast's cache stay until the block ends, and the loss is
# the same number in all steps, without a warning. With a block for each forward pass it falls; so it does in one block with
# cache_enabled=False. One would have guessed that the cache notices a weight that was changed in place: autograd does.
#
# Output seen:
#   torch 2.14.1+cu130
#   a block for each step  [4.4341, 2.7846, 1.9317, 1.4405, 1.1198]
#   one block              [4.4341, 4.4341, 4.4341, 4.4341, 4.4341]
#   one, without a cache   [4.4341, 2.7846, 1.9317, 1.4405, 1.1198]
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
from contextlib import nullcontext

warnings.filterwarnings("ignore")  # of NumPy, which is not needed
import torch

print("torch", torch.__version__)


def losses(around_the_loop, around_a_step):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 8)
    found = []
    with around_the_loop:
        for _ in range(5):
            with around_a_step():
                loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            found.append(round(loss.item(), 4))
    return found


def autocast(**options):
    return torch.autocast("cpu", torch.bfloat16, **options)


each = losses(nullcontext(), autocast)
one = losses(autocast(), nullcontext)
uncached = losses(autocast(cache_enabled=False), nullcontext)
print("a block for each step ", each)
print("one block             ", one)
print("one, without a cache  ", uncached)
sys.exit(not (len(set(one)) == 1 and one[0] == each[0] and each[-1] < each[0] / 2 and each == uncached))
PY
echo "as described"
