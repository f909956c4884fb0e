"""The weights of anyone's checkpoint: where they are, and how their names become a model's."""

import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock, DeformBottleneckBlock
from torch import Tensor, nn

from ss_detectron.utils.text import abbreviate

__all__ = [
    "check_torchvision_resnet",
    "find_renaming",
    "find_unwrapping",
    "find_weights",
    "is_torchvision_resnet",
    "name_ends",
    "rename_state",
]

logger = logging.getLogger(__name__)

# Where trainers put a network's weights, Detectron2's first; averages where there are no others.
_PLACES = "model", "state_dict", "model_state_dict", "net", "network", "ema", "model_ema"
_PLACES += ("checkpoint",)
# What DataParallel, torch.compile, FSDP and activation checkpointing put into names, anywhere.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Those of CIFAR-10's trainers call some parts otherwise. What is no body is a head, of any names.
_TORCHVISION_RESNET = re.compile(
    r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|(downsample|shortcut)\.[01]))\.\w+"
    r"|(?!(conv|bn|layer)\d).*"
)
# What becomes of them in Detectron2's, one after the other.
_TORCHVISION_TO_DETECTRON2 = (
    (r"^conv1\b", "stem.conv1"),
    (r"^bn1\b", "stem.conv1.norm"),
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"\.bn(\d)\b", r".conv\1.norm"),
    (r"\.(downsample|shortcut)\.0\b", ".shortcut"),
    (r"\.(downsample|shortcut)\.1\b", ".shortcut.norm"),
)
# Of a pixel from 0 to 255, in RGB.
_TORCHVISION_PIXELS = {
    "PIXEL_MEAN": [123.675, 116.28, 103.53],
    "PIXEL_STD": [58.395, 57.12, 57.375],
}


def find_weights(path: str, content: Any) -> dict[str, Any]:
    """
    Return a checkpoint with its weights as "model", as Detectron2's have them, whoever wrote it:
    {"state_dict": ..., "epoch": ...}, {"net": ..., "acc": ...}, a state dict alone and the like.

    Args:
        path: for messages.
        content: of the file.

    Raises:
        ValueError: no weights are found, or several networks'; names what is there.
    """
    place, state = _find_state(content)
    if place == "model":
        return {**content, "model": state}
    if state is None:
        held = (f"{key} ({type(value).__name__})" for key, value in content.items())
        raise ValueError(
            f"{path} has no weights of one network where they are looked for: it holds "
            f"{abbreviate(held, 8)}. Save them alone: torch.save(model.state_dict(), 'weights.pth')"
        )
    if place:
        others = abbreviate([str(key) for key in content if key != place.partition(".")[0]])
        logger.info("%s: the weights are its %r; not read: %s.", path, place, others or "nothing")
    return {"model": state}


def _find_state(content: Any) -> tuple[str, Mapping[str, Any] | None]:
    """The weights in a checkpoint's content, and the keys that lead there."""
    if isinstance(content, nn.Module):  # of a file that is trusted to be unpickled
        content = content.state_dict()
    if not isinstance(content, Mapping) or not content:
        return "", None
    if _is_state(content):
        return "", content
    for key in _PLACES:
        place, state = _find_state(content.get(key))
        if state is not None:
            return f"{key}.{place}".rstrip("."), state
    states = [str(key) for key, value in content.items() if _is_state(value)]
    return (states[0], content[states[0]]) if len(states) == 1 else ("", None)


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(
            isinstance(name, str)
            and (isinstance(value, (Tensor, np.ndarray)) or name.endswith("_extra_state"))
            for name, value in content.items()
        )
    )


def find_unwrapping(names: Collection[str], model_names: Collection[str]) -> Callable[[str], str]:
    """
    Find what the names of a checkpoint's parameters and modules are without what wrappers have put
    before and into them ("module.", "_orig_mod.") and a model does not have, nor what a trainer's
    own module calls the network ("model.", "encoder_q."): of what a third of the names or more
    begin with, that without which most are names of the model; else of what all begin with, that
    without which most are the ends of such.
    """
    wrappers = _WRAPPERS.difference(*(name.split(".") for name in model_names))

    def unwrapped(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in wrappers)

    inner = [unwrapped(name) for name in names]
    shared = Counter(name[: dot.end()] for name in inner for dot in re.finditer(r"\.", name))
    ends = name_ends(model_names)

    def known(prefix: str) -> tuple[int, int]:
        rest = [name.removeprefix(prefix) for name in inner if name.startswith(prefix)]
        rename = find_renaming(rest, model_names)
        whole = sum(rename(name) in model_names for name in rest)
        if prefix and 2 * whole < len(rest):
            whole = 0  # by chance
        return whole, sum(name in ends for name in rest) if len(rest) == len(inner) else 0

    # The first of several such as encoder_q and encoder_k is the one that learned.
    outer = max(["", *(p for p, count in shared.items() if 3 * count >= len(inner))], key=known)
    return lambda name: unwrapped(name).removeprefix(outer)


