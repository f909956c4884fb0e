"""Checkpoints that know which rule trained which layer, and weights that find their place."""

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ss_detectron.layers import feedback_report
from ss_detectron.layers.names import as_patterns, first_match
from ss_detectron.layers.report import weight_layers
from ss_detectron.utils.comm import any_rank
from ss_detectron.utils.text import abbreviate
from ss_detectron.utils.trust import check_download, check_pickle, is_url, needs_pickle

from .files import (
    BEST,
    NeedsPickleError,
    atomic_write,
    find_checkpoints,
    has_checkpoint,
    last_checkpoint,
    read_checkpoint,
)
from .weights import (
    check_torchvision_resnet,
    find_renaming,
    find_unwrapping,
    find_weights,
    is_torchvision_resnet,
    name_ends,
    rename_state,
)

__all__ = ["FeedbackCheckpointer", "NotWrittenError"]

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NotWrittenError(OSError):
    """A run could not write a file; says which, and from which checkpoint it can go on."""


class FeedbackCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, for weights that travel. A checkpoint also says by which rule each
    layer learned (under "feedback": layer name -> rule and its settings) and what its classes are
    called (under "classes"), both of which stock Detectron2 ignores. Loading one whose rules or
    settings are not the model's gives a warning, and is refused by a run that is resumed; one of
    other classes, or of the same in another order, is refused by an evaluation too. A classifier's
    backbone and torchvision's ResNets find their place in a detector, and what fits nothing is
    refused.

    A checkpoint is written whole or not at all, and a run whose last one is damaged goes on from
    the one before it. Nothing is unpickled or downloaded that is not trusted by name.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        classes: Iterable[str] = (),
        weights_except: Iterable[str] = (),
        trusted_weights: Iterable[str] = (),
        whole: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model, save_dir, **kwargs: see DetectionCheckpointer. Of a training, these are more
                than the model; a model alone is evaluated.
            classes: what the model's classes are called, in the order of their labels; none where
                that is not known, and then they are not compared.
            weights_except: what is not to be loaded: shell-style patterns of names of the model's
                modules ("linear": all that is in it) and parameters. A run that is resumed loads
                all the same.
            trusted_weights: what may be downloaded and unpickled, which runs code in it: paths and
                URLs, see :func:`~ss_detectron.utils.trust.is_trusted`.
            whole: refuses a checkpoint that leaves something of the model as it was initialised.

        Raises:
            ValueError: a pattern of ``weights_except`` matches nothing in the model.
        """
        super().__init__(model, save_dir, **kwargs)
        self.classes = [str(name) for name in classes]  # not NumPy's, which has to be unpickled
        self.weights_except = as_patterns(weights_except)
        self.trusted_weights = as_patterns(trusted_weights)
        self.whole = whole
        self._path = ""
        self._resuming = False
        names = self.model.state_dict()
        for pattern in self.weights_except:
            if not any(first_match(name, (pattern,)) for name in names):
                parts = dict.fromkeys(name.partition(".")[0] for name in names)
                raise ValueError(
                    f"MODEL.WEIGHTS_EXCEPT: {pattern!r} matches no module and no parameter of "
                    f"{type(self.model).__name__}, whose parts are {', '.join(parts)}"
                )

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Write a checkpoint, whole or not at all, and note that a resumed run is to go on from it.

        Raises:
            NotWrittenError: the disk is full; what was there before is still there.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        data |= {"feedback": _layer_rules(self.model), "classes": self.classes, **kwargs}
        target = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", target)
        with self.explain_full_disk(target):
            with atomic_write(target) as file:
                torch.save(data, file)
            self.tag_last_checkpoint(f"{name}.pth")
        for unfinished in Path(self.save_dir).glob("*.pth.new"):  # of a run that was killed
            unfinished.unlink()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note the file that a resumed run is to go on from, which the best need not be."""
        if last_filename_basename == BEST:
            return
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    @contextmanager
    def explain_full_disk(self, target: str = "a file of the run") -> Iterator[None]:
        """Raise :class:`NotWrittenError` where ``target``, or another file, fills the disk."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            cause = error  # torch's writer makes a RuntimeError of the disk's
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None or cause.errno not in _FULL or isinstance(cause, NotWrittenError):
                raise
            earlier = last_checkpoint(self.save_dir)
            rest = f"--resume goes on from {earlier}" if earlier else "there is no checkpoint yet"
            raise NotWrittenError(
                cause.errno,
                f"{cause.filename or target} could not be written: {cause.strerror}, "
                f"{shutil.disk_usage(self.save_dir).free:,} bytes are free in {self.save_dir}; "
                f"{rest}",
            ) from error

    def has_checkpoint(self) -> bool:
        """
        Return whether there is something to resume from, in order or not. Every rank has to call
        it, and gets the main one's answer.
        """
        return comm.all_gather(has_checkpoint(self.save_dir))[0]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """
        Go on from the run's last checkpoint, if ``resume`` and there is one; else load the
        weights at ``path`` and nothing but weights. Every rank has to call it.

        If the last checkpoint cannot be read, that is in the log, and the run goes on from the one
        before it.

        Raises:
            OSError: there are checkpoints, and none of them can be read.
            ValueError: see :meth:`load`.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        self._resuming = True
        try:
            return self.load(self._find_readable())
        finally:
            self._resuming = False

    def _find_readable(self) -> str:
        """Return the checkpoint to resume from: the main rank looks, and all take the same."""
        found = self._first_readable() if comm.is_main_process() else None
        readable, problems = comm.all_gather(found)[0]
        if not readable:
            raise OSError(
                f"there is nothing to resume from in {self.save_dir}: {'; '.join(problems)}. To "
                "begin anew, start without --resume, best in another OUTPUT_DIR"
            )
        if any_rank(not os.path.isfile(readable)):
            raise FileNotFoundError(
                f"{readable} is not there for every process: OUTPUT_DIR has to be a folder that "
                "all machines share"
            )
        return readable

    def _first_readable(self) -> tuple[str | None, list[str]]:
        """Return the first checkpoint that can be read, and what is wrong with those before it."""
        problems = []
        if last_checkpoint(self.save_dir) is None:
            problems.append(f"{os.path.join(self.save_dir, 'last_checkpoint')} names no checkpoint")
        for path in find_checkpoints(self.save_dir):
            try:
                try:
                    read_checkpoint(path)
                except NeedsPickleError as error:
                    check_pickle(path, self.trusted_weights, error.why)
            except (OSError, ValueError) as error:
                problems.append(str(error))
                continue
            if problems:
                logger.error("%s. Going on from %s.", "; ".join(problems), path)
            return path, problems
        return None, problems

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Load a checkpoint, as DetectionCheckpointer does. What was loaded and what was not is in
        the log.

        Raises:
            ValueError: the file has nothing of this model, or a parameter of another shape (which
                Detectron2's name-matching heuristics pass over with a warning), or all of it for
                other classes; it is damaged; it has to be downloaded or unpickled, and is not
                trusted.
        """
        self._path = path
        if is_url(path):
            check_download(path, self.trusted_weights)
            logger.info("Downloading %s, unless it is in the cache.", path)
        try:
            return super().load(path, *args, **kwargs)
        except OSError as error:
            if not is_url(path):
                raise
            raise OSError(
                f"MODEL.WEIGHTS is {path}, which could not be downloaded: {error}. Set a local "
                "file, or '' to start from scratch"
            ) from error
        finally:
            self._parsed_url_during_load = None  # left over from an error, it bars the next load

    def _load_file(self, filename: str) -> dict[str, Any]:
        if needs_pickle(filename):
            self._check_pickle()
        return super()._load_file(filename)

    def _torch_load(self, filename: str) -> dict[str, Any]:
        try:
            content = read_checkpoint(filename)
        except NeedsPickleError as error:
            self._check_pickle(error.why)
            content = torch.load(filename, map_location="cpu", weights_only=False)
        return find_weights(self._path, content)

    def _check_pickle(self, why: str = "") -> None:
        check_pickle(self._path, self.trusted_weights, why)
        logger.warning(
            "%s is unpickled, which runs the code in it, as MODEL.TRUSTED_WEIGHTS names it.",
            self._path,
        )

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        model, saved = self.model.state_dict(), checkpoint["model"]
        self._convert_ndarray_to_tensor(saved)
        saved.pop("n_averaged", None)  # of torch's AveragedModel
        unwrap = find_unwrapping(saved, model)
        saved = rename_state(saved, unwrap)
        rename = find_renaming(saved, model)
        state = rename_state(saved, rename)
        by_heuristics = checkpoint.pop("matching_heuristics", False)
        if by_heuristics:
            # Here, and not in DetectionCheckpointer, to see what it makes of them.
            is_caffe2 = checkpoint.get("__author__") == "Caffe2"
            state = align_and_update_state_dicts(model, state, c2_conversion=is_caffe2)
        if saved and model.keys().isdisjoint(state):
            hint = ""
            if not by_heuristics and 2 * len(name_ends(model) & state.keys()) > len(state):
                hint = "; ?matching_heuristics=True after the path matches the names' ends"
            raise ValueError(
                f"{self._path} has nothing of this {type(self.model).__name__} (it holds "
                f"{abbreviate(saved)}; the model {abbreviate(model)}). MODEL.WEIGHTS takes the "
                "same network, or a backbone from an ImageClassifier or a ResNet of torchvision's"
                f"{hint}"
            )

        unwanted = () if self._resuming else self.weights_except
        excepted = {name for name in model if first_match(name, unwanted)}
        for name in excepted & state.keys():
            del state[name]
        if not by_heuristics:
            self._check_shapes(state, model)
        if is_torchvision_resnet(saved):
            check_torchvision_resnet(self._path, self.model)
        lacking = [n for n in model if n not in state and not _is_part_of_training(n)]
        if lacking and self.whole:
            raise ValueError(
                f"{self._path} lacks {len(lacking)} of the model's {len(model)} tensors "
                f"({abbreviate(lacking)}): it is of another network, or of a part of this"
            )
        if self.classes and not lacking:  # else a part, as a backbone, that comes without classes
            self._compare_classes(checkpoint.get("classes"))
        rules = checkpoint.get("feedback", {}).items()
        rules = {rename(unwrap(name)): rule for name, rule in rules}
        self._compare_rules({n: rule for n, rule in rules.items() if not first_match(n, unwanted)})

        checkpoint["model"] = state
        incompatible = super()._load_model(checkpoint)
        unused = [name for name in incompatible.unexpected_keys if _is_feedback(name)]
        counts = len(model.keys() & state.keys()), len(model), len(excepted), len(unused)
        message = "%s: %d of the model's %d tensors loaded, %d excepted, %d of feedback not used."
        logger.info(message, self._path, *counts)
        # fvcore warns of the others. Only a norm without momentum reads its count of batches.
        for names, known in (
            (incompatible.missing_keys, excepted),
            (incompatible.unexpected_keys, unused),
        ):
            names[:] = [n for n in names if n not in known and "num_batches_tracked" not in n]
        return incompatible

    def _check_shapes(self, state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
        shapes = {
            name: f"{name}: {tuple(state[name].shape)} in the file, {tuple(here.shape)} here"
            for name, here in model.items()
            if name in state and not is_lazy(here) and here.shape != state[name].shape
        }
        if not shapes:
            return
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in shapes))
        if self._resuming:
            remedy = "resume the run with its own config, or start another in a new OUTPUT_DIR"
        elif len(modules) > 4:
            remedy = "it is another network: change MODEL or MODEL.WEIGHTS"
        else:
            remedy = (
                "set MODEL to what the checkpoint was made with (for another number of classes, "
                f'its NUM_CLASSES), or MODEL.WEIGHTS_EXCEPT "{modules}" to start anew there'
            )
        raise ValueError(
            f"{self._path} does not fit this model, in which {len(shapes)} of its tensors have "
            f"another shape ({abbreviate(shapes.values())}): {remedy}"
        )

    def _compare_classes(self, saved: Any) -> None:
        if not saved or not isinstance(saved, list):
            message = "%s does not say its classes, which are taken to be the data set's."
            logger.info(message, self._path)
        elif difference := compare_classes(saved, self.classes):
            problem = f"{self._path} was trained on {difference}"
            if self._resuming:
                raise ValueError(
                    f"{problem}: resume the run with its own data, or start another from its "
                    "weights (MODEL.WEIGHTS) in a new OUTPUT_DIR"
                )
            if not self.checkpointables:
                raise ValueError(
                    f"{problem}: give the data set the model's classes in the model's order, which "
                    "is that of the ids in a COCO file, and that of the names of folders"
                )
            logger.warning(
                "%s. The last layers start from those: MODEL.WEIGHTS_EXCEPT leaves them out.",
                problem,
            )

    def _compare_rules(self, saved: Mapping[str, str]) -> None:
        model = _layer_rules(self.model)
        differ = [name for name in model if saved.get(name, model[name]) != model[name]]
        if differ and self._resuming and self.checkpointables:
            name = differ[0]
            raise ValueError(
                f"{self._path} is of a run in which {len(differ)} layers learn by another rule, "
                f"such as {name} by {saved[name]} and not by {model[name]}: resume the run with "
                "its own MODEL.FEEDBACK (RULE, SCALE, GAIN, SEED, ...), or start another from its "
                "weights (MODEL.WEIGHTS) in a new OUTPUT_DIR"
            )
        if differ:
            logger.warning(
                "%d layers learn by another rule than they did in the checkpoint, such as %s by %s "
                "and not by %s: set MODEL.FEEDBACK to that unless the change is meant. Fixed or "
                "learned feedback of the checkpoint is used whatever the scale, gain and seed.",
                len(differ),
                differ[0],
                model[differ[0]],
                saved[differ[0]],
            )


def compare_classes(saved: Sequence[str], here: Sequence[str]) -> str:
    """Say in words how the classes of a checkpoint differ from others; empty if they do not."""
    if list(saved) == list(here):
        return ""
    pairs = enumerate(zip_longest(saved, here))
    first = next(i for i, (one, other) in pairs if one != other)
    same = sorted(saved) == sorted(here)
    there, here = (abbreviate(names[first:]) or "no more" for names in (saved, here))
    kind = "the same classes in another order" if same else "other classes"
    return f"{kind}: from class {first} on, {there} in the checkpoint, {here} here"


def _is_part_of_training(name: str) -> bool:
    return _is_feedback(name) or "num_batches_tracked" in name


def _is_feedback(name: str) -> bool:
    return name.rpartition(".")[2].startswith("feedback")


def _layer_rules(model: nn.Module) -> dict[str, str]:
    """Return layer name -> its rule, with what the rule is set to."""
    rows = zip(feedback_report(model), weight_layers(model), strict=True)
    return {row.name: str(getattr(layer, "rule", row.rule)) for row, (_, layer) in rows}
