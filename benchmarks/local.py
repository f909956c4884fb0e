#!/usr/bin/env python
"""
What locally connected layers cost: time of a forward and a backward pass of Bartunov et al.'s
networks, as a multiple of their convolutional twins'.

    benchmarks/local.py --threads 1
    THP_MEM_ALLOC_ENABLE=1 benchmarks/local.py --networks cifar      with memory in large pages

The twin, a second copy of it (the control), LocallyConnected2d, and the same by unfold and einsum
take turns.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import CONTROL, STOCK, interleave, print_table, ratio
from torch import Tensor, nn

from ss_detectron import LocallyConnected2d

NETWORKS = {  # images; in and out channels, kernel, size and stride of each layer; most time / twin
    "mnist": ((1, 28, 28), [(1, 32, 3, 28, 2), (32, 64, 3, 14, 2)], 1.1),
    "cifar": (
        (3, 32, 32),
        [(3, 64, 5, 32, 2), (64, 128, 5, 16, 2), (128, 256, 3, 8, 1)],
        1.35,
    ),
}
LEAST_GAIN = 1.5  # over unfold and einsum


class Unfolded(LocallyConnected2d):
    """The layer by torch's own unfold, which has a window's channels slowest, and einsum."""

    def forward(self, x: Tensor) -> Tensor:
        (top, left), (bottom, right) = self.grid.before, self.grid.after
        padded = F.pad(x, (left, right, top, bottom))
        columns = F.unfold(padded, self.grid.kernel_size, stride=self.grid.stride)
        y = torch.einsum("nkp,pck->ncp", columns, self.weight) + self.bias.t()
        return y.unflatten(2, self.grid.positions)


def tied(*sizes: int) -> nn.Module:
    """Return the convolution of the same sizes, on the padded input."""
    in_channels, out_channels, kernel_size, size, stride = sizes
    grid = LocallyConnected2d(1, 1, kernel_size, size, stride, "same", device="meta").grid
    (top, left), (bottom, right) = grid.before, grid.after
    pad = nn.ZeroPad2d((left, right, top, bottom))
    return nn.Sequential(pad, nn.Conv2d(in_channels, out_channels, kernel_size, stride))


def network(name: str, layer: Callable[..., nn.Module], **options: Any) -> nn.Sequential:
    images, sizes, _ = NETWORKS[name]
    layers = [part for s in sizes for part in (layer(*s, **options), nn.Tanh())]
    features = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        width = features(torch.empty(1, *images)).shape[1]
    return nn.Sequential(features, nn.Linear(width, 1024), nn.Tanh(), nn.Linear(1024, 10))


def passes(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    model.to(x.device)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()

    return step


def measure(name: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """Return a network's rows of the table."""
    images, _, limit = NETWORKS[name]
    x = torch.randn(args.batch, *images, device=args.device)
    labels = torch.arange(args.batch, device=args.device) % 10
    models = {
        STOCK: network(name, tied),
        CONTROL: network(name, tied),
        "LocallyConnected2d": network(name, LocallyConnected2d, padding="same"),
        "unfold, einsum": network(name, Unfolded, padding="same"),
    }
    steps = {key: passes(model, x, labels) for key, model in models.items()}
    seconds = interleave(steps, args.turns, device=args.device)
    ours = seconds["LocallyConnected2d"]
    promises = {
        "LocallyConnected2d": (ratio(ours, seconds[STOCK]).median <= limit, f"<= {limit}"),
        "unfold, einsum": (
            ratio(seconds["unfold, einsum"], ours).median >= LEAST_GAIN,
            f">= {LEAST_GAIN} times LocallyConnected2d",
        ),
    }
    rows = []
    for key, times in seconds.items():
        spread = ratio(times, seconds[STOCK])
        held, promise = promises.get(key, (True, ""))
        rows.append(
            {
                "network": name,
                "layers": "convolution" if key == STOCK else key,
                "time / convolution": f"{spread.median:.3f}",
                "quartiles": f"{spread.low:.3f} - {spread.high:.3f}",
                "ms": f"{1e3 * statistics.median(times):.1f}",
                "promise": promise and f"{promise} {'holds' if held else 'DOES NOT HOLD'}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    add("--batch", type=int, default=128)
    add("--turns", type=int, default=20, help="default 20; 2 at least")
    add("--threads", type=int, default=1, help="torch's CPU threads (default 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, batch {args.batch}")
    print_table([row for name in args.networks for row in measure(name, args)])


if __name__ == "__main__":
    main()
