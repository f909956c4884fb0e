"""What a learner is, and the default: backpropagation through the layers' feedback rules."""

import copy
from typing import Any, ClassVar

from torch import Tensor, nn

from ss_detectron.alignment import backpropagation_gradients
from ss_detectron.layers import advance_feedback
from ss_detectron.layers.registry import Registry
from ss_detectron.solver import match_feedback_groups

__all__ = ["LEARNER_REGISTRY", "Backpropagation", "Learner", "build_learner", "feedback_seed"]


class Learner(nn.Module):
    """
    Fill the gradients of a model.

    The optimiser, mixed precision, DistributedDataParallel, clipping and checkpoints see nothing
    but ``.grad``. A loop of one's own::

        learner = Backpropagation(model)
        optimizer = torch.optim.SGD(learner.parameter_groups(), lr=0.1)
        for x, y in batches:
            optimizer.zero_grad()
            loss = loss_fn(learner(x), y)
            learner.backward(loss, target=y)
            optimizer.step()
            learner.step()

    A new learner is a subclass with a ``name``, registered by ``@LEARNER_REGISTRY.register``, that
    overrides what it does otherwise: usually :meth:`backward` and, where the graph is cut,
    :meth:`forward`. What it needs of a config, it reads in :meth:`from_config`. Modules and
    buffers that it sets on itself are its own state.

    Args:
        model: what is trained; it keeps its parameters' names.
    """

    name: ClassVar[str] = ""
    """The name in the registry and in MODEL.LEARNER.NAME."""
    short_name: ClassVar[str] = ""
    """What the literature calls it, in lower case."""
    other_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_config(cls, cfg: Any, model: nn.Module) -> "Learner":
        """
        Build the learner that a Detectron2 config describes.

        Args:
            cfg: with the keys of :func:`ss_detectron.add_ss_config`.
            model: see the class.
        """
        return cls(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor, target: Tensor | None = None) -> None:
        """
        Add the gradients of ``loss`` to the ``.grad`` of the parameters.

        Args:
            loss: a scalar, of the last forward pass; a gradient scaler or accumulation may have
                scaled it.
            target: the labels of the batch, where there are any, for learners that need them.
        """
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Run what belongs after each step of the optimiser: here, rules that count updates."""
        advance_feedback(self.model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """
        Return parameter groups for an optimiser: the model's, and the learner's own.

        Learned feedback weights are in the group of their weights.
        """
        groups = [{"params": list(self.model.parameters())}]
        return match_feedback_groups(groups, self.model) + self.own_parameter_groups()

    def own_parameter_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups of what is not the model's; none for most learners."""
        models = set(self.model.parameters())
        own = [p for p in self.parameters() if p not in models]
        return [{"params": own}] if own else []

    def reference_gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """
        Return backpropagation's gradients for the alignment instruments; nothing else changes.

        Args:
            loss: a scalar, not passed backwards yet.

        Returns:
            the model's parameter name -> gradient; see
            :func:`ss_detectron.alignment.backpropagation_gradients`.
        """
        return backpropagation_gradients(self.model, loss)

    def measure(self, loss: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """
        Return what there is to know of this learner between a forward and a backward pass, beyond
        angles; see the learner. The alignment hook logs it. Nothing changes.

        Args:
            loss, target: see :meth:`backward`.

        Returns:
            "what/name" -> number; nothing by default.
        """
        return {}

    def own_state_dict(self) -> dict[str, Any]:
        """Return the learner's name and its state dict without the model's part."""
        return {"name": self.name, **self._without_model().state_dict()}

    def load_own_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Load what :meth:`own_state_dict` returned; the model stays as it is.

        Raises:
            ValueError: it is the state of a learner of another name.
            RuntimeError: it has other parts than this learner.
        """
        state = dict(state_dict)
        name = state.pop("name", self.name)  # once, a state had none
        if name != self.name:
            raise ValueError(
                f"the checkpoint is of the learner {name!r}, and this one is {self.name!r}: resume "
                f"the run with MODEL.LEARNER.NAME {name}, or start another from its weights "
                "(MODEL.WEIGHTS) in a new OUTPUT_DIR"
            )
        own = self._without_model()
        own.load_state_dict(state)
        self.__dict__.update({**own.__dict__, "_modules": self._modules})

    def _without_model(self) -> nn.Module:
        # Some layers change their state where a state dict does not mention it (FrozenBatchNorm2d).
        own = copy.copy(self)
        own.__dict__["_modules"] = {n: m for n, m in self._modules.items() if n != "model"}
        return own


LEARNER_REGISTRY = Registry("learner", Learner)
"""The learners by name: subclasses of :class:`Learner`."""


@LEARNER_REGISTRY.register
class Backpropagation(Learner):
    """
    Send the error back through the layers: through their weights, or by the feedback rules that
    :func:`ss_detectron.convert_feedback` gave them.
    """

    name = "backpropagation"
    short_name = "bp"


def build_learner(cfg: Any, model: nn.Module) -> Learner:
    """
    Build the learner that MODEL.LEARNER.NAME names. Without a config: ``Backpropagation(model)``.

    Args:
        cfg: a Detectron2 config with the keys of :func:`ss_detectron.add_ss_config`.
        model: what is trained.

    Raises:
        ValueError: there is no learner of that name or short name.
    """
    return LEARNER_REGISTRY.get(cfg.MODEL.LEARNER.NAME).from_config(cfg, model)


def feedback_seed(cfg: Any) -> int:
    """Return MODEL.FEEDBACK.SEED; where that is -1, SEED; where that is -1 too, 0."""
    seed: int = cfg.MODEL.FEEDBACK.SEED
    return seed if seed >= 0 else max(cfg.SEED, 0)
