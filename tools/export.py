#!/usr/bin/env python
"""
Writes a trained model for tools that know nothing of ss_detectron:

  model.pth    the weights under stock Detectron2's names, and the names of the classes; of a
               classifier on a ResNet they fit Detectron2's ResNet with num_classes, and load as
               the backbone of its detectors
  config.yaml  detectors: the config for stock Detectron2, with MODEL.WEIGHTS pointing at them
  model.pt2    with --program: a torch.export program, which torch.export.load reads: image in,
               class logits and box deltas of every pyramid level out (RetinaNet), or images in,
               class logits out (classifiers)

    tools/export.py --config-file output/demo/config.yaml --output exported

The weights are model_final.pth beside the config, or else its MODEL.WEIGHTS.
"""

import argparse
from pathlib import Path

import torch
from detectron2.modeling import build_model

from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.experiments.runs import trained_config
from ss_detectron.export import export_program, plain_config, plain_state_dict
from ss_detectron.modeling import ImageClassifier
from ss_detectron.utils.usage import add_traceback_option, one_line_errors


def main(args: argparse.Namespace) -> None:
    """Loads, converts back to stock layers and writes."""
    with one_line_errors(args.traceback):
        args.output.mkdir(parents=True, exist_ok=True)
        cfg = trained_config(args.config_file, args.opts)
        trained, cfg.MODEL.DEVICE = cfg.clone(), "cpu"  # here, not in the exported config
        model = build_model(cfg).eval()
        is_classifier = isinstance(model, ImageClassifier)
        plain = None if is_classifier else plain_config(trained)
        checkpointer = FeedbackCheckpointer(
            model, trusted_weights=cfg.MODEL.TRUSTED_WEIGHTS, whole=True
        )
        classes = checkpointer.load(cfg.MODEL.WEIGHTS).get("classes", [])
        content = {"model": plain_state_dict(model), "classes": classes}
        side = cfg.INPUT.CLASSIFICATION.SIZE
        size = args.size or ((side, side) if is_classifier else (800, 1344))
        program = export_program(model, size) if args.program else None
    written = [args.output / "model.pth"]
    if is_classifier:
        content["matching_heuristics"] = True  # the names are the ends of those in a detector
    torch.save(content, written[0])
    if plain is not None:
        plain.MODEL.WEIGHTS = str(written[0].resolve())
        written.append(args.output / "config.yaml")
        written[-1].write_text(plain.dump())
    if program is not None:
        written.append(args.output / "model.pt2")
        torch.export.save(program, written[-1])
        shape = tuple(program.example_inputs[0][0].shape)
        number = "any number of images" if is_classifier else "an image"
        print(f"The program takes {number}, {shape[1:]}, {cfg.INPUT.FORMAT}, from 0 to 255.")
    print("Written:", ", ".join(map(str, written)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the run's config.yaml, or its config")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--program", action="store_true", help="write a torch.export program too")
    size = "image size of the program (a classifier's own; else 800 1344, or whatever is given, "
    size += "rounded up to what the backbone divides)"
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help=size)
    add_traceback_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    main(parser.parse_args())
