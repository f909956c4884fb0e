"""From a model with asymmetric feedback to what stock tools read: feedback is for training only."""

from . import _detectron2  # noqa: F401, first

# isort: split
import re
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, RetinaNet
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.export import ExportedProgram

from ss_detectron.layers import convert_feedback
from ss_detectron.modeling import RETINANET_HEAD_REGISTRY, FeedbackRetinaNet, ImageClassifier

__all__ = [
    "ClassifierLogits",
    "DenseRetinaNet",
    "export_program",
    "plain_config",
    "plain_state_dict",
]


def plain_config(cfg: CfgNode) -> CfgNode:
    """
    Return the same model's config for stock Detectron2: no key of this package, stock builders.

    Raises:
        ValueError: the meta-architecture, backbone or head has no stock counterpart.
    """
    plain, source = get_cfg(), cfg.clone()
    source.defrost()
    model = source.MODEL
    if FeedbackRetinaNet.__name__ == model.META_ARCHITECTURE:
        _check_known("head", RETINANET_HEAD_REGISTRY, model.RETINANET.HEAD, __package__)
        model.META_ARCHITECTURE = RetinaNet.__name__
    model.BACKBONE.NAME = re.sub(r"^build_(ss|fa|feedback)_", "build_", model.BACKBONE.NAME)
    _check_known("meta-architecture", META_ARCH_REGISTRY, model.META_ARCHITECTURE)
    _check_known("backbone", BACKBONE_REGISTRY, model.BACKBONE.NAME)
    _drop_unknown(source, plain)
    plain.merge_from_other_cfg(source)
    return plain


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """
    Convert ``model`` back to backpropagation, in place, and return its stock state dict: of an
    :class:`~ss_detectron.modeling.ImageClassifier` on a ResNet, that of Detectron2's own ResNet
    with ``num_classes``, as there is no stock classifier.
    """
    state = convert_feedback(model, "backpropagation").state_dict()
    if isinstance(model, ImageClassifier):
        return {name.removeprefix("backbone."): value for name, value in state.items()}
    return state


class ClassifierLogits(nn.Module):
    """
    An :class:`~ss_detectron.modeling.ImageClassifier` as a function of tensors alone.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W), 0 to 255, channels as INPUT.FORMAT -> class logits (N, num_classes)."""
        return self.model.logits(images)


class DenseRetinaNet(nn.Module):
    """
    What of a RetinaNet a static program can hold: everything before boxes are decoded and chosen.

    Args:
        model: a RetinaNet in eval mode.
    """

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            image: (N, 3, H, W), 0 to 255, channels as INPUT.FORMAT; H and W are multiples of the
                backbone's size divisibility.

        Returns:
            per pyramid level, the class logits (N, A * K, H_l, W_l) and the box deltas
            (N, A * 4, H_l, W_l), for A anchors and K classes.
        """
        features = self.model.backbone((image - self.model.pixel_mean) / self.model.pixel_std)
        return self.model.head([features[name] for name in self.model.head_in_features])


def export_program(model: nn.Module, size: Sequence[int]) -> ExportedProgram:
    """
    Export what a static program can hold of a model in eval mode: :class:`DenseRetinaNet` for one
    image, or :class:`ClassifierLogits` for any number.

    Args:
        size: height and width of its images; a RetinaNet's are rounded up to what the backbone
            divides.

    Raises:
        ValueError: the model is neither a RetinaNet nor an ImageClassifier.
    """
    number, shapes = 1, None
    if isinstance(model, ImageClassifier):
        # Of a batch of one, torch would make a program of one.
        number, shapes = 2, ({0: torch.export.Dim("number")},)
        function: nn.Module = ClassifierLogits(model)
    elif isinstance(model, RetinaNet):
        divisor = max(model.backbone.size_divisibility, 1)
        size = [-(-side // divisor) * divisor for side in size]
        function = DenseRetinaNet(model)
    else:
        kind = type(model).__name__
        raise ValueError(f"a program is made of a RetinaNet or an ImageClassifier, not of {kind}")
    images = torch.zeros(number, len(model.pixel_mean), *size)
    with torch.no_grad():
        return torch.export.export(function, (images,), dynamic_shapes=shapes, strict=False)


def _check_known(what: str, registry: Registry, name: str, *packages: str) -> None:
    """Raise ValueError unless Detectron2, or one of these packages, registered ``name``."""
    if registry.get(name).__module__.partition(".")[0] not in ("detectron2", *packages):
        raise ValueError(f"stock Detectron2 has no counterpart of the {what} {name!r}")


def _drop_unknown(node: CfgNode, known: CfgNode) -> None:
    """Remove from ``node`` the keys that ``known`` has not."""
    for key in list(node):
        if key not in known:
            del node[key]
        elif isinstance(node[key], CfgNode):
            _drop_unknown(node[key], known[key])
