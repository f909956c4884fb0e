#!/usr/bin/env python
"""
What the rules cost: time of a training step (forward, backward, optimiser) as a multiple of stock
backpropagation's, and the memory that stock does not take.

    benchmarks/rules.py --quick        a first look, under two minutes on two cores
    benchmarks/rules.py --promise      what docs/performance.md has, with the limits of each rule
    benchmarks/rules.py --networks resnet50 retinanet_r18 --modes float32 bf16+channels_last
    benchmarks/rules.py --biotorch --batch 8 --size 128
    benchmarks/rules.py --networks mlp --biotorch --threads 1 --pairs 300 --steps 3
    benchmarks/rules.py --networks mlp_5x64 mlp_5x1024 mlp_20x256 --threads 1 --pairs 100

The networks are those of the shipped configs; "mlp" (five layers of 256 units; others as the names
say) and "torchvision_resnet18" are plain torch, all of their layers converted and trained by SGD
with momentum. Stock backpropagation, a second copy of it (the control) and the rules take turns; a
ratio is that of two steps of the same turn, the interval its median's with 95 % confidence. Where
the control's median is beyond 1.02 the machine was busy with something else: the table is marked
NOISY and counts for nothing. "State" is memory between steps (parameters, buffers, gradients, the
optimiser's), "peak" all that there is at once within a step.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# torch's profiler, which counts the CPU's memory, talks.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from timing import (
    CONTROL,
    STOCK,
    Ratio,
    interleave,
    median_interval,
    print_table,
    ratio,
    write_json,
)
from torch import Tensor, nn

from ss_detectron.config import add_ss_config, merge_config_file
from ss_detectron.engine.defaults import Trainer
from ss_detectron.experiments.launch import hardware
from ss_detectron.layers import AsymmetricLayer, advance_feedback, convert_feedback, get_rule
from ss_detectron.solver.build import build_optimizer

NETWORKS = {  # config, batch, height and width of the images in pixels
    "resnet18": ("imagenet_resnet18_bp.yaml", 16, 224),
    "resnet50": ("imagenet_resnet50_bp.yaml", 16, 224),
    "alexnet": ("imagenet_alexnet_bp.yaml", 16, 224),
    "retinanet_r18": ("retinanet_R_18_bp.yaml", 2, 320),
    "retinanet_r50": ("retinanet_R_50_bp.yaml", 2, 320),
}
MLPS = {"mlp": (5, 256), "mlp_5x64": (5, 64), "mlp_5x1024": (5, 1024), "mlp_20x256": (20, 256)}
NETWORKS |= dict.fromkeys(MLPS, ("imagenet_resnet18_bp.yaml", 128, 28))
PLAIN = (*MLPS, "torchvision_resnet18")  # every layer of it converted, as BioTorch does it
MODES = ("float32", "bf16", "channels_last", "compile")
BIOTORCH = {"ss": "usf", "frsf": "frsf", "brsf": "brsf", "fa": "fa"}  # our short name -> BioTorch's
BOXES = 7  # per image, as in COCO

LIMITS = {"ss": 1.02, "fa": 1.02, "frsf": 1.05, "brsf": 1.05, "kp": 1.05}


class Case(NamedTuple):
    """What is timed: a network, on which batch, and how it is computed."""

    network: str
    batch: int
    size: int
    mode: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch} at {self.size}, {self.mode}, {self.device}"

    def uses(self, mode: str) -> bool:
        return mode in self.mode.split("+")


def promises(device: str) -> list[tuple[Case, dict[str, float]]]:
    """Return the cases of --promise, each with the most that a rule may cost, by rule."""
    small = {rule: limit + 0.02 for rule, limit in LIMITS.items()}
    return [
        (Case("resnet18", 16, 224, "float32", device), LIMITS),
        (Case("retinanet_r18", 2, 320, "float32", device), LIMITS),
        (Case("resnet18", 8, 128, "float32", device), small),
        (Case("resnet18", 16, 224, "compile", device), dict.fromkeys(LIMITS, 1.05)),
    ]


# Networks ----------------------------------------------------------------------------------------


class Contestant:
    """A network with its optimiser, that takes training steps on one batch.

    The learning rate is next to zero: the weights stay as they were drawn, the same for every rule,
    and all contestants compute the same loss in every step.

    Args:
        rule: of all layers but the last ones, or "biotorch MODE" for BioTorch's layers.
    """

    def __init__(self, case: Case, rule: str = "bp") -> None:
        cfg = get_cfg()
        add_ss_config(cfg)
        config, *_ = NETWORKS.get(case.network, NETWORKS["resnet18"])
        merge_config_file(cfg, config)
        cfg.MODEL.DEVICE = case.device
        cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.CHANNELS_LAST = case.uses("channels_last")
        cfg.MODEL.COMPILED = case.uses("compile")
        cfg.SOLVER.BASE_LR = 1e-20
        torch.manual_seed(0)
        if case.network in PLAIN:
            self.model = _PlainClassifier(case, rule).to(case.device)
        else:
            cfg.MODEL.FEEDBACK.RULE = get_rule(rule).name
            self.model = Trainer.build_model(cfg)
        self.model.train()
        self.optimizer = build_optimizer(cfg, self.model)
        self.batch = _batch(cfg, case)
        layers = [m for m in self.model.modules() if isinstance(m, AsymmetricLayer)]
        self.counts_updates = any(layer.rule.counts_updates for layer in layers)
        self.autocast = torch.autocast(
            torch.device(case.device).type, torch.bfloat16, enabled=case.uses("bf16")
        )

    def step(self) -> Tensor:
        """Take one training step and return its loss."""
        self.optimizer.zero_grad()
        with EventStorage(), self.autocast:
            loss = sum(self.model(self.batch).values())
        loss.backward()
        self.optimizer.step()
        if self.counts_updates:
            advance_feedback(self.model)
        return loss.detach()


class _PlainClassifier(nn.Module):
    """torchvision's ResNet-18, or layers of tanh units for grey images, and the loss."""

    def __init__(self, case: Case, rule: str) -> None:
        super().__init__()
        self.is_mlp = case.network in MLPS
        if self.is_mlp:
            depth, width = MLPS[case.network]
            sizes = [case.size**2, *depth * [width]]
            pairs = [(nn.Linear(i, o), nn.Tanh()) for i, o in itertools.pairwise(sizes)]
            layers = [module for pair in pairs for module in pair]
            self.backbone = nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))
        else:
            self.backbone = torchvision.models.resnet18()
        if rule.startswith("biotorch"):
            from biotorch.module.biomodule import BioModule  # an extra

            with contextlib.redirect_stdout(io.StringIO()):  # it reports by print
                self.backbone = BioModule(self.backbone, mode=rule.split()[1])
        else:
            convert_feedback(self.backbone, rule)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, labels = batch["image"], batch["label"]
        if self.is_mlp:
            images, labels = images[:, :1], labels % 10
        logits = self.backbone((images.float() - 120) / 60)
        return {"loss_cls": F.cross_entropy(logits, labels)}


