"""
Converts the models of torchvision, timm, transformers and Detectron2's model zoo, and compares the
report with what happens.

    python tests/sweep_models.py torchvision timm transformers detectron2   # all, as a table
    python tests/sweep_models.py timm --only "swin*" "eva*"

Each model is built with random weights, converted to sign-symmetry, and run forward and backward
once in training mode. The truth is read off the autograd graph: through which operations a layer's
weight received its gradient. A model is built without memory for its weights (device "meta") where
its code allows that, so that size does not matter; else on the CPU.
"""

import argparse
import fnmatch
import functools
import gc
import importlib.metadata
import inspect
import logging
import sys
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ss_detectron.layers import AsymmetricLayer, convert_feedback, feedback_report
from ss_detectron.layers.report import weight_layers

META, CPU = torch.device("meta"), torch.device("cpu")
LARGEST_ON_CPU = 120  # million parameters


class Case(NamedTuple):
    """A model to be looked at."""

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Any]
    """Returns what the model computes, with tensors in it that can be passed backwards."""
    needs_values: bool = False
    """Whether the model cannot run without the values of its weights and images."""


class Result(NamedTuple):
    """What :func:`sweep` found of one model."""

    name: str
    converted: int
    bypassed: dict[str, str]
    left_out: dict[str, str]
    """Layer -> reason, both."""
    false: list[str]
    """Layers whose row is not what happens."""
    not_run: str = ""
    """Why the model could not be run, so that only conversion was looked at."""


# What happens -------------------------------------------------------------------------------------


def build_without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the device meta, from modules that register parameters of it."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not nn.parameter.is_lazy(parameter):
            parameter = nn.Parameter(parameter.to(META), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        return build().to(META)
    except (NotImplementedError, RuntimeError):  # a value was asked for
        nn.Module.register_parameter = register
        return build().to(META)
    finally:
        nn.Module.register_parameter = register


def size_of(model: nn.Module) -> float:
    """In millions of parameters."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def operations_of_weights(outputs: Any) -> dict[Tensor, set[str]]:
    """Parameter -> the names of the operations that it enters, in the graph of the outputs."""
    found = defaultdict(set)
    waiting = [t.grad_fn for t in _differentiable(outputs) if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            inner = [following]
            if following.name() == "CatBackward0":  # the weights of attention, side by side
                inner += [f for f, _ in following.next_functions if f is not None]
            for leaf in inner:
                if hasattr(leaf, "variable"):
                    found[leaf.variable].add(node.name())
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _differentiable(outputs: Any) -> list[Tensor]:
    """The tensors with a gradient in what a model returned."""
    if not isinstance(outputs, (Tensor, list, tuple, dict)):
        outputs = vars(outputs)
    leaves = tree_leaves(dict(outputs) if isinstance(outputs, dict) else outputs)
    return [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]


def sweep(case: Case) -> Result:
    """Convert a model, run it, and compare its report with the operations of its graph."""
    torch.manual_seed(0)
    model, why = None, ""
    for device in [CPU] if case.needs_values else [META, CPU]:
        try:
            if not case.needs_values:
                model = build_without_memory(case.build)
            if device == CPU:  # most often, the value of a tensor was asked for
                if model is not None and (size := size_of(model)) > LARGEST_ON_CPU:
                    raise MemoryError(f"{size:.0f} million parameters need their values")
                model = case.build()
            return _sweep(case, model, device)
        except Exception as error:
            why = f"not run: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:90]
    if model is None:
        return Result(case.name, 0, {}, {}, [], why)
    return _result(case, convert_feedback(model, "sign_symmetry"), {})._replace(not_run=why)


def _sweep(case: Case, model: nn.Module, device: torch.device) -> Result:
    convert_feedback(model.train(), "sign_symmetry")
    # Under the hooks of others a convolution is an autograd Function too, which has a name.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with device, hooks:
        outputs = case.run(model)
    used = operations_of_weights(outputs)
    sum(t.sum() for t in _differentiable(outputs)).backward()
    return _result(case, model, used)


def _result(case: Case, model: nn.Module, used: dict[Tensor, set[str]]) -> Result:
    converted, bypassed, left_out, false = 0, {}, {}, []
    for row, (_, layer) in zip(feedback_report(model), weight_layers(model), strict=True):
        if row.left_out and not isinstance(layer, AsymmetricLayer):
            left_out[row.name] = row.why
            continue
        if row.reason:
            bypassed[row.name] = row.why
        else:
            converted += 1
        names = layer.weight_names(layer)
        operations = {o for n in names for o in used.get(layer.get_parameter(n), ())}
        acts = any(name.startswith("_Asymmetric") for name in operations)
        if operations and acts == bool(row.reason):
            false.append(f"{row.name} ({row.rule}: {', '.join(sorted(operations))})")
    return Result(case.name, converted, bypassed, left_out, false)


# The libraries ------------------------------------------------------------------------------------


def torchvision_cases() -> Iterator[Case]:
    """All models of torchvision."""
    from torchvision import models

    for name in models.list_models():
        builder = models.get_model_builder(name)
        options = dict.fromkeys(("weights", "weights_backbone"))
        known = inspect.signature(builder).parameters
        build = functools.partial(builder, **{o: None for o in options if o in known})
        kind = builder.__module__.split(".")[2]
        if kind == "detection":
            yield Case(name, build, _detect, needs_values=True)
        elif kind == "optical_flow":
            yield Case(name, build, lambda m: m(*torch.rand(2, 1, 3, 128, 128)))
        else:
            size = 299 if "inception" in name else 224
            shape = (1, 3, 16, size, size) if kind == "video" else (2, 3, size, size)
            yield Case(name, build, functools.partial(_image, shape))


def _image(shape: tuple[int, ...], model: nn.Module) -> Any:
    return model(torch.rand(shape))


def _detect(model: Any) -> Any:
    """Losses of torchvision's detectors, of small images where the model lets them be small."""
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "keypoints": torch.ones(1, 17, 3) * 20,
    }
    if "SSD" not in type(model).__name__:
        model.transform.min_size, model.transform.max_size = (64,), 64
    return model(list(torch.rand(2, 3, 64, 64)), [target] * 2)