def name_ends(names: Iterable[str]) -> set[str]:
    """Return what the names of parameters end with, "b.weight" of "a.b.weight"; they as well."""
    return {name[i:] for name in names for i in (0, *(d.end() for d in re.finditer(r"\.", name)))}


def find_renaming(names: Collection[str], model_names: Collection[str]) -> Callable[[str], str]:
    """
    Find what the names of a checkpoint's parameters and modules become in a model: those of
    torchvision's ResNets Detectron2's, a classifier's ``backbone.X`` a detector's
    ``backbone.bottom_up.X``. Where neither is called for, they stay.
    """
    stems = [name for name in model_names if re.fullmatch(r"(.*\.)?stem\.conv1\.weight", name)]
    if stems and is_torchvision_resnet(names):
        resnet = stems[0].removesuffix("stem.conv1.weight")

        def from_torchvision(name: str) -> str:
            if not re.match(r"(conv1|bn1|layer\d)\b", name):
                return re.sub(r"^fc(?=(\.(weight|bias))?$)", "linear", name)
            for pattern, replacement in _TORCHVISION_TO_DETECTRON2:
                name = re.sub(pattern, replacement, name)
            return resnet + name

        return from_torchvision
    backbone = [name for name in names if name.startswith("backbone.")]
    inside = "backbone.bottom_up."
    fits = any(name.startswith(inside) or name in model_names for name in backbone)
    if not fits and any(name.startswith(inside) for name in model_names):
        return lambda name: re.sub(r"^backbone\b", "backbone.bottom_up", name)
    return lambda name: name


def rename_state(
    state: Mapping[str, Tensor], rename: Callable[[str], str]
) -> OrderedDict[str, Tensor]:
    """Rename a state dict's tensors; its modules' versions, if it has them, come along."""
    renamed = OrderedDict((rename(name), value) for name, value in state.items())
    if hasattr(state, "_metadata"):
        renamed._metadata = OrderedDict(
            (rename(name) if name else name, value) for name, value in state._metadata.items()
        )
    return renamed


def is_torchvision_resnet(names: Collection[str]) -> bool:
    """Return whether these are the names of a state dict of torchvision's ResNets."""
    return "layer1.0.conv1.weight" in names and all(map(_TORCHVISION_RESNET.fullmatch, names))


def check_torchvision_resnet(path: str, model: nn.Module) -> None:
    """
    Log what torchvision's ResNet weights expect of a model, as a warning where the model
    normalises its images otherwise.

    Raises:
        ValueError: the model's bottleneck blocks have their stride in another convolution, which
            shows in no weight's shape.
    """
    blocks = [m for m in model.modules() if isinstance(m, (BottleneckBlock, DeformBottleneckBlock))]
    if any(max(block.conv1.stride) > 1 for block in blocks):
        raise ValueError(
            f"{path} holds a ResNet of torchvision's, whose blocks have their stride in the 3x3 "
            "convolution, not in the first 1x1: set MODEL.RESNETS.STRIDE_IN_1X1 False"
        )
    differs = ""
    for key, value in _TORCHVISION_PIXELS.items():
        here = getattr(model, key.lower(), torch.tensor(value)).cpu().flatten()
        if not torch.allclose(here, torch.tensor(value), rtol=0, atol=0.05):  # rounded in configs
            differs += f"; this model has {key} {here.tolist()}"
    logger.log(
        logging.WARNING if differs else logging.INFO,
        "%s holds a ResNet of torchvision's, which expects INPUT.FORMAT RGB, %s%s.",
        path,
        ", ".join(f"{key} {value}" for key, value in _TORCHVISION_PIXELS.items()),
        differs,
    )
