"""Checkpoints that know which rule trained which layer, and weights that find their place."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parameter import is_lazy

from .layers import AsymmetricLayer, feedback_report
from .layers.convert import as_patterns, first_match
from .layers.feedback import Backpropagation
from .weights import (
    check_torchvision_resnet,
    describe,
    few,
    find_renaming,
    is_torchvision_resnet,
    largest_modules,
    rename_state,
)

__all__ = ["FeedbackCheckpointer"]

logger = logging.getLogger(__name__)


class FeedbackCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, for weights that travel. A checkpoint also says by which rule each
    layer learned (under "feedback": layer name -> rule and its settings, which stock Detectron2
    ignores), and loading one whose rules or settings are not the model's gives a warning. A
    classifier's backbone and torchvision's ResNets find their place in a detector, and what fits
    nothing is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        weights_except: Iterable[str] = (),
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: possibly wrapped in DistributedDataParallel.
            save_dir, save_to_disk, **checkpointables: see DetectionCheckpointer.
            weights_except: what is not to be loaded: shell-style patterns of names of the model's
                modules ("linear": all that is in it) and parameters. A run that is resumed loads
                all the same.

        Raises:
            ValueError: a pattern matches nothing in the model.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.weights_except = as_patterns(weights_except)
        self._path = ""
        self._resuming = False
        names = self.model.state_dict()
        for pattern in self.weights_except:
            if not any(first_match(name, (pattern,)) for name in names):
                raise ValueError(
                    f"MODEL.WEIGHTS_EXCEPT: {pattern!r} matches no module and no parameter of "
                    f"{type(self.model).__name__}; it holds {describe(names)}"
                )

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """
        Args:
            name: of the file, without ".pth".
            tag: whether a resumed run is to go on from this checkpoint.
            **kwargs: what else to save.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        if "://" in self.save_dir:  # where a file cannot be renamed into place
            return super().save(name, feedback=_rules(self.model), **kwargs)
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        data["feedback"] = _rules(self.model)
        target = os.path.join(self.save_dir, name + ".pth")
        self.logger.info("Saving checkpoint to %s", target)
        with _whole(target) as path:
            torch.save({**data, **kwargs}, path)
        if tag:
            self.tag_last_checkpoint(name + ".pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            return super().tag_last_checkpoint(last_filename_basename)
        with _whole(os.path.join(self.save_dir, "last_checkpoint")) as path:
            Path(path).write_text(last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """
        Goes on from the run's last checkpoint, if ``resume`` and there is one; else loads the
        weights at ``path`` and nothing but weights. Raises as :meth:`load`.
        """
        self._resuming = resume and self.has_checkpoint()
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._resuming = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        See DetectionCheckpointer. What was loaded and what was not is in the log.

        Raises:
            ValueError: the file has nothing of this model, or a parameter of another shape (which
                Detectron2's name-matching heuristics pass over with a warning).
        """
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # left over from an error, it bars the next load

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
        self._say_what_was_loaded(
            loaded=[name for name in model if name in state],
            missing=[name for name in incompatible.missing_keys if name not in excepted],
            excepted=[name for name in model if name in excepted],
            unexpected=incompatible.unexpected_keys,
        )

    def _nothing_fits(self, saved: Iterable[str], model: Iterable[str], by_heuristics: bool) -> str:
        message = (
            f"{self._path} has nothing of this {type(self.model).__name__} (it holds {few(saved)}; "
            f"the model {few(model)}). MODEL.WEIGHTS takes weights of the same network, or of its "
            "backbone from an ImageClassifier or from torchvision's ResNets"
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
            f"another shape ({few(shapes)}): {remedy}"
        )

    def _say_what_was_loaded(
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
                said.append(f"{text}: {describe(names, others)}")
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


@contextmanager
def _whole(target: str) -> Iterator[str]:
    """A path to write to that becomes ``target`` in one step, for a run may be killed any time."""
    yield target + ".new"
    os.replace(target + ".new", target)


def _count(rules: dict[str, str]) -> str:
    return ", ".join(f"{rule} ({n} layers)" for rule, n in Counter(rules.values()).most_common())