SMALL = ("tiny", "small", "mini", "nano", "pico", "femto", "atto", "_s", "_xs", "_b0", "18")


def timm_cases() -> Iterator[Case]:
    """Of each family of timm, one model of up to 30 million parameters, or the smallest."""
    import timm

    for module in timm.list_modules():
        sizes = {}
        names = timm.list_models(module=module)
        for name in sorted(names, key=lambda n: not any(word in n for word in SMALL)):
            model = build_without_memory(functools.partial(timm.create_model, name))
            sizes[name] = size_of(model)
            if sizes[name] <= 30:
                break
        else:
            if not sizes:
                continue
            name = min(sizes, key=lambda n: sizes[n])
        shape = 2, *model.pretrained_cfg["input_size"]
        yield Case(
            name, functools.partial(timm.create_model, name), functools.partial(_image, shape)
        )


TASKS = ("IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "IMAGE_SEGMENTATION", "SEMANTIC_SEGMENTATION")
TASKS += ("INSTANCE_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION")
TASKS += ("VIDEO_CLASSIFICATION", "KEYPOINT_DETECTION", "MASK_GENERATION", "MASKED_IMAGE_MODELING")
TASKS += ("ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION")


SMALLER = {"use_pretrained_backbone": False, "encoder_layers": 2, "decoder_layers": 2}
SMALLER |= {"num_queries": 20}


def transformers_cases() -> Iterator[Case]:
    """The first model for each task of vision of each kind in transformers, with few layers."""
    import transformers
    from transformers.models.auto import modeling_auto

    seen = set()
    for task in TASKS:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).items():
            name = names if isinstance(names, str) else names[0]
            if name not in seen:
                seen.add(name)
                config = transformers.CONFIG_MAPPING[kind]
                build = functools.partial(_transformer, getattr(transformers, name), config)
                yield Case(name, build, _run_transformer)


def _transformer(cls: Any, config_class: Any) -> nn.Module:
    config = config_class()
    for name, most in SMALLER.items():
        if isinstance(getattr(config, name, None), int):  # and whether to load a backbone
            setattr(config, name, min(getattr(config, name), most))
    return cls(config)


