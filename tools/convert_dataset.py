#!/usr/bin/env python
"""
Writes annotations of Pascal VOC (XML) or YOLO (text) in COCO's form, for tools/train_net.py: one
file for each split; images stay where they are.

    tools/convert_dataset.py voc VOCdevkit/VOC2007 --output voc2007
    tools/convert_dataset.py voc fruit/train fruit/valid --output fruit_coco --classes apple banana
    tools/convert_dataset.py yolo fruit/data.yaml --output fruit_coco

It says what it read and what it left out, and the keys to train with.
"""

import argparse
import logging
from collections import Counter
from pathlib import Path

from ss_detectron.data.voc_yolo import AnnotatedImages, read_voc, read_yolo, write_coco
from ss_detectron.utils.usage import add_traceback_option, one_line_errors


def main(words: list[str] | None = None) -> None:
    """Reads, writes, reports."""
    args = parse_arguments(words)
    with one_line_errors(args.traceback):
        if args.format == "voc":
            sources = [read_voc(source, zero_based=args.zero_based) for source in args.source]
        else:
            sources = [read_yolo(source) for source in args.source]
        found = dict.fromkeys(name for source in sources for name in source.classes)
        classes = args.classes or (sorted(found) if args.format == "voc" else list(found))
        entries = convert(sources, args.output, classes)
    print(f'The keys: DATASETS.COCO_INSTANCES "{entries}"')
    print(f"          MODEL.RETINANET.NUM_CLASSES {len(classes)}")


def convert(
    sources: list[AnnotatedImages], output: Path, classes: list[str]
) -> list[tuple[str, str, str]]:
    """Writes a file for each split, or none; returns entries of DATASETS.COCO_INSTANCES."""
    splits = [(name, source) for source in sources for name in source.splits]
    if twice := [name for name, count in Counter(name for name, _ in splits).items() if count > 1]:
        raise ValueError(f"several splits are called {', '.join(twice)}: convert them one by one")
    output.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, source in splits:
        file = output / f"{name}.json"
        if not source.splits[name]:
            print(f"{name} has no images: no file is written")
            continue
        try:
            content = write_coco(source.splits[name], classes, file)
        except BaseException:
            for _, written, _ in entries:
                Path(written).unlink()
            raise
        report(file, content)
        entries.append((f"{output.resolve().name}_{name}", str(file), str(source.image_root)))
    if not entries:
        raise ValueError("there is nothing to write: no image has annotations")
    return entries


def report(file: Path, content: dict) -> None:
    """Prints how many images and boxes a file has."""
    annotations = content["annotations"]
    boxes = Counter(annotation["category_id"] for annotation in annotations)
    crowds = sum(annotation["iscrowd"] for annotation in annotations)
    empty = len(content["images"]) - len({annotation["image_id"] for annotation in annotations})
    print(f"{file}: {len(content['images'])} images, {empty} of them without objects")
    print(f"  {len(annotations)} boxes:", end=" ")
    print(*(f"{c['name']} {boxes[c['id']]}" for c in content["categories"]), sep=", ")
    if crowds:
        print(f"  {crowds} of them are difficult: neither learned from nor counted (iscrowd)")


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("format", choices=("voc", "yolo"))
    sources = "VOC: folders with XML files; YOLO: data.yaml, or folders with text files"
    add("source", type=Path, nargs="+", metavar="SOURCE", help=sources)
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write into")
    classes = "those to keep, in this order (default: all, VOC's sorted)"
    add("--classes", nargs="+", metavar="NAME", help=classes)
    zero = "VOC's corners count from 0, as datumaro and others write them, not from 1"
    add("--zero-based", action="store_true", help=zero)
    add_traceback_option(parser)
    return parser.parse_args(words)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    main()
