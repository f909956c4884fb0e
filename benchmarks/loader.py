#!/usr/bin/env python
"""
Images per second and core of this package's ImageNet training mapper, as a multiple of
torchvision's own pipeline on the same JPEG files, with the same crops.

    OMP_NUM_THREADS=1 benchmarks/loader.py
    OMP_NUM_THREADS=1 benchmarks/loader.py --images datasets/imagenet/val

The pipelines take turns at every image, torchvision's twice (the control), in one thread; a ratio
is that of the processor times of two passes over the images. Where ours with every pixel decoded
does not give torchvision's tensors to the bit, the run fails.

Without --images there are two generated sets: pictures of the usual size in ImageNet, whose crops
need every pixel, and large ones, most of whose crops do not.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from PIL import Image
from timing import CONTROL, STOCK, interleave, print_table, ratio, write_json
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

from ss_detectron import add_ss_config
from ss_detectron.config import merge_config_file
from ss_detectron.data import ClassificationMapper
from ss_detectron.experiments.launch import hardware

SETS = {"usual in ImageNet": (500, 375), "large": (1280, 960)}  # width and height
FULL, REDUCED = "ours, every pixel", "ours, reduced decoding"

Pipeline = Callable[[dict], torch.Tensor]


def write_images(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Write JPEGs whose spectrum falls with the frequency as that of photographs does."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    files = []
    for index in range(count):
        noise = np.fft.rfft2(generator.standard_normal((3, height, width)))
        values = np.fft.irfft2(noise / np.maximum(frequency, 1 / width) ** 1.35, (height, width))
        pixels = np.clip(128 + 50 * values / values.std(), 0, 255).astype(np.uint8)
        files.append(folder / f"{index:04d}.jpg")
        # Of this quality about half a byte per pixel, as in ImageNet.
        Image.fromarray(pixels.transpose(1, 2, 0)).save(files[-1], quality=95)
    return files


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
        cfg = get_cfg()
        add_ss_config(cfg)
        merge_config_file(cfg, "imagenet_resnet18_ss.yaml")
        cfg.INPUT.CLASSIFICATION.REDUCED_DECODING = reduced
        mapper = ClassificationMapper(cfg, training=True)
        return lambda record: mapper(record)["image"]

    return {
        STOCK: torchvisions(),
        CONTROL: torchvisions(),
        FULL: ours(reduced=False),
        REDUCED: ours(reduced=True),
    }


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


def measure(files: list[Path], repeats: int) -> dict:
    """Time the pipelines over a set of images.

    Returns:
        the share of images decoded at a reduced size, by how much that changes them, and of each
        pipeline the images per second and how many times as fast as torchvision's it is.
    """
    records = [{"file_name": str(file), "image_id": i, "label": 0} for i, file in enumerate(files)]
    pipelines = build_pipelines()
    differences = compare(pipelines, records)
    seconds = interleave(
        {name: one_by_one(pipeline, records) for name, pipeline in pipelines.items()},
        repeats * len(records),
        warm_up=len(records),
        clock=time.process_time,
    )
    passes = {name: np.reshape(s, (repeats, len(records))).sum(1) for name, s in seconds.items()}
    return {
        "images": len(records),
        "share_reduced": float((differences > 0).mean()),
        "difference_where_reduced": float(differences.sum() / max(1, (differences > 0).sum())),
        "pipelines": {
            name: {
                "images_per_second": statistics.median(len(records) / taken),
                "ratio": ratio(passes[STOCK], taken),
            }
            for name, taken in passes.items()
        },
    }


def report(name: str, found: dict) -> None:
    print(
        f"\n{name}: {found['images']} images; {found['share_reduced']:.0%} decoded at a reduced "
        f"size, which changes them by {found['difference_where_reduced']:.2f} of 255"
    )
    print_table(
        [
            {
                "pipeline": {STOCK: "torchvision", CONTROL: "torchvision, control"}.get(name, name),
                "images/s": f"{figures['images_per_second']:.0f}",
                "ratio": f"{figures['ratio'].median:.2f}",
                "quartiles": f"{figures['ratio'].low:.2f} - {figures['ratio'].high:.2f}",
            }
            for name, figures in found["pipelines"].items()
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="a folder with JPEGs (default: see above)")
    parser.add_argument("--count", type=int, default=48, help="images of a set (default 48)")
    parser.add_argument("--repeats", type=int, default=20, help="passes (default 20)")
    parser.add_argument("--quick", action="store_true", help="12 images and 5 passes, 30 s at most")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args(argv)
    if args.quick:
        args.count, args.repeats = min(args.count, 12), min(args.repeats, 5)
    if args.repeats < 2 or args.count < 1:
        parser.error("quartiles need --repeats 2 and --count 1 at least")
    torch.set_num_threads(1)

    print(f"{hardware()}; medians of {args.repeats} passes, one thread")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SETS if args.images is None else [str(args.images)]:
            if args.images is None:
                files = write_images(Path(folder), *SETS[name], args.count)
            else:
                files = find_images(args.images, args.count)
            if not files:
                parser.error(f"--images: there are no JPEGs in {args.images}")
            figures[name] = measure(files, args.repeats)
            report(name, figures[name])
    write_json(args.json, {"hardware": hardware(), "repeats": args.repeats, "sets": figures})


if __name__ == "__main__":
    main()
