"""Image classification over any Detectron2 backbone."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, ResNet, build_backbone
from torch import Tensor, nn

from ss_detectron.layers import check_exclude, convert_part

from .feedback import common_options, feedback_config

__all__ = ["ImageClassifier"]

Batch = dict[str, Any] | list[dict[str, Any]]


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """
    Classify images by a backbone, global average pooling where its output is a map, and a linear
    layer that follows MODEL.FEEDBACK.LAST_LAYER_RULE.

    Attributes:
        train_metrics: what the last training batch gave besides its losses, name -> number on the
            device; :class:`~ss_detectron.engine.Trainer` logs it.
    """

    last_layers: ClassVar[tuple[str, ...]] = ("linear",)

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        in_feature: str = "",
        init: str = "torch",
        pixel_mean: Iterable[float],
        pixel_std: Iterable[float],
        last_layer_rule: str = "backpropagation",
        scale: str = "mean_abs",
        gain: float = 1.0,
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        """
        Args:
            backbone: whose output is a map (N, C, H, W) or a vector (N, C) per image.
            num_classes: of the images.
            in_feature: which of the backbone's outputs; by default the last.
            init: of the linear layer: "torch" as nn.Linear's, or "xavier", Glorot's uniform weights
                and biases of 0.
            pixel_mean, pixel_std: per channel, in units of the pixels (0 to 255).
            last_layer_rule: of the linear layer.
            scale, gain, seed: see :func:`~ss_detectron.layers.convert_feedback`.
            exclude: patterns of names in this model.

        Raises:
            ValueError: the backbone has no such output, or a pattern of ``exclude`` matches no
                layer.
        """
        super().__init__()
        shapes = backbone.output_shape()
        in_feature = in_feature or list(shapes)[-1]
        if in_feature not in shapes:
            raise ValueError(
                f"MODEL.IMAGE_CLASSIFIER.IN_FEATURE is {in_feature!r}, but the backbone's outputs "
                f"are {', '.join(shapes)}"
            )
        self.backbone = backbone
        self.in_feature = in_feature
        self.num_classes = num_classes
        self.linear = nn.Linear(shapes[in_feature].channels, num_classes)
        if init not in ("torch", "xavier"):
            raise ValueError(f"MODEL.IMAGE_CLASSIFIER.INIT is {init!r}; choose 'torch' or 'xavier'")
        if init == "xavier":
            nn.init.xavier_uniform_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        self.train_metrics: dict[str, Tensor] = {}
        options = {"scale": scale, "gain": gain, "exclude": exclude, "seed": seed}
        overrides = {"linear": last_layer_rule}  # so that a report says why
        convert_part(self.linear, last_layer_rule, prefix="linear", overrides=overrides, **options)
        check_exclude(self, exclude)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        feedback = feedback_config(cfg, cls.__name__)
        return {
            "backbone": build_backbone(cfg),
            "num_classes": cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES,
            "in_feature": cfg.MODEL.IMAGE_CLASSIFIER.IN_FEATURE,
            "init": cfg.MODEL.IMAGE_CLASSIFIER.INIT,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "last_layer_rule": feedback.LAST_LAYER_RULE,
            **common_options(cfg),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batch: Batch) -> Batch:
        """
        Args:
            batch: {"image": (N, C, H, W), "label": (N,)} or Detectron2's list of
                {"image": (C, H, W), "label": int}. Images are not normalised yet (0 to 255); only
                training needs labels.

        Returns:
            in training {"loss_cls": the mean cross entropy}; in inference the classes'
            probabilities, as {"probabilities": (N, num_classes)} or a list of
            {"probabilities": (num_classes,)}, as ``batch`` is.

        Raises:
            ValueError: images of different sizes in one list, or a label out of range.
        """
        as_list = not isinstance(batch, dict)
        stacked = _stack(batch) if as_list else batch
        if self.training:
            return self.losses(self.logits(stacked["image"]), self._labels(stacked))
        if len(stacked["image"]):
            probabilities = self.logits(stacked["image"]).float().softmax(1)
        else:  # nothing in this batch could be read
            probabilities = torch.empty(0, self.num_classes, device=self.device)
        if as_list:
            return [{"probabilities": row} for row in probabilities]
        return {"probabilities": probabilities}

    def logits(self, images: Tensor) -> Tensor:
        """Return (N, num_classes) for (N, C, H, W), pixels from 0 to 255."""
        images = images.to(self.device, non_blocking=True).to(self.pixel_mean.dtype)
        features = self.backbone((images - self.pixel_mean) / self.pixel_std)[self.in_feature]
        if features.dim() == 4:
            features = F.adaptive_avg_pool2d(features, 1).flatten(1)
        return self.linear(features)

    def learner_blocks(self) -> list[nn.Module]:
        """
        Return the blocks that a learner tells apart: the backbone's, by its own
        ``learner_blocks()`` or a ResNet's stem and blocks, and the linear layer.

        Raises:
            ValueError: the backbone does not say what its blocks are.
        """
        backbone = self.backbone
        if hasattr(backbone, "learner_blocks"):
            blocks = backbone.learner_blocks()
        elif isinstance(backbone, ResNet):
            blocks = [backbone.stem, *(block for stage in backbone.stages for block in stage)]
        else:
            raise ValueError(
                f"MODEL.LEARNER.NAME needs a backbone of blocks, a ResNet or one with "
                f"learner_blocks(); {type(backbone).__name__} is none"
            )
        return [*blocks, self.linear]

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """
        Return the mean cross entropy of (N, num_classes) with labels (N,). The batch's top-1 error
        in per cent is in ``train_metrics``: to look at it here would make a GPU wait.
        """
        wrong = (logits.detach().argmax(1) != labels).float().mean()
        self.train_metrics = {"train_top1_error": 100 * wrong}
        return {"loss_cls": F.cross_entropy(logits, labels)}

    def _labels(self, batch: dict[str, Any]) -> Tensor:
        labels = batch["label"]
        if labels.device.type == "cpu":  # on a GPU, looking would make it wait
            for i, label in enumerate(labels.tolist()):
                if not 0 <= label < self.num_classes:
                    name = batch["file_name"][i] if "file_name" in batch else f"image {i}"
                    raise ValueError(
                        f"{name} has the label {label}, but the model has {self.num_classes} "
                        f"classes, 0 to {self.num_classes - 1} (MODEL.IMAGE_CLASSIFIER.NUM_CLASSES)"
                    )
        return labels.to(self.device, non_blocking=True)


def _stack(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Return Detectron2's list of dicts as one batch."""
    sizes = {tuple(entry["image"].shape) for entry in batch}
    if len(sizes) > 1:
        raise ValueError(
            f"a batch needs images of one shape, not {sorted(sizes)}: crop them, as "
            "INPUT.CLASSIFICATION.TRANSFORM does"
        )
    images = [entry["image"] for entry in batch]
    stacked = {"image": torch.stack(images) if images else torch.empty(0)}
    if batch and all("label" in entry for entry in batch):
        stacked["label"] = torch.tensor([int(entry["label"]) for entry in batch])
        stacked["file_name"] = [e.get("file_name", f"image {i}") for i, e in enumerate(batch)]
    return stacked
