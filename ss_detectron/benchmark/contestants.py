"""The networks that are timed: those of this package's configs, as users train them."""

import contextlib
import io
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ss_detectron.config import add_ss_config, merge_config_file
from ss_detectron.engine.defaults import Trainer
from ss_detectron.layers import AsymmetricLayer, convert_feedback, get_rule
from ss_detectron.modeling.compilation import compile_parts
from ss_detectron.solver.build import build_optimizer

__all__ = ["BIOTORCH_MODES", "MODES", "NETWORKS", "Case", "Contestant", "Network"]


class Network(NamedTuple):
    """A network and the batch that it is timed on unless told otherwise."""

    config: str
    batch: int
    size: int
    """Height and width of the images in pixels."""


NETWORKS = {
    "resnet18": Network("imagenet_resnet18_bp.yaml", 16, 224),
    "resnet50": Network("imagenet_resnet50_bp.yaml", 16, 224),
    "alexnet": Network("imagenet_alexnet_bp.yaml", 16, 224),
    "retinanet_r18": Network("retinanet_R_18_bp.yaml", 2, 320),
    "retinanet_r50": Network("retinanet_R_50_bp.yaml", 2, 320),
    # torchvision's own, every layer of it converted, as BioTorch converts it.
    "torchvision_resnet18": Network("imagenet_resnet18_bp.yaml", 16, 224),
}

MODES = ("float32", "bf16", "channels_last", "compile")
"""Several at once are joined by "+": bf16+channels_last."""

BIOTORCH_MODES = {"ss": "usf", "frsf": "frsf", "brsf": "brsf", "fa": "fa"}
"""Short name of a rule -> BioTorch's."""

BOXES = 7  # per image, as in COCO


class Case(NamedTuple):
    """What is timed: a network, on which batch, and how it is computed."""

    network: str
    batch: int
    size: int
    mode: str = "float32"
    device: str = "cpu"
    scale: str = "mean_abs"

    def __str__(self) -> str:
        images = f"batch {self.batch} at {self.size}"
        return f"{self.network}, {images}, {self.mode}, {self.device}, scale {self.scale}"

    def check(self) -> None:
        """
        Raises:
            ValueError: an unknown network or mode.
        """
        if self.network not in NETWORKS:
            raise ValueError(f"unknown network {self.network!r}; choose of {', '.join(NETWORKS)}")
        for mode in self.mode.split("+"):
            if mode not in MODES:
                raise ValueError(f"unknown mode {mode!r}; choose of {', '.join(MODES)}")

    def uses(self, mode: str) -> bool:
        return mode in self.mode.split("+")


class Contestant:
    """
    A network with its optimiser, that takes training steps on one batch.

    The learning rate is zero, which spares the optimiser nothing: the weights stay as they were
    drawn, the same for every rule, so that all contestants compute the same loss in every step.

    Args:
        case: the network and its batch.
        rule: of all layers but the last ones, or "biotorch MODE" for BioTorch's layers.

    Raises:
        ValueError: an unknown network, mode or rule, or BioTorch on a network of Detectron2's,
            whose layers it does not know.
        ModuleNotFoundError: BioTorch is not there.
    """

    def __init__(self, case: Case, rule: str = "backpropagation") -> None:
        case.check()
        cfg = _config(case, rule)
        torch.manual_seed(0)
        if case.network.startswith("torchvision"):
            self.model = _torchvision_model(cfg, rule)
        else:
            self.model = Trainer.build_model(cfg)
        self.model.train()
        self.optimizer = build_optimizer(cfg, self.model)
        self.device = torch.device(case.device)
        self.batch = _batch(cfg, case)
        self.autocast = case.uses("bf16")

    @property
    def converted(self) -> list[AsymmetricLayer]:
        return [m for m in self.model.modules() if isinstance(m, AsymmetricLayer)]

    def step(self) -> Tensor:
        """One training step; the loss."""
        self.optimizer.zero_grad()
        with (
            EventStorage(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast),
        ):
            loss = sum(self.model(self.batch).values())
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def _config(case: Case, rule: str) -> CfgNode:
    cfg = get_cfg()
    add_ss_config(cfg)
    merge_config_file(cfg, NETWORKS[case.network].config)
    cfg.MODEL.DEVICE = case.device
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.CHANNELS_LAST = case.uses("channels_last")
    cfg.MODEL.COMPILED = case.uses("compile")
    cfg.MODEL.FEEDBACK.SCALE = case.scale
    if rule.startswith("biotorch"):
        if not case.network.startswith("torchvision"):
            raise ValueError(
                f"{rule}: {case.network} has layers of Detectron2's, which BioTorch does not know; "
                "take torchvision_resnet18"
            )
    else:
        cfg.MODEL.FEEDBACK.RULE = get_rule(rule).name
    cfg.SOLVER.BASE_LR = 1e-20  # which no weight notices
    return cfg


def _torchvision_model(cfg: CfgNode, rule: str) -> nn.Module:
    """As Trainer.build_model gives those of this package's configs."""
    model = _TorchvisionClassifier(rule, cfg.MODEL.FEEDBACK.SCALE).to(cfg.MODEL.DEVICE)
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if cfg.MODEL.COMPILED:
        compile_parts(model)
    return model


def _batch(cfg: CfgNode, case: Case) -> Any:
    """Random images with random labels or boxes, in the form that the model takes."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.size, case.size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    images = images.to(case.device)
    if "RetinaNet" not in cfg.MODEL.META_ARCHITECTURE:
        labels = torch.randint(
            0, cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES, (case.batch,), generator=generator
        )
        return {"image": images, "label": labels.to(case.device)}
    batch = []
    for image in images:
        sides = torch.rand(BOXES, 2, generator=generator) * 0.5 + 0.1
        corners = torch.rand(BOXES, 2, generator=generator) * (1 - sides)
        instances = Instances((case.size, case.size))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], 1) * case.size)
        instances.gt_classes = torch.randint(
            0, cfg.MODEL.RETINANET.NUM_CLASSES, (BOXES,), generator=generator
        )
        batch.append({"image": image, "instances": instances.to(case.device)})
    return batch


class _TorchvisionClassifier(nn.Module):
    """torchvision's ResNet-18, all layers converted, with the normalisation and the loss."""

    def __init__(self, rule: str, scale: str) -> None:
        super().__init__()
        net = torchvision.models.resnet18()
        if rule.startswith("biotorch"):
            self.backbone = _to_biotorch(net, rule.removeprefix("biotorch "))
        else:
            self.backbone = convert_feedback(net, rule, scale=scale)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.backbone((batch["image"].float() - 120) / 60)
        return {"loss_cls": F.cross_entropy(logits, batch["label"])}


def _to_biotorch(net: nn.Module, mode: str) -> nn.Module:
    from biotorch.module.biomodule import BioModule  # an extra

    with contextlib.redirect_stdout(io.StringIO()):  # it reports by print
        return BioModule(net, mode=mode)
