#!/usr/bin/env python
"""
Images per second and core of this package's ImageNet training mapper, as a multiple of
torchvision's own pipeline on the same JPEG files, and those of Detectron2's detection mapper.

    OMP_NUM_THREADS=1 tools/benchmark_loader.py
    OMP_NUM_THREADS=1 tools/benchmark_loader.py --images datasets/imagenet/val

At every image, those for classification take turns in an order drawn anew, torchvision's twice (the
control), all with the same crop, in one process and one thread; detection has passes of its own. A
ratio is that of the processor times of two passes over the images. Where the control's median is
not close to 1, the machine was busy with something else: run it again. Where ours with every pixel
decoded does not give torchvision's tensors to the bit, the run fails.

Without --images there are two sets: photographs of the usual size in ImageNet, whose crops need
every pixel, and large ones, most of whose crops do not. They are parts of scikit-learn's two
photographs, continued by reflection, or of generated pictures where it is not installed.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image
from tabulate import tabulate
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

from ss_detectron import add_ss_config
from ss_detectron.config import merge_config_file
from ss_detectron.data import ClassificationMapper

# The name of a generated set: the width and height about which its images' sizes lie.
SETS = {"usual in ImageNet": (500, 375), "large": (1280, 960)}
QUALITY = 95  # about half a byte per pixel, as in ImageNet
WARM_UP = 1
TORCHVISION, CONTROL = "torchvision", "torchvision, control"
FULL, REDUCED = "ours, every pixel", "ours, reduced decoding"
DETECTION = "Detectron2's, detection"

Pipeline = Callable[[dict], torch.Tensor]


# Images ------------------------------------------------------------------------------------------


def generate_photo(generator: np.random.Generator, side: int = 640) -> np.ndarray:
    """A picture (side, side, 3) whose spectrum falls with the frequency, as that of photographs."""
    frequency = np.hypot(np.fft.fftfreq(side, 1 / side)[:, None], np.fft.rfftfreq(side, 1 / side))
    noise = np.fft.rfft2(generator.standard_normal((3, side, side)))
    # As a JPEG, half a byte per pixel as well.
    values = np.fft.irfft2(noise / np.maximum(frequency, 1) ** 1.35, (side, side))
    return np.clip(128 + 50 * values / values.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def load_photos() -> list[np.ndarray]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        generator = np.random.default_rng(0)
        return [generate_photo(generator) for _ in range(2)]
    return load_sample_images().images


def write_images(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """JPEGs cut at random out of the photographs, within a tenth of this size, some upright."""
    generator = np.random.default_rng(0)
    photos, files = load_photos(), []
    for index in range(count):
        size = np.array([height, width]) * generator.uniform(0.9, 1.1, 2)
        h, w = size.astype(int)[:: generator.choice([1, 1, -1])]
        photo = photos[index % len(photos)]
        beyond = [(0, max(0, n - m + 64)) for n, m in zip((h, w), photo.shape, strict=False)]
        photo = np.pad(photo, [*beyond, (0, 0)], mode="symmetric")
        y, x = generator.integers(0, np.array(photo.shape[:2]) - (h, w))
        files.append(folder / f"{index:04d}.jpg")
        Image.fromarray(photo[y : y + h, x : x + w]).save(files[-1], quality=QUALITY)
    return files


def find_images(folder: Path, count: int) -> list[Path]:
    """So many of the JPEGs in a folder and those within it, from all over it."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg"))
    return files[:: max(1, len(files) // count)][:count]


def describe(files: list[Path]) -> list[dict]:
    """Records for all mappers: each image has a label, and boxes over its quarters."""
    records = []
    for index, file in enumerate(files):
        with Image.open(file) as image:
            w, h = image.size
        boxes = [[x, y, x + w / 2, y + h / 2] for x in (0, w / 2) for y in (0, h / 2)]
        box = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        records.append(
            {
                "file_name": str(file),
                "image_id": index,
                "label": 0,
                "width": w,
                "height": h,
                "annotations": [{"bbox": b, **box} for b in boxes],
            }
        )
    return records


# Pipelines ---------------------------------------------------------------------------------------


def load_config(name: str) -> CfgNode:
    cfg = get_cfg()
    add_ss_config(cfg)
    merge_config_file(cfg, name)
    return cfg


def build_pipelines() -> dict[str, Pipeline]:
    def build_torchvision() -> Pipeline:
        steps = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        transform = v2.Compose(steps)
        return lambda record: transform(pil_loader(record["file_name"]))

    def build_ours(reduced: bool) -> Pipeline:
        cfg = load_config("imagenet_resnet18_ss.yaml")
        cfg.INPUT.CLASSIFICATION.REDUCED_DECODING = reduced
        mapper = ClassificationMapper(cfg, training=True)
        return lambda record: mapper(record)["image"]

    detection = DatasetMapper(load_config("retinanet_ss.yaml"), is_train=True)
    return {
        TORCHVISION: build_torchvision(),
        CONTROL: build_torchvision(),
        FULL: build_ours(False),
        REDUCED: build_ours(True),
        DETECTION: lambda record: detection(record)["image"],
    }


def seed_all(index: int) -> None:
    """Before each pipeline, so that all of them crop the image of this index alike."""
    torch.manual_seed(index)
    np.random.seed(index)


def compare(pipelines: dict[str, Pipeline], records: list[dict]) -> tuple[np.ndarray, float]:
    """
    Which images are decoded at a reduced size, and by how much these differ, of 255, on average.

    Raises:
        AssertionError: ours with every pixel decoded is not what torchvision gives.
    """
    differences = []
    for index, record in enumerate(records):
        tensors = {}
        for name in (TORCHVISION, FULL, REDUCED):
            seed_all(index)
            tensors[name] = pipelines[name](record)
        if not tensors[FULL].equal(tensors[TORCHVISION]):
            raise AssertionError(f"of {record['file_name']}, ours is not torchvision's tensor")
        differences.append(float((tensors[REDUCED].float() - tensors[FULL]).abs().mean()))
    differences = np.array(differences)
    reduced = differences > 0
    return reduced, float(differences[reduced].mean()) if reduced.any() else 0.0


def seconds(pipeline: Pipeline, record: dict, index: int) -> float:
    """The processor time of one image."""
    seed_all(index)
    start = time.process_time()
    pipeline(record)
    return time.process_time() - start


def measure(records: list[dict], repeats: int) -> dict:
    """What the table and the JSON file say of a set of images."""
    pipelines = build_pipelines()
    reduced, difference = compare(pipelines, records)
    times = {name: np.zeros((WARM_UP + repeats, len(records))) for name in pipelines}
    order = random.Random(0)
    for turn in range(WARM_UP + repeats):
        # Detection leaves caches and heap in another state, which whoever follows would pay for.
        for names in ([TORCHVISION, CONTROL, FULL, REDUCED], [DETECTION]):
            for index, record in enumerate(records):
                order.shuffle(names)
                for name in names:
                    times[name][turn, index] = seconds(pipelines[name], record, index)
    times = {name: taken[WARM_UP:] for name, taken in times.items()}

    def ratios(name: str, images: np.ndarray) -> list[float] | None:
        """The quartiles over turns of how many times as fast as torchvision's this one is."""
        if not images.any():
            return None
        stock, taken = (times[n][:, images].sum(1) for n in (TORCHVISION, name))
        return statistics.quantiles(stock / taken, n=4)

    everything = np.ones(len(records), bool)
    sizes = np.array([(r["width"], r["height"]) for r in records])
    return {
        "images": len(records),
        "mean_width": float(sizes[:, 0].mean()),
        "mean_height": float(sizes[:, 1].mean()),
        "mean_bytes": statistics.mean(Path(r["file_name"]).stat().st_size for r in records),
        "share_reduced": float(reduced.mean()),
        "mean_difference_where_reduced": difference,
        "pipelines": {
            name: {
                "images_per_second": statistics.median(len(records) / taken.sum(1)),
                "ratio_quartiles": ratios(name, everything),
                "ratio_quartiles_where_reduced": ratios(name, reduced),
            }
            for name, taken in times.items()
        },
    }


# Report ------------------------------------------------------------------------------------------


def show(name: str, found: dict) -> None:
    print(
        f"{name}: {found['images']} images, on average {found['mean_width']:.0f} x "
        f"{found['mean_height']:.0f} pixels and {found['mean_bytes'] / 1024:.0f} KiB; "
        f"{found['share_reduced']:.0%} decoded at a reduced size"
    )
    if found["share_reduced"]:
        print(f"(which changes them by {found['mean_difference_where_reduced']:.2f} of 255)")
    rows = []
    for pipeline, figures in found["pipelines"].items():
        low, ratio, high = figures["ratio_quartiles"]
        where_reduced = figures["ratio_quartiles_where_reduced"]
        rows.append(
            {
                "pipeline": pipeline,
                "images/s": f"{figures['images_per_second']:.0f}",
                "ratio": f"{ratio:.2f}",
                "quartiles": f"{low:.2f} - {high:.2f}",
                "where reduced": f"{where_reduced[1]:.2f}" if where_reduced else "",
            }
        )
    print(tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True), end="\n\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="a folder with JPEGs (default: see above)")
    parser.add_argument("--count", type=int, default=48, help="images of a set (default 48)")
    parser.add_argument("--repeats", type=int, default=20, help="turns (default 20)")
    parser.add_argument("--quick", action="store_true", help="12 images and 5 turns, 30 s at most")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args(argv)
    if args.quick:
        args.count, args.repeats = min(args.count, 12), min(args.repeats, 5)
    if args.repeats < 2:
        parser.error("--repeats: a median and quartiles need 2 at least")
    if args.count < 1:
        parser.error("--count: 1 image is needed at least")
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            sets = {}
            for name, (width, height) in SETS.items():
                (Path(folder) / name).mkdir()
                sets[name] = write_images(Path(folder) / name, width, height, args.count)
        else:
            sets = {str(args.images): find_images(args.images, args.count)}
            if not sets[str(args.images)]:
                parser.error(f"--images: there are no JPEGs in {args.images}")
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, PIL)}
        print(*(f"{name} {version}" for name, version in versions.items()), sep=", ", end="; ")
        print(f"medians of {args.repeats} turns, one thread.\n")
        figures = {}
        for name, files in sets.items():
            figures[name] = measure(describe(files), args.repeats)
            show(name, figures[name])
    if args.json:
        results = {"versions": versions, "repeats": args.repeats, "sets": figures}
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
