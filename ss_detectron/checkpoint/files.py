"""The files of a run's checkpoints: written whole or not at all, verified, and found again."""

import errno
import logging
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = [
    "NeedsPickleError",
    "find_checkpoints",
    "has_checkpoint",
    "is_checkpoint_name",
    "last_checkpoint",
    "read_checkpoint",
    "remove_partial_files",
    "archive_previous_run",
    "atomic_write",
]

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"model_(\d{7,})\.pth")
_FINAL = "model_final.pth"
_BEST = "model_best.pth"


class NeedsPickleError(ValueError):
    """A file cannot be read without running the code in it, if it is a checkpoint at all."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} has to be unpickled ({why}), which runs the code in it")
        self.why = why


@contextmanager
def atomic_write(target: str) -> Iterator[BinaryIO]:
    """
    A file to write to that becomes ``target`` in one step once all of it is on the disk: a run may
    be killed, or its machine fail, at any time. After an error, ``target`` is what it was.
    """
    new = target + ".new"
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
    except BaseException:
        with suppress(OSError):  # the error before it is the one to tell
            os.remove(new)
        raise
    _sync_names(os.path.dirname(target) or ".")


def remove_partial_files(folder: str) -> None:
    """Removes what a run that was killed had begun to write; only for the one that writes now."""
    for path in Path(folder).glob("*.pth.new"):
        path.unlink(missing_ok=True)


def _sync_names(folder: str) -> None:
    """Puts on the disk what the files of a folder are called."""
    if os.name != "posix":  # there is no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of some network file systems
            raise
    finally:
        os.close(descriptor)


def read_checkpoint(path: str, *, mmap: bool = False) -> dict[str, Any]:
    """
    What a checkpoint holds, on the CPU. No code in it runs (torch.load's ``weights_only``), and its
    checksums are compared: torch.load alone does not notice that a byte of a weight has changed.

    Args:
        path: of a file that torch.save has written.
        mmap: tensors stay in the file until they are used.

    Raises:
        OSError: it is not there, or the disk fails.
        NeedsPickleError: it holds objects, or is no checkpoint.
        ValueError: it is empty, truncated or damaged, or holds no dictionary.
    """
    zipped = _check_whole(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise NeedsPickleError(
            path, f"it holds {held[1]}" if held else "if it is a checkpoint at all"
        ) from error
    except Exception as error:  # any kind: the file may hold anything
        raise ValueError(f"{path} cannot be read as a checkpoint: {error!r}"[:500]) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def _check_whole(path: str) -> bool:
    """Whether it is a zip file, as torch writes since 1.6; ValueError if one that is not whole."""
    with open(path, "rb") as file:
        start = file.read(4)
        if not start:
            raise ValueError(f"{path} is empty (0 bytes)")
        if start != b"PK\x03\x04":
            return False
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError) as error:
            size = os.path.getsize(path)
            raise ValueError(f"{path} is truncated, at {size} bytes ({error})") from error
        except Exception as error:  # any kind: the file may hold anything
            raise ValueError(f"{path} is damaged ({error!r})"[:500]) from error
    if damaged:
        raise ValueError(
            f"{path} is damaged: the checksum of its part {damaged} is wrong (or was not written, "
            "after torch.serialization.set_crc32_options(False))"
        )
    return True


def last_checkpoint(folder: str) -> str | None:
    """The file in ``folder`` that its ``last_checkpoint`` names; None where that names none."""
    try:
        name = Path(folder, "last_checkpoint").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.error("%s", error)
        return None
    # After a failure of the machine, it may hold anything; and a run stays in its folder.
    named = name.isprintable() and len(name) < 256 and os.path.basename(name) == name
    return os.path.join(folder, name) if named and name.endswith(".pth") else None


def find_checkpoints(folder: str) -> list[str]:
    """
    The files that the run in ``folder`` can go on from, best first: the one that
    ``last_checkpoint`` names, be it there or not, then those of fewer iterations
    (``model_NNNNNNN.pth``), down to the first; all there are where it names none. See
    :func:`archive_previous_run` for what an earlier run has left.
    """
    last = last_checkpoint(folder)
    numbered = _NUMBERED.fullmatch(os.path.basename(last or ""))
    end = int(numbered[1]) if numbered else math.inf
    found = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if match := _NUMBERED.fullmatch(entry.name):
                found.append((int(match[1]), entry.path))
            elif entry.name == _FINAL and last is None:
                found.append((_iteration(entry.path), entry.path))
    kept = [path for iteration, path in sorted(found) if iteration < end or last is None]
    return [last] * (last is not None) + kept[::-1]


def _iteration(path: str) -> float:
    """That of a checkpoint whose name does not say it; of one that cannot be read, the latest."""
    try:
        return read_checkpoint(path, mmap=True).get("iteration", math.inf)
    except (OSError, ValueError):
        return math.inf


def archive_previous_run(folder: str) -> str | None:
    """
    Moves the checkpoints of an earlier run to a folder of their own, ``earlier_run_N`` in
    ``folder``: a run that began there anew, once interrupted, would go on from them.

    Returns:
        that folder; None if there are no checkpoints.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if is_checkpoint_name(name)]
    if not names:
        return None
    numbers = (os.path.join(folder, f"earlier_run_{number}") for number in count(1))
    aside = next(path for path in numbers if not os.path.exists(path))
    os.mkdir(aside)
    for name in names:
        os.replace(os.path.join(folder, name), os.path.join(aside, name))
    return aside


def is_checkpoint_name(name: str) -> bool:
    """Whether a run may write a file of this name in its OUTPUT_DIR, and read it when resumed."""
    return name in (_FINAL, _BEST, "last_checkpoint") or bool(_NUMBERED.fullmatch(name))


def has_checkpoint(folder: str) -> bool:
    """Whether a resumed run is to go on from something in ``folder``, in order or not."""
    return os.path.exists(os.path.join(folder, "last_checkpoint")) or bool(find_checkpoints(folder))
