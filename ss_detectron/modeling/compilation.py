"""Compilation (torch.compile) of the parts of a model that do its arithmetic."""

import logging
import os
import shutil
import sys
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["check_compiler", "compile_parts"]

logger = logging.getLogger(__name__)

PARTS = ("backbone", "head")
"""The modules of a meta-architecture that are compiled; each becomes one graph."""

_GRAPHS_PER_PART = 32


def compile_parts(model: nn.Module, backend: str | Callable = "inductor") -> list[str]:
    """
    Compile ``model.backbone`` and, where there is one, ``model.head``, in place: classes, names
    and state-dict keys stay. The compiler runs when a part is first called. A copy of the model is
    not compiled.

    What is around the parts (image normalisation, anchors, losses and their log, label checks)
    stays as it is: a compiler would start anew for every value that is logged. A part is compiled
    for training and for inference, and again, for any size, when a second image size comes.

    Args:
        model: a Detectron2 model, before DistributedDataParallel wraps it.
        backend: torch.compile's.

    Returns:
        the names of what is compiled.

    Raises:
        ValueError: the model has no such part.
    """
    names = [name for name in PARTS if isinstance(getattr(model, name, None), nn.Module)]
    if not names:
        raise ValueError(
            f"MODEL.COMPILED is True, but {type(model).__name__} has no {' and no '.join(PARTS)} "
            "that could be compiled: set MODEL.COMPILED False, or call compile() on its modules"
        )
    # With more graphs than this, a part is run uncompiled, with a warning; 8 are soon used up by
    # small images of many sizes.
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _GRAPHS_PER_PART)
    for name in names:
        model.get_submodule(name).compile(backend=backend)
    parts = " and ".join(names)
    logger.info("MODEL.COMPILED: the model's %s will be compiled when first called.", parts)
    return names


def check_compiler() -> None:
    """Raise ValueError where there is no C++ compiler, which torch.compile needs on the CPU."""
    command = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if shutil.which(command) is None:
        raise ValueError(
            f"MODEL.COMPILED needs a C++ compiler on the CPU, and there is no {command!r} here: "
            "install one, name it in the environment variable CXX, or set the key False"
        )