def _batch(cfg: CfgNode, case: Case) -> Any:
    """Random images with random labels or boxes, in the form that the model takes."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.size, case.size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(case.device)
    if "RetinaNet" not in cfg.MODEL.META_ARCHITECTURE:
        classes = cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES
        labels = torch.randint(0, classes, (case.batch,), generator=generator)
        return {"image": images, "label": labels.to(case.device)}
    batch = []
    for image in images:
        sides = torch.rand(BOXES, 2, generator=generator) * 0.5 + 0.1
        corners = torch.rand(BOXES, 2, generator=generator) * (1 - sides)
        instances = Instances((case.size, case.size))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], 1) * case.size)
        classes = cfg.MODEL.RETINANET.NUM_CLASSES
        instances.gt_classes = torch.randint(0, classes, (BOXES,), generator=generator)
        batch.append({"image": image, "instances": instances.to(case.device)})
    return batch


# Measuring ---------------------------------------------------------------------------------------


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the parameters, the buffers, the gradients and the optimiser's state."""
    tensors = [*model.buffers(), *model.parameters()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(step: Callable[[], Any], device: str = "cpu") -> int:
    """Return the most bytes that tensors take while ``step`` runs, beyond what they take after it.

    On the CPU, torch counts only while its profiler runs and does not know what was there before:
    if ``step`` frees that, the levels before are underestimated.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        step()
    # In the profiler's summaries, memory is that of an operation and has lost its order in time.
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak - level


def check_losses(losses: dict[str, float]) -> None:
    """
    Raises:
        RuntimeError: a loss is not finite, or not stock's.
    """
    for name, loss in losses.items():
        # bfloat16 has 8 bits, and a compiler may order sums otherwise.
        if not abs(loss - losses[STOCK]) <= 0.02 * abs(losses[STOCK]):
            raise RuntimeError(
                f"{name} computes the loss {loss}, stock {losses[STOCK]}: they are not the same "
                "network on the same batch, or the loss is not finite"
            )


def measure(case: Case, rules: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Time the step of each rule against stock's and count its memory.

    Returns:
        what json can write: the case, and for each contestant its name, seconds per step, the
        :class:`Ratio` of its time to stock's (and of BioTorch's to ours), and the bytes it takes
        beyond stock.
    """
    learns_by = {STOCK: "bp", CONTROL: "bp"} | {rule: rule for rule in rules}
    if args.biotorch and case.network in PLAIN:
        learns_by |= {(b := f"biotorch {BIOTORCH[rule]}"): b for rule in rules if rule in BIOTORCH}
    contestants = {name: Contestant(case, rule) for name, rule in learns_by.items()}
    check_losses({name: contestant.step().item() for name, contestant in contestants.items()})

    seconds = interleave(
        {name: contestant.step for name, contestant in contestants.items()},
        args.pairs,
        warm_up=args.warm_up,
        repeats=args.steps,
        device=case.device,
    )
    rows = []
    for name, contestant in contestants.items():
        peak = peak_bytes(contestant.step, case.device)
        state = state_bytes(contestant.model, contestant.optimizer)
        row = {
            "name": name,
            "ratio": ratio(seconds[name], seconds[STOCK]),
            "interval": median_interval(seconds[name], seconds[STOCK]),
            "seconds": statistics.median(seconds[name]),
            "state": state,
            "peak": state + peak,
        }
        ours = next((r for r, b in BIOTORCH.items() if name == f"biotorch {b}"), None)
        if ours is not None:
            row["ratio_to_ours"] = ratio(seconds[name], seconds[ours])
        rows.append(row)
    return {"case": case._asdict(), "pairs": args.pairs, "rows": rows}


# Report ------------------------------------------------------------------------------------------


def report(case: Case, measured: dict[str, Any], limits: dict[str, float]) -> None:
    """Print the table of one case."""
    stock, control = measured["rows"][:2]
    noisy = "   NOISY: counts for nothing, run it again" if control["ratio"].is_noise else ""
    print(f"\n{case}; {measured['pairs']} pairs{noisy}")
    rows = []
    for row in measured["rows"]:
        spread: Ratio = row["ratio"]
        shown = {
            "rule": row["name"],
            "time / stock": f"{spread.median:.3f}",
            "interval": "{:.3f} - {:.3f}".format(*row["interval"]),
            "quartiles": f"{spread.low:.3f} - {spread.high:.3f}",
            "ms": f"{1e3 * row['seconds']:.1f}",
            "state, MiB": f"{(row['state'] - stock['state']) / 2**20:+.1f}",
            "peak, MiB": f"{(row['peak'] - stock['peak']) / 2**20:+.1f}",
        }
        if "ratio_to_ours" in measured["rows"][-1]:
            to_ours = row.get("ratio_to_ours")
            shown["time / ours"] = f"{to_ours.median:.3f}" if to_ours else ""
        if limits:
            shown["promise"] = ""
        if (limit := limits.get(row["name"])) is not None:
            held = spread.median <= limit
            shown["promise"] = f"<= {limit:.2f} {'holds' if held else 'DOES NOT HOLD'}"
        rows.append(shown)
    print_table(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(NETWORKS)
    add("--networks", nargs="+", default=["resnet18"], choices=NETWORKS, metavar="NAME", help=names)
    add("--rules", nargs="+", default=list(LIMITS), help=f"default: {' '.join(LIMITS)}")
    modes = f"of {', '.join(MODES)}, or several at once as in bf16+compile"
    add("--modes", nargs="+", default=["float32"], help=modes)
    add("--batch", type=int, help="default: 16 for classifiers (perceptrons 128), 2 for RetinaNet")
    add("--size", type=int, help="pixels; default: 224 for classifiers (perceptrons 28), else 320")
    add("--pairs", type=int, default=30, help="turns (default: 30)")
    add("--steps", type=int, default=1, help="steps in one turn (default: 1)")
    add("--warm-up", type=int, default=3, help="turns before (default: 3)")
    add("--threads", type=int, help="torch's CPU threads (default: torch's own)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--biotorch", action="store_true", help="BioTorch's layers take part, in plain networks")
    add("--json", type=Path, help="write the figures to this file as well")
    add("--quick", action="store_true", help="ResNet-18, batch 8 at 128, 20 pairs")
    add("--promise", action="store_true", help="the promised cases, with limits")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.size, args.pairs = 8, 128, 20
    if args.pairs < 2:
        parser.error("--pairs: a median and quartiles need 2 at least")
    for mode in args.modes:
        if unknown := set(mode.split("+")) - set(MODES):
            parser.error(f"--modes: unknown {', '.join(unknown)}; choose of {', '.join(MODES)}")
    if args.biotorch and importlib.util.find_spec("biotorch") is None:
        parser.error("--biotorch: BioTorch is not there; pip install --no-deps biotorch==0.0.16")
    try:
        args.rules = [get_rule(rule).short_name or rule for rule in args.rules]
    except ValueError as error:
        parser.error(str(error))
    return args


def plan(args: argparse.Namespace) -> list[tuple[Case, dict[str, float]]]:
    """Return what is measured: cases, each with its limits."""
    cases = promises(args.device) if args.promise else []
    if args.biotorch and not MLPS.keys() & args.networks:
        sizes = [(args.batch, args.size)] if args.batch and args.size else [(16, 224), (8, 128)]
        cases += [(Case(PLAIN[-1], *size, device=args.device), {}) for size in sizes]
    if not cases:
        for network in args.networks:
            _, batch, size = NETWORKS[network]
            for mode in args.modes:
                case = Case(network, args.batch or batch, args.size or size, mode, args.device)
                cases.append((case, {}))
    return cases


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {"hardware": hardware(), "threads": torch.get_num_threads(), "measurements": []}
    print(f"{result['hardware']}; {result['threads']} threads")
    for case, limits in plan(args):
        measured = measure(case, args.rules, args)
        report(case, measured, limits)
        result["measurements"].append(measured)
        write_json(args.json, result)


if __name__ == "__main__":
    main()
