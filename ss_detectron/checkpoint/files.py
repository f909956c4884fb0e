"""The files of a run's checkpoints: written atomically, verified, and found again."""

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = [
    "BEST",
    "NeedsPickleError",
    "archive_previous_run",
    "atomic_write",
    "find_checkpoints",
    "has_checkpoint",
    "is_checkpoint_name",
    "last_checkpoint",
    "read_checkpoint",
]

_NUMBERED = re.compile(r"model_(\d{7,})\.pth")
_FINAL = "model_final.pth"
BEST = "model_best.pth"


class NeedsPickleError(ValueError):
    """A file cannot be read without running the code in it, if it is a checkpoint at all."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} has to be unpickled ({why}), which runs the code in it")
        self.why = why


@contextmanager
def atomic_write(target: str) -> Iterator[BinaryIO]:
    """
    Open a file that becomes ``target`` in one step once all of it is on the disk. After an error,
    or if the process is killed, ``target`` is what it was before.
    """
    unfinished = f"{target}.new"
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        with suppress(OSError):  # the error before it is the one to tell
            os.remove(unfinished)
        raise


def read_checkpoint(path: str) -> dict[str, Any]:
    """
    Read a checkpoint onto the CPU. No code in it runs (torch.load's ``weights_only``), and its
    checksums are compared: torch.load alone does not notice that a byte of a weight has changed.

    Args:
        path: of a file that torch.save has written.

    Raises:
        OSError: it is not there, or the disk fails.
        NeedsPickleError: it holds objects, or is no checkpoint.
        ValueError: it is empty, truncated or damaged, or holds no dictionary.
    """
    try:
        if zipfile.is_zipfile(path):  # what torch writes since 1.6
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of its part {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds {held[1]}" if held else "if it is a checkpoint at all"
        raise NeedsPickleError(path, why) from error
    except Exception as error:  # any kind: the file may hold anything
        size = os.path.getsize(path)
        raise ValueError(
            f"{path} ({size:,} bytes) is truncated, damaged or no checkpoint: {error}"[:500]
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def last_checkpoint(folder: str) -> str | None:
    """Return the file in ``folder`` that its ``last_checkpoint`` names; None if it names none."""
    try:
        name = Path(folder, "last_checkpoint").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    named = name.endswith(".pth") and os.path.basename(name) == name
    return os.path.join(folder, name) if named else None


def find_checkpoints(folder: str) -> list[str]:
    """
    List the files that the run in ``folder`` can go on from, best first: the one that
    ``last_checkpoint`` names, be it there or not, then those of fewer iterations. Where it names
    none, these are all there are.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = sorted(filter(_NUMBERED.fullmatch, names), key=lambda n: (len(n), n), reverse=True)
    last = os.path.basename(last_checkpoint(folder) or "")
    if last in found:
        found = found[found.index(last) :]
    elif last:
        found = [last, *found]
    elif _FINAL in names:
        found = [*found, _FINAL]  # its name does not tell whether it is the latest
    return [os.path.join(folder, name) for name in found]


def has_checkpoint(folder: str) -> bool:
    """Return whether a resumed run is to go on from something in ``folder``, in order or not."""
    return os.path.exists(os.path.join(folder, "last_checkpoint")) or bool(find_checkpoints(folder))


def is_checkpoint_name(name: str) -> bool:
    """Return whether a run may write a file of this name in its OUTPUT_DIR, and read it again."""
    return name in (_FINAL, BEST, "last_checkpoint") or bool(_NUMBERED.fullmatch(name))


def archive_previous_run(folder: str) -> str | None:
    """
    Move what an earlier run has left in ``folder`` to ``earlier_run_N`` in it: its checkpoints,
    from which a new run would be resumed, and its metrics and evaluation results, which would be
    reported as the new run's; and with them its configs. To be called before the new run writes any
    of that.

    Returns:
        that folder; None if there is nothing to move.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if is_checkpoint_name(name) or name == "inference"]
    metrics = os.path.join(folder, "metrics.json")
    has_metrics = os.path.isfile(metrics) and os.path.getsize(metrics) > 0
    if not names and not has_metrics:
        return None
    numbered = (os.path.join(folder, f"earlier_run_{number}") for number in count(1))
    archive = next(path for path in numbered if not os.path.exists(path))
    os.mkdir(archive)
    for name in (*names, "config.yaml", "eval_config.yaml"):
        with suppress(FileNotFoundError):
            os.replace(os.path.join(folder, name), os.path.join(archive, name))
    if has_metrics:
        # Copied and emptied: the new run's writer has it open already, to append to it.
        shutil.copy2(metrics, archive)
        os.truncate(metrics, 0)
    return archive
