#!/usr/bin/env python
"""
COCO's evaluation of generated boxes by this package's evaluator: processor time by pycocotools and
by hotcoco, which has to be installed, and how far their figures differ.

    benchmarks/evaluation.py
    benchmarks/evaluation.py --images 100 1000 10000

A hundred detections per image, seven objects, 80 classes. What is timed is the evaluator's
``evaluate`` without the files that it can write, and once more with them. The two take turns. 5,000
images take pycocotools two minutes a round.
"""

import argparse
import contextlib
import io
import json
import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from timing import compare_sets, print_table

from ss_detectron.evaluation import DetectionEvaluator

STOCK, FAST, WRITING = "pycocotools", "hotcoco", "hotcoco, and files"
PER_IMAGE, CLASSES = 100, 80


class Kept(DetectionEvaluator):
    """Keeps the twelve figures, of which Detectron2 reports six."""

    def _derive_coco_results(self, coco_eval, *args, **kwargs):
        self.figures = np.array(coco_eval.stats)
        return super()._derive_coco_results(coco_eval, *args, **kwargs)


def generate(images: int, file: Path) -> list[dict]:
    """Write annotations; return predictions, some of them near the objects."""
    generator = np.random.default_rng(0)
    annotations, predictions = [], []
    for image in range(1, images + 1):
        corners, sizes = (
            generator.random((PER_IMAGE, 2)) * 300,
            5 + generator.random((PER_IMAGE, 2)) * 150,
        )
        boxes = np.hstack([corners, sizes])
        classes = generator.integers(CLASSES, size=PER_IMAGE)
        for box, label in zip(boxes[: generator.poisson(7)], classes, strict=False):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(label) + 1,
                    "bbox": box.round(2).tolist(),
                    "area": round(0.6 * box[2] * box[3], 4),
                    "iscrowd": int(generator.random() < 0.01),
                }
            )
        found = np.maximum(boxes + generator.normal(0, 6, boxes.shape), 1).astype(np.float32)
        scores = generator.random(PER_IMAGE, dtype=np.float32)
        rows = zip(classes.tolist(), found.tolist(), scores.tolist(), strict=True)
        instances = [
            {"image_id": image, "category_id": label, "bbox": box, "score": score}
            for label, box, score in rows
        ]
        predictions.append({"image_id": image, "instances": instances})
    content = {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
    }
    file.write_text(json.dumps(content))
    return predictions


def evaluate(name: str, api: str, predictions: str, folder: Path) -> tuple[float, np.ndarray]:
    """Return the seconds that it takes, and the figures."""
    writes = str(folder) if api == WRITING else None
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = Kept(name, ("bbox",), False, writes, coco_api=api.partition(",")[0])
        evaluator._predictions = json.loads(predictions)
        start = time.process_time()
        evaluator.evaluate()
    return time.process_time() - start, evaluator.figures


def compare(images: int, rounds: int, folder: Path) -> dict:
    file, name = folder / "annotations.json", f"evaluated_{images}"
    predictions = json.dumps(generate(images, file))
    MetadataCatalog.get(name).set(
        json_file=str(file),
        thing_classes=[f"class {i}" for i in range(CLASSES)],
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(CLASSES)},
    )
    found: dict[str, list] = {STOCK: [], FAST: [], WRITING: []}
    figures = {}
    for _ in range(rounds):
        for api, seconds in found.items():
            taken, figures[api] = evaluate(name, api, predictions, folder)
            seconds.append(taken)
    MetadataCatalog.pop(name)
    rows = [
        {
            "api": api,
            "seconds": statistics.median(seconds),
            "ratios": sorted(a / b for a, b in zip(seconds, found[STOCK], strict=True)),
            "difference": float(abs(figures[api] - figures[STOCK]).max()),
        }
        for api, seconds in found.items()
    ]
    return {"images": images, "detections": images * PER_IMAGE, "rows": rows}


def report(found: dict) -> None:
    print(f"\n{found['images']} images, {found['detections']} detections")
    print_table(
        [
            {
                "": row["api"],
                "processor s": f"{row['seconds']:.2f}",
                "/ pycocotools": f"{statistics.median(row['ratios']):.3f}",
                "from": f"{row['ratios'][0]:.3f}",
                "to": f"{row['ratios'][-1]:.3f}",
                "largest difference": f"{row['difference']:.1e}",
            }
            for row in found["rows"]
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[5000], help="(default 5000)")
    parser.add_argument("--rounds", type=int, default=3, help="of all three (default 3)")
    parser.add_argument("--quick", action="store_true", help="200 images: a minute")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args(argv)
    if args.quick:
        args.images = [200]
    if min(args.images) < 1 or args.rounds < 1:
        parser.error("--images 1 and --rounds 1 at least")
    if find_spec("hotcoco") is None:
        parser.error("hotcoco is not there: pip install hotcoco")
    compare_sets(args.images, args.rounds, compare, report, args.json)


if __name__ == "__main__":
    main()
