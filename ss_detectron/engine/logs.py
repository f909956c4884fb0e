"""What a run says on the terminal, and in full in OUTPUT_DIR/log.txt."""

import logging
import os
import re
import sys
import warnings

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

__all__ = ["set_up_logging"]

logger = logging.getLogger(__name__)

# For the file alone: what Detectron2 says of its own working. It maps any ids of categories. An
# exception is said at the end.
_DETAILS = (
    "Exception during training:",
    "Category ids in annotations are not in",
    "Making batched data loader",
    "Removed 0 images",
    "Serializ",
    "Using training sampler",
    "[DatasetMapper] Augmentations",
    "[DetectionCheckpointer] Loading from  ...",
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Of torch, of what Detectron2 does, in every process; the last is told by set_up_logging.
_IGNORED = ("torch.meshgrid", "`broadcast_buffers` is deprecated", "This DataLoader will create")


def set_up_logging(cfg: CfgNode) -> None:
    """
    Have this package, Detectron2 and fvcore log to the terminal, on the main rank, and with their
    details and without colours to OUTPUT_DIR/log.txt (log.txt.rankN).
    """
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "ss_detectron"):
        for handler in setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name).handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.INFO)
                handler.addFilter(_is_news)
            elif handler.formatter:
                handler.setFormatter(_Plain(handler.formatter._fmt, handler.formatter.datefmt))
    for message in _IGNORED:
        warnings.filterwarnings("ignore", message)
    # Of environments that torch was not built for; no run needs its extensions.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers, processes = cfg.DATALOADER.NUM_WORKERS, comm.get_local_size()
    if workers * processes > cores and comm.is_main_process():
        logger.info(
            "DATALOADER.NUM_WORKERS is %d in %d processes each, on %d cores: fewer may be faster.",
            workers,
            processes,
            cores,
        )


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(_DETAILS)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", super().format(record))
