"""Direct feedback alignment."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ss_detectron.layers.feedback import Fans, FeedbackAlignment

from .blocks import BlockLearner, BlockPass
from .learner import LEARNER_REGISTRY, feedback_seed

__all__ = ["DirectFeedbackAlignment"]

_SCALES = "xavier", "kaiming"


@LEARNER_REGISTRY.register
class DirectFeedbackAlignment(BlockLearner):
    """
    Send the error at the logits to each hidden block directly, through a fixed random matrix
    (Nøkland 2016, arXiv:1609.01596).

    For logits a_L and a loss E, the gradient at the output h_l of a hidden block is B_l dE/da_L
    instead of dE/dh_l; the last block's is backpropagation's. B_l is drawn from the seed and the
    block's name alone, and so is in no checkpoint::

        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
        learner = DirectFeedbackAlignment(model)
        optimizer = torch.optim.Adam(learner.parameter_groups())
        loss = F.cross_entropy(learner(x), y)
        learner.backward(loss)
        optimizer.step()
        learner.step()

    A block need be no single layer: a residual block learns by backpropagation within it.

    Args:
        model, blocks: see :class:`~ss_detectron.learners.BlockLearner`.
        scale: of B_l as a layer from C classes to a block's H units. xavier: U(-sqrt(3) s,
            sqrt(3) s), s = sqrt(2 / (C + H)); kaiming: U(-s, s), s = 1 / sqrt(C).
        gain: multiplies the scale.
        seed: of the draws.

    Raises:
        ValueError: the blocks do not fit the model, or there is no such scale.
    """

    name = "direct_feedback"
    short_name = "dfa"
    other_names = ("direct_feedback_alignment",)

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[Any] | None = None,
        *,
        scale: str = "xavier",
        gain: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, blocks)
        if scale not in _SCALES:
            raise ValueError(
                f"direct feedback's scale is {scale!r}; there is no weight between a block and the "
                f"logits to take it from: choose one of {', '.join(_SCALES)}"
            )
        self._rules = [
            FeedbackAlignment(scale, gain, seed, f"direct.{name}") for name in self.block_names[:-1]
        ]
        self._feedback: dict[int, Tensor] = {}

    @classmethod
    def from_config(cls, cfg: Any, model: nn.Module) -> "DirectFeedbackAlignment":
        options = cfg.MODEL.LEARNER
        return cls(model, scale=options.SCALE, gain=options.GAIN, seed=feedback_seed(cfg))

    def errors(self, done: BlockPass) -> list[Tensor]:
        *hidden, logits = done.outputs
        if logits.dim() != 2:
            raise ValueError(
                f"direct feedback starts at logits of shape (N, classes); the block "
                f"{self.block_names[-1]!r} gives {tuple(logits.shape)}"
            )
        error = done.error
        errors = []
        for index, h in enumerate(hidden):
            feedback = self.feedback(index, h, logits)
            # In memory as the output is, locally connected layers' with the batch last.
            batch_last = h.stride(0) == 1
            gradient = (feedback @ error.t()).t() if batch_last else error @ feedback.t()
            errors.append(gradient.to(h.dtype).view_as(h))
        return errors

    def feedback(self, index: int, output: Tensor, logits: Tensor) -> Tensor:
        """
        Return B_l of a hidden block, (units, classes), of the logits' type.

        Args:
            index: of the block.
            output: of it, (N, ...).
            logits: (N, classes).
        """
        shape = math.prod(output.shape[1:]), logits.shape[1]
        made = self._feedback.get(index)
        is_like = made is not None and (made.dtype, made.device) == (logits.dtype, logits.device)
        if made is None or made.shape != shape or not is_like:
            fans = Fans(fan_in=shape[1], fan_out=shape[0], is_linear=True)
            made = self._rules[index].draw(logits.new_empty(shape), fans)
            self._feedback[index] = made
        return made