def _run_transformer(model: Any) -> Any:
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 128
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    image = getattr(vision, "num_channels", None) or 3, *sides
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    inputs = {
        "pixel_values": torch.rand(2, *((frames, *image) if frames else image)),
        "pixel_values_videos": torch.rand(2, frames or 2, *image),
        "input_ids": torch.ones(2, 8, dtype=torch.long),
        "inputs": torch.rand(2, *image),
    }
    wanted = inspect.signature(model.forward).parameters
    return model(**{name: value for name, value in inputs.items() if name in wanted})


def detectron2_cases() -> Iterator[Case]:
    """The models of Detectron2's zoo, those alike once; YAML and Python."""
    from detectron2 import model_zoo

    folder = Path(model_zoo.__file__).parent / "configs"
    seen = set()
    for path in sorted([*folder.glob("*/*.yaml"), *folder.glob("*/*.py")]):
        name = str(path.relative_to(folder))
        if path.parent.name == "common":
            continue
        cfg = model_zoo.get_config(name)
        if path.suffix == ".yaml":
            cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
            text = cfg.MODEL.dump()
        else:
            text = str(cfg.model)
        if text not in seen:
            seen.add(text)
            build = functools.partial(_zoo_model, cfg)
            yield Case(name, build, functools.partial(_run_zoo_model, cfg), needs_values=True)


def _zoo_model(cfg: Any) -> nn.Module:
    from detectron2.config import instantiate
    from detectron2.modeling import build_model

    return build_model(cfg) if "MODEL" in cfg else instantiate(cfg.model)


def _run_zoo_model(cfg: Any, model: nn.Module) -> Any:
    from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
    from detectron2.utils.events import EventStorage

    box, size = [4.0, 8.0, 40.0, 52.0], (64, 64)
    instances = Instances(size, gt_boxes=Boxes(torch.tensor([box])))
    instances.gt_classes = torch.tensor([0])
    instances.gt_keypoints = Keypoints(torch.full((1, 17, 3), 20.0))
    if "MODEL" in cfg and cfg.INPUT.MASK_FORMAT == "bitmask":
        instances.gt_masks = BitMasks(torch.ones(1, *size, dtype=torch.bool))
    else:
        instances.gt_masks = PolygonMasks([[[4.0, 8.0, 40.0, 8.0, 40.0, 52.0]]])
    image = torch.randint(0, 256, (3, *size)).byte()
    proposals = Instances(size, proposal_boxes=Boxes(torch.tensor([box])))
    proposals.objectness_logits = torch.zeros(1)
    example = {"image": image, "instances": instances, "sem_seg": torch.zeros(size).long()}
    example["proposals"] = proposals
    with EventStorage():
        return model([example, example])


CASES = {
    "torchvision": torchvision_cases,
    "timm": timm_cases,
    "transformers": transformers_cases,
    "detectron2": detectron2_cases,
}


# The table ----------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("libraries", nargs="+", choices=CASES)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of models' names")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    wrong = 0
    for library in options.libraries:
        results = []
        for case in CASES[library]():
            if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.only):
                results.append(sweep(case))
                print(*results[-1], sep=", ", file=sys.stderr, flush=True)
                gc.collect()
        print(f"## {library} {importlib.metadata.version(library)}\n\n{table(results)}\n")
        wrong += sum(len(result.false) for result in results)
    return int(wrong > 0)


def table(results: list[Result]) -> str:
    """The models as Markdown: a list of those whose layers are all converted, a table of others."""
    others = [r for r in results if r.bypassed or r.left_out or r.not_run]
    complete = [f"{r.name} {r.converted}" for r in results if r not in others]
    lines = [
        f"{len(results)} models. All layers are converted, and learn by their rule, in "
        f"{len(complete)} (with how many there are):",
        *textwrap.wrap(", ".join(complete) + ".", 100, break_on_hyphens=False),
        "",
        "| others | converted | on backpropagation |",
        "|---|---|---|",
    ]
    for r in others:
        reasons = Counter((r.bypassed | r.left_out).values())
        notes = [f"{n} {why}" for why, n in reasons.items()] + [r.not_run] * bool(r.not_run)
        lines.append(f"| {r.name} | {r.converted} | {', '.join(notes)} |")
    return "\n".join([*lines, *(f"FALSE: {r.name}: {r.false}" for r in results if r.false)])


if __name__ == "__main__":
    sys.exit(main())
