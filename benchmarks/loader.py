#!/usr/bin/env python
"""
Images per second and core of this package's ImageNet training mapper, as a multiple of
torchvision's own pipeline on the same JPEG files, with the same crops.

    OMP_NUM_THREADS=1 benchmarks/loader.py --images datasets/imagenet/val

The pipelines take turns at every image, torchvision's twice (the control), in one thread; a ratio
is that of the processor times of two passes over the images. Where ours with every pixel decoded
does not give torchvision's tensors to the bit, the run fails.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import CONTROL, STOCK, interleave, print_table, ratio
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

from ss_detectron.data import ClassificationMapper
from ss_detectron.experiments.launch import hardware
from ss_detectron.experiments.runs import merged_config

FULL, REDUCED = "ours, every pixel", "ours, reduced decoding"

Pipeline = Callable[[dict], torch.Tensor]


def find_images(folder: Path, count: int) -> list[Path]:
    """Return so many of the JPEGs in a folder and those within it, from all over it."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg"))
    return files[:: max(1, len(files) // count)][:count]


def build_pipelines() -> dict[str, Pipeline]:
    def torchvisions() -> Pipeline:
        steps = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        transform = v2.Compose(steps)
        return lambda record: transform(pil_loader(record["file_name"]))

    def ours(reduced: bool) -> Pipeline:
        options = ["INPUT.CLASSIFICATION.REDUCED_DECODING", reduced]
        cfg = merged_config("imagenet_resnet18_ss.yaml", options)
        mapper = ClassificationMapper(cfg, training=True)
        return lambda record: mapper(record)["image"]

    stock, control = torchvisions(), torchvisions()
    return {STOCK: stock, CONTROL: control, FULL: ours(False), REDUCED: ours(True)}


def one_by_one(pipeline: Pipeline, records: list[dict]) -> Callable[[], torch.Tensor]:
    """Return a step that takes the next image, over and over, each with a crop of its own."""
    order = itertools.cycle(enumerate(records))

    def step() -> torch.Tensor:
        seed, record = next(order)
        torch.manual_seed(seed)
        return pipeline(record)

    return step


def compare(pipelines: dict[str, Pipeline], records: list[dict]) -> np.ndarray:
    """Return by how much reduced decoding changes each image, of 255, on average; 0 where unused.

    Raises:
        RuntimeError: ours with every pixel decoded is not what torchvision gives.
    """
    steps = {name: one_by_one(pipeline, records) for name, pipeline in pipelines.items()}
    differences = []
    for record in records:
        stock, full, reduced = (steps[name]() for name in (STOCK, FULL, REDUCED))
        if not full.equal(stock):
            raise RuntimeError(f"of {record['file_name']}, ours is not torchvision's tensor")
        differences.append(float((reduced.float() - full).abs().mean()))
    return np.array(differences)


def measure(files: list[Path], repeats: int) -> None:
    """Time the pipelines over a set of images, and print the table."""
    records = [{"file_name": str(file), "image_id": i, "label": 0} for i, file in enumerate(files)]
    pipelines = build_pipelines()
    changed = compare(pipelines, records)
    reduced = changed[changed > 0]
    print(f"{hardware()}; medians of {repeats} passes, one thread")
    print(f"{len(reduced)} of {len(files)} images decoded at a reduced size", end="")
    print(f", which changes them by {reduced.mean():.2f} of 255" if len(reduced) else "")
    seconds = interleave(
        {name: one_by_one(pipeline, records) for name, pipeline in pipelines.items()},
        repeats * len(records),
        warm_up=len(records),
        clock=time.process_time,
    )
    passes = {name: np.reshape(s, (repeats, len(records))).sum(1) for name, s in seconds.items()}
    rows = []
    for name, taken in passes.items():
        spread = ratio(passes[STOCK], taken)
        row = {
            "pipeline": {STOCK: "torchvision", CONTROL: "torchvision, control"}.get(name, name),
            "images/s": f"{statistics.median(len(records) / taken):.0f}",
            "ratio": f"{spread.median:.2f}",
            "quartiles": f"{spread.low:.2f} - {spread.high:.2f}",
        }
        rows.append(row)
    print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="a folder with JPEGs")
    parser.add_argument("--count", type=int, default=48, help="images of it (default 48)")
    parser.add_argument("--repeats", type=int, default=20, help="passes (default 20; 2 at least)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = find_images(args.images, args.count)
    if not files:
        parser.error(f"--images: there are no JPEGs in {args.images}")
    measure(files, args.repeats)


if __name__ == "__main__":
    main()
