"""Checkpoints that know which rule trained which layer, and weights that find their place."""

import errno
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parameter import is_lazy

from ss_detectron.layers import AsymmetricLayer, feedback_report
from ss_detectron.layers.feedback import Backpropagation
from ss_detectron.layers.names import as_patterns, first_match
from ss_detectron.utils.comm import any_rank
from ss_detectron.utils.trust import (
    check_download,
    check_pickle,
    is_trusted,
    is_url,
    needs_pickle,
    pickle_refusal,
)

from .files import (
    NeedsPickleError,
    atomic_write,
    find_checkpoints,
    has_checkpoint,
    last_checkpoint,
    read_checkpoint,
    remove_partial_files,
)
from .weights import (
    abbreviate,
    check_torchvision_resnet,
    find_renaming,
    is_torchvision_resnet,
    largest_modules,
    rename_state,
    summarise,
)

__all__ = ["FeedbackCheckpointer", "NotWrittenError"]

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NotWrittenError(OSError):
    """A run could not write a file; says which, and from which checkpoint it can go on."""


class FeedbackCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, for weights that travel. A checkpoint also says by which rule each
    layer learned (under "feedback": layer name -> rule and its settings, which stock Detectron2
    ignores), and loading one whose rules or settings are not the model's gives a warning. A
    classifier's backbone and torchvision's ResNets find their place in a detector, and what fits
    nothing is refused.

    A checkpoint is written whole or not at all, and a run whose last one is damaged goes on from
    the one before it. Nothing is unpickled or downloaded that is not trusted by name.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        weights_except: Iterable[str] = (),
        trusted_weights: Iterable[str] = (),
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: possibly wrapped in DistributedDataParallel.
            save_dir, save_to_disk, **checkpointables: see DetectionCheckpointer.
            weights_except: what is not to be loaded: shell-style patterns of names of the model's
                modules ("linear": all that is in it) and parameters. A run that is resumed loads
                all the same.
            trusted_weights: what may be downloaded and unpickled, which runs code in it: paths and
                URLs, see :func:`~ss_detectron.utils.trust.is_trusted`.

        Raises:
            ValueError: a pattern of ``weights_except`` matches nothing in the model.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.weights_except = as_patterns(weights_except)
        self.trusted_weights = as_patterns(trusted_weights)
        self._path = ""
        self._resuming = False
        names = self.model.state_dict()
        for pattern in self.weights_except:
            if not any(first_match(name, (pattern,)) for name in names):
                raise ValueError(
                    f"MODEL.WEIGHTS_EXCEPT: {pattern!r} matches no module and no parameter of "
                    f"{type(self.model).__name__}; it holds {summarise(names)}"
                )

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """
        Args:
            name: of the file, without ".pth".
            tag: whether a resumed run is to go on from this checkpoint.
            **kwargs: what else to save.

        Raises:
            NotWrittenError: the disk is full, or fails; what was there before is still there.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        if is_url(self.save_dir):  # where a file cannot be renamed into place
            return super().save(name, feedback=_rules(self.model), **kwargs)
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        data["feedback"] = _rules(self.model)
        target = os.path.join(self.save_dir, name + ".pth")
        self.logger.info("Saving checkpoint to %s", target)
        try:
            with atomic_write(target) as file:
                torch.save({**data, **kwargs}, file)
            if tag:
                self.tag_last_checkpoint(name + ".pth")
            remove_partial_files(self.save_dir)
        except (OSError, RuntimeError) as error:
            cause = _os_error(error)
            if cause is None:
                raise
            raise NotWrittenError(cause.errno, self._not_written(target, cause)) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if is_url(self.save_dir):
            return super().tag_last_checkpoint(last_filename_basename)
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    @contextmanager
    def explain_full_disk(self) -> Iterator[None]:
        """
        Makes of a full disk's error, whichever file of the run meets it first, one that says what
        is left.

        Raises:
            NotWrittenError: the disk is full.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL or isinstance(error, NotWrittenError):
                raise
            what = error.filename or f"a file of the run in {self.save_dir}"
            raise NotWrittenError(error.errno, self._not_written(what, error)) from error

    def _not_written(self, target: str, error: OSError) -> str:
        said = [error.strerror or str(error)]
        with suppress(OSError):
            free = shutil.disk_usage(self.save_dir).free
            said.append(f"{free:,} bytes are free in {self.save_dir}")
        earlier = last_checkpoint(self.save_dir)
        if earlier and os.path.isfile(earlier):
            rest = f"The checkpoint before it, {earlier}, is intact, and --resume goes on from it"
        else:
            rest = "There is no checkpoint before it"
        return f"{target} could not be written: {', '.join(said)}. {rest}"

    def get_checkpoint_file(self) -> str:
        """The file that ``last_checkpoint`` names; empty where it names none."""
        if is_url(self.save_dir):
            return super().get_checkpoint_file()
        return last_checkpoint(self.save_dir) or ""

    def has_checkpoint(self) -> bool:
        """
        Whether there is something to resume from, in order or not. Every rank has to call it, and
        gets the main one's answer.
        """
        if is_url(self.save_dir):
            return super().has_checkpoint()
        return comm.all_gather(has_checkpoint(self.save_dir))[0]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """
        Goes on from the run's last checkpoint, if ``resume`` and there is one; else loads the
        weights at ``path`` and nothing but weights. Every rank has to call it.

        If the last checkpoint cannot be read, that is in the log, and the run goes on from the one
        before it.

        Raises:
            OSError: there are checkpoints, and none of them can be read.
            ValueError: see :meth:`load`.
        """
        self._resuming = resume and self.has_checkpoint()
        try:
            if self._resuming and not is_url(self.save_dir):
                return self.load(self._find_readable())
            return super().resume_or_load(path, resume=resume)
        finally:
            self._resuming = False

    def _find_readable(self) -> str:
        """The checkpoint to resume from: the main rank looks, and all take the same."""
        readable, problems = comm.all_gather(
            self._look_for_readable() if comm.is_main_process() else None
        )[0]
        if readable is None:
            raise OSError(
                f"there is nothing to resume from in {self.save_dir}: {'; '.join(problems)}. To "
                "begin anew, start without --resume, best in another OUTPUT_DIR"
            )
        if any_rank(not os.path.isfile(readable)):
            raise FileNotFoundError(
                f"{readable}, which the main process resumes from, is not there for every process: "
                "OUTPUT_DIR has to be a folder that all machines share"
            )
        return readable

    def _look_for_readable(self) -> tuple[str | None, list[str]]:
        """The first that can be read, and what is wrong with those before it."""
        problems = []
        if last_checkpoint(self.save_dir) is None:
            problems.append(f"{os.path.join(self.save_dir, 'last_checkpoint')} names no checkpoint")
        for path in find_checkpoints(self.save_dir):
            if problem := self._problem(path):
                problems.append(problem)
                continue
            if problems:
                logger.error("%s. Going on from %s.", "; ".join(problems), path)
            return path, problems
        return None, problems

    def _problem(self, path: str) -> str:
        """Why a run cannot go on from this file; empty if it can."""
        try:
            read_checkpoint(path, mmap=True)
        except FileNotFoundError:
            return f"{path} is not there"
        except NeedsPickleError as error:
            if not is_trusted(path, self.trusted_weights):
                return pickle_refusal(path, error.why)
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        See DetectionCheckpointer. What was loaded and what was not is in the log.

        Raises:
            ValueError: the file has nothing of this model, or a parameter of another shape (which
                Detectron2's name-matching heuristics pass over with a warning); it is damaged; it
                has to be downloaded or unpickled, and is not trusted.
        """
        self._path = path
        if is_url(path):
            check_download(path, self.trusted_weights)
            logger.info("Downloading %s, unless it is in the cache.", path)
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # left over from an error, it bars the next load

    def _load_file(self, filename: str) -> dict[str, Any]:
        if needs_pickle(filename):
            self._announce_pickle()
        return super()._load_file(filename)

    def _torch_load(self, filename: str) -> dict[str, Any]:
        try:
            return read_checkpoint(filename)
        except NeedsPickleError as error:
            self._announce_pickle(error.why)
        return torch.load(filename, map_location="cpu", weights_only=False)

    def _announce_pickle(self, why: str = "") -> None:
        check_pickle(self._path, self.trusted_weights, why)
        logger.warning(
            "%s is unpickled, which runs the code in it, as MODEL.TRUSTED_WEIGHTS names it.",
            self._path,
        )

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        model, saved = self.model.state_dict(), checkpoint["model"]
        self._convert_ndarray_to_tensor(saved)
        if all(name.startswith("module.") for name in saved):
            consume_prefix_in_state_dict_if_present(saved, "module.")
        rename = find_renaming(saved, model)
        state = rename_state(saved, rename)
        by_heuristics = checkpoint.pop("matching_heuristics", False)
        if by_heuristics:
            # Here, and not in DetectionCheckpointer, to see what it makes of them.
            is_caffe2 = checkpoint.get("__author__") == "Caffe2"
            state = align_and_update_state_dicts(model, state, c2_conversion=is_caffe2)
        if saved and model.keys().isdisjoint(state):
            raise ValueError(self._nothing_fits(saved, model, by_heuristics))

        unwanted = () if self._resuming else self.weights_except
        excepted = {name for name in model if first_match(name, unwanted)}
        for name in excepted & state.keys():
            del state[name]
        if not by_heuristics:
            self._check_shapes(state, model)
        if is_torchvision_resnet(saved):
            check_torchvision_resnet(self._path, self.model)
        rules = checkpoint.get("feedback")
        if rules is not None:
            rules = {rename(layer): rule for layer, rule in rules.items()}
            rules = {
                layer: rule for layer, rule in rules.items() if not first_match(layer, unwanted)
            }
        self._compare_rules(rules)

        checkpoint["model"] = state
        incompatible = super()._load_model(checkpoint)
        # Returned to fvcore, the two lists would be logged at length.
        self._log_loaded(
            loaded=[name for name in model if name in state],
            missing=[name for name in incompatible.missing_keys if name not in excepted],
            excepted=[name for name in model if name in excepted],
            unexpected=incompatible.unexpected_keys,
        )

    def _nothing_fits(self, saved: Iterable[str], model: Iterable[str], by_heuristics: bool) -> str:
        message = (
            f"{self._path} has nothing of this {type(self.model).__name__} (it holds "
            f"{abbreviate(saved)}; the model {abbreviate(model)}). MODEL.WEIGHTS takes weights of "
            "the same network, or of its backbone from an ImageClassifier or a ResNet of "
            "torchvision's"
        )
        if by_heuristics:
            return message
        return f"{message}; ?matching_heuristics=True after the path matches the names' ends"

    def _check_shapes(self, state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
        differ = [
            name
            for name, here in model.items()
            if name in state and not is_lazy(here) and here.shape != state[name].shape
        ]
        if not differ:
            return
        shapes = [
            f"{name}: {tuple(state[name].shape)} in the file, {tuple(model[name].shape)} here"
            for name in differ
        ]
        modules = list(largest_modules(differ, model.keys() - set(differ)))
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
            f"{self._path} does not fit this model, in which {len(differ)} of its tensors have "
            f"another shape ({abbreviate(shapes)}): {remedy}"
        )

    def _log_loaded(
        self, loaded: list[str], missing: list[str], excepted: list[str], unexpected: list[str]
    ) -> None:
        tensors = self.model.state_dict(keep_vars=True)
        under_other_names = {id(tensors[name]) for name in loaded}
        missing = [name for name in missing if id(tensors[name]) not in under_other_names]
        feedback = {name.rpartition(".")[0] for name in unexpected if _is_feedback(name)}
        unexpected = [name for name in unexpected if not _is_feedback(name)]
        loaded, missing, excepted, unexpected = map(
            _without_counters, (loaded, missing, excepted, unexpected)
        )
        said = []
        for text, names in (
            (f"loaded {len(loaded)} tensors", loaded),
            ("not in the checkpoint, left as initialised", missing),
            ("left out by MODEL.WEIGHTS_EXCEPT", excepted),
            ("in the checkpoint, not in the model", unexpected),
        ):
            if names:
                others = {*loaded, *missing, *excepted}.difference(names)
                said.append(f"{text}: {summarise(names, others)}")
        if feedback:
            said.append(f"the checkpoint's feedback of {len(feedback)} layers is not used")
        level = logging.WARNING if missing or unexpected else logging.INFO
        logger.log(level, "%s: %s", self._path, "; ".join(said))

    def _compare_rules(self, saved: dict[str, str] | None) -> None:
        model = _rules(self.model)
        if saved is None:
            if any(isinstance(m, AsymmetricLayer) for m in self.model.modules()):
                logger.info(
                    "The checkpoint does not say which rule trained it; this model learns by %s.",
                    _count(model),
                )
            return
        differ = [name for name in model if name in saved and saved[name] != model[name]]
        if differ:
            logger.warning(
                "The checkpoint was trained with %s, but this model learns by %s: %d layers "
                "differ, such as %s (%s in the checkpoint, %s here). Set MODEL.FEEDBACK to what "
                "the checkpoint was trained with unless the change is meant. Fixed or learned "
                "feedback that the checkpoint brings is used as it is, whatever the scale, gain "
                "and seed.",
                _count(saved),
                _count(model),
                len(differ),
                differ[0],
                saved[differ[0]],
                model[differ[0]],
            )


def _without_counters(names: Iterable[str]) -> list[str]:
    """Without batch norm's counts of batches, which only a norm without momentum reads."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _is_feedback(name: str) -> bool:
    return name.rpartition(".")[2].startswith("feedback")


def _rules(model: nn.Module) -> dict[str, str]:
    """Layer name -> its rule, with what the rule is set to."""
    layers = {row.name: model.get_submodule(row.name) for row in feedback_report(model)}
    return {
        name: str(layer.rule) if isinstance(layer, AsymmetricLayer) else Backpropagation.name
        for name, layer in layers.items()
    }


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the disk behind one that torch's writer may have made of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _count(rules: dict[str, str]) -> str:
    return ", ".join(f"{rule} ({n} layers)" for rule, n in Counter(rules.values()).most_common())
