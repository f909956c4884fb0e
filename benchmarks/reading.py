#!/usr/bin/env python
"""
From the start to the first batch's file names, on a generated data set of COCO's size in COCO's
form: processor time and memory, beside Detectron2's load_coco_json alone.

    benchmarks/reading.py
    benchmarks/reading.py --images 1000 10000 100000 1000000 --rounds 1

Each reading is a process of its own, and they take turns: load_coco_json, a second run of it (the
control), this package without a cached index, and with the one that the run before has left. Time
begins when everything is imported; memory is beyond what it was then, the peak is of the whole
process. Folder and file of a set, and the cache, are in a temporary folder: 0.35 GB for COCO's.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from timing import CONTROL, STOCK, compare_sets, print_table

COCO = 118_287  # images of COCO's train2017, with 860,001 objects
OBJECTS = 860_001 / COCO
FIRST, CACHED = "ours", "ours, cached"


def write_annotations(file: Path, images: int) -> int:
    """Write a file like COCO's instances_train2017.json, polygons of 5 to 18 points in no order.

    Returns:
        the number of objects.
    """
    generator = np.random.default_rng(0)
    owners = generator.permutation(np.repeat(np.arange(images), generator.poisson(OBJECTS, images)))

    def objects() -> Iterator[dict]:
        for number, image in enumerate(owners.tolist(), 1):
            corner, size = 300 * generator.random(2), 5 + 150 * generator.random(2)
            points = generator.random((generator.integers(5, 19), 2)) * size + corner
            yield {
                "segmentation": [points.round(2).ravel().tolist()],
                "area": round(size.prod() / 2, 4),
                "iscrowd": 0,
                "image_id": image + 1,
                "bbox": [*corner.round(2).tolist(), *size.round(2).tolist()],
                "category_id": int(generator.integers(1, 81)),
                "id": number,
            }

    def entries() -> Iterator[dict]:
        for i in range(images):
            width, height = (640, 480) if i % 3 else (480, 640)
            yield {
                "license": 4,
                "file_name": name_of(i),
                "coco_url": f"https://images.example.org/train2017/{name_of(i)}",
                "height": height,
                "width": width,
                "date_captured": "2013-11-14 17:02:52",
                "flickr_url": f"https://photographs.example.org/6116/{i:010d}_02719f7772_z.jpg",
                "id": i + 1,
            }

    categories = [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in range(1, 81)]
    with file.open("w", encoding="utf-8") as stream:
        stream.write('{"info": {}, "licenses": [], "images": [')
        for part, found in ("", entries()), ('], "annotations": [', objects()):
            stream.write(part)
            for i, entry in enumerate(found):
                stream.write(", " * (i > 0) + json.dumps(entry))
        stream.write(f'], "categories": {json.dumps(categories)}}}')
    return len(owners)


def name_of(image: int) -> str:
    return f"{image:012d}.jpg"


def read(file: str, images: str, stock: bool) -> list[str]:
    """The first batch's file names; for ``stock``, of the dicts alone."""
    if stock:
        from detectron2.data.datasets import load_coco_json

        return [record["file_name"] for record in load_coco_json(file, images, "coco")[:16]]
    from detectron2.config import get_cfg

    from ss_detectron import add_ss_config
    from ss_detectron.data import (
        build_resumable_detection_train_loader,
        check_datasets,
        register_coco_from_config,
    )

    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "RetinaNet", "DATALOADER.NUM_WORKERS", 0])
    cfg.DATASETS.COCO_INSTANCES = [["coco", file, images]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco",), ()
    register_coco_from_config(cfg)
    check_datasets(cfg)
    loader = build_resumable_detection_train_loader(cfg)
    loader.dataset.mapper = dict  # no image is there to be read
    return [record["file_name"] for record in next(iter(loader))]


def memory() -> float:
    """GB that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def measure(stage: str, file: str, images: str) -> dict[str, float]:
    import ss_detectron.engine  # noqa: F401

    before, start = memory(), (time.process_time(), time.perf_counter())
    names = read(file, images, stage in (STOCK, CONTROL))
    cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    if len(names) != 16:
        raise RuntimeError(f"{stage}: the first batch has {len(names)} images")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"cpu": cpu, "wall": wall, "peak": peak, "beyond": memory() - before}


def compare(images: int, rounds: int, folder: Path) -> dict:
    """Write a set of so many images and let the readings take turns."""
    file, pictures = folder / "annotations.json", folder / "images"
    pictures.mkdir(exist_ok=True)
    for i in range(images):
        (pictures / name_of(i)).touch()
    objects = write_annotations(file, images)
    found: dict[str, list[dict]] = {stage: [] for stage in (STOCK, CONTROL, FIRST, CACHED)}
    for number in range(rounds):
        for stage, figures in found.items():
            # Of a round's own: the first of them finds nothing cached.
            env = {**os.environ, "FVCORE_CACHE": str(folder / f"cache{number}")}
            words = [sys.executable, __file__, "--stage", stage, str(file), str(pictures)]
            run = subprocess.run(words, env=env, check=True, stdout=subprocess.PIPE, text=True)
            figures.append(json.loads(run.stdout.splitlines()[-1]))
    rows = []
    for stage, figures in found.items():
        ratios = [a["cpu"] / b["cpu"] for a, b in zip(figures, found[STOCK], strict=True)]
        medians = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
        rows.append({"stage": stage, **medians, "ratio": statistics.median(ratios)})
    return {"images": images, "objects": objects, "bytes": file.stat().st_size, "rows": rows}


def report(found: dict) -> None:
    print(f"\n{found['images']} images, {found['objects']} objects, {found['bytes'] / 1e6:.0f} MB")
    print_table(
        [
            {
                "": {STOCK: "load_coco_json", CONTROL: "load_coco_json, control"}.get(
                    row["stage"], row["stage"]
                ),
                "processor s": f"{row['cpu']:.2f}",
                "/ load_coco_json": f"{row['ratio']:.3f}",
                "peak GB": f"{row['peak']:.2f}",
                "GB beyond imports": f"{row['beyond']:.2f}",
            }
            for row in found["rows"]
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[COCO], help="of the sets")
    parser.add_argument("--rounds", type=int, default=3, help="of all readings (default 3)")
    parser.add_argument("--quick", action="store_true", help="10,000 images, one round: a minute")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage:
        print(json.dumps(measure(*args.stage)))
        return
    if args.quick:
        args.images, args.rounds = [10_000], 1
    if min(args.images) < 16 or args.rounds < 1:
        parser.error("--images 16 and --rounds 1 at least")
    compare_sets(args.images, args.rounds, compare, report, args.json)


if __name__ == "__main__":
    main()
