"""What the learners share that pass no error from one block of a network to the one below."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ss_detectron.alignment import backpropagation_gradients, compiled_parts

from .learner import Learner

__all__ = ["BlockLearner", "BlockPass", "kept_buffers"]

logger = logging.getLogger(__name__)


@dataclass
class BlockPass:
    """A forward pass through the blocks, and what is to be passed backwards."""

    args: tuple[Any, ...] = ()
    """Of the model."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)
    """The first argument of each block."""
    outputs: list[Tensor] = field(default_factory=list)
    """Of each block, with its graph; the last is the logits."""
    same: list[bool | None] = field(default_factory=list)
    """In a first pass, whether each input but the first is the output before it, reshaped at most;
    None if it is of another size."""
    top: Tensor = field(default_factory=Tensor)
    """The last hidden block's output, cut off; a leaf that may require a gradient."""
    loss: Tensor = field(default_factory=Tensor)
    """The scalar that :meth:`BlockLearner.backward` was given; its graph is needed by all roots."""
    error: Tensor = field(default_factory=Tensor)
    """The gradient of the loss at the logits."""
    target: Tensor | None = None
    """The labels, if they were given."""


class BlockLearner(Learner):
    """
    Train each block of a network by a gradient at its own output that does not come from the
    blocks above it.

    In training, the outputs of all blocks but the last are cut from the graph; within a block, and
    from the loss to the last one's input, it is that of backpropagation (or of the layers' feedback
    rules). One call of autograd passes all gradients back.

    A subclass says in :meth:`roots` what arrives at the outputs of the hidden blocks.

    Args:
        model: whose last block gives the logits, (N, classes), of which a loss is computed.
        blocks: its blocks from the first to the last, each a module of the model, its name, or
            several of them that run one after the other. By default what the model's own
            ``learner_blocks()`` gives; in an ``nn.Sequential``, a block begins at each module that
            has parameters of two or more dimensions, or at the ``nn.Flatten`` before it.

    Raises:
        ValueError: there are fewer than two blocks, something that learns is in none or in two of
            them, or a name is no module's.
    """

    needs_top_gradient = False
    """Whether :meth:`roots` asks for the gradient at what the last block takes in."""

    def __init__(self, model: nn.Module, blocks: Iterable[Any] | None = None) -> None:
        super().__init__(model)
        names = dict(model.named_modules())
        # In plain tuples, for they stay the model's modules and do not become the learner's.
        self.blocks: tuple[tuple[nn.Module, ...], ...] = tuple(
            _as_block(block, names)
            for block in (_default_blocks(model) if blocks is None else blocks)
        )
        known = {module: name for name, module in names.items()}
        self.block_names = tuple(known.get(block[0], "?") for block in self.blocks)
        self._check_blocks()
        self._trace: BlockPass | None = None
        self._earlier: Tensor | None = None  # logits that no backward pass has come for
        self._begun = False
        self._in_place = [
            any(getattr(m, "inplace", False) for top in block for m in top.modules())
            for block in self.blocks
        ]

    def _check_blocks(self) -> None:
        what = type(self.model).__name__
        if len(self.blocks) < 2:
            raise ValueError(
                f"{type(self).__name__} needs two blocks or more, and {what} has "
                f"{len(self.blocks)}: pass blocks=[...], modules of the model or their names"
            )
        if compiled := compiled_parts(self.model):
            raise ValueError(
                f"{type(self).__name__} cannot cut a compiled model into blocks, and "
                f"{compiled[0] or what!r} is: give it one that is not"
            )
        *_, end = self.blocks[-1][-1].modules()
        if isinstance(end, nn.Softmax | nn.LogSoftmax):
            raise ValueError(
                f"the last block of {what} ends in {type(end).__name__}, and {type(self).__name__} "
                "starts at logits: leave it out, and take the cross entropy of the logits"
            )
        of: dict[nn.Module, str] = {}
        for name, block in zip(self.block_names, self.blocks, strict=True):
            for module in {part for top in block for part in top.modules()}:
                if of.setdefault(module, name) != name:
                    raise ValueError(
                        f"{type(module).__name__} is in two blocks of {what}, {of[module]!r} and "
                        f"{name!r}: blocks must not overlap"
                    )
        inside = {p for module in of for p in module.parameters(recurse=False)}
        outside = [
            name for name, p in self.model.named_parameters() if p.requires_grad and p not in inside
        ]
        if outside:
            raise ValueError(
                f"{', '.join(outside[:3])}{' ...' if len(outside) > 3 else ''} of {what} is in no "
                f"block and would not learn by {type(self).__name__}: add its module to a block, "
                "or freeze it (requires_grad_(False))"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Return what the model returns. In training, keep what the blocks took in and gave for
        :meth:`backward`; in evaluation nothing is cut.
        """
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        if self._trace is not None:
            self._earlier = self._trace.outputs[-1]
            self._trace = None
        trace = BlockPass(args, kwargs)
        with self._watch(trace):
            result = super().forward(*args, **kwargs)
        if len(trace.outputs) < len(self.blocks):
            raise ValueError(
                f"the forward pass did not run the block {self.block_names[len(trace.outputs)]!r}"
            )
        if not self._begun:
            self._begun = True
            self._check_first_pass(trace)
        self._trace = trace
        return result

    def _check_first_pass(self, done: BlockPass) -> None:
        for (below, above), same in zip(pairwise(self.block_names), done.same, strict=True):
            if same is False:
                logger.warning(
                    "Between the blocks %r and %r something is computed that is in neither, and "
                    "%s does not pass the error through it.",
                    *(below, above, type(self).__name__),
                )

    def backward(self, loss: Tensor, target: Tensor | None = None) -> None:
        """
        Add each block's gradients to the ``.grad`` of its parameters.

        Args:
            loss: a scalar, of the logits of the last forward pass; a gradient scaler or
                accumulation may have scaled it.
            target: the labels, (N,), for learners that need them.

        Raises:
            RuntimeError: there was no forward pass of the learner in training before it, or the
                loss is not of it alone.
        """
        done = self._pass_of(loss, target)
        earlier, self._trace, self._earlier = self._earlier, None, None
        if earlier is not None and earlier.requires_grad:
            (found,) = torch.autograd.grad(loss, earlier, retain_graph=True, allow_unused=True)
            if found is not None:
                raise RuntimeError(
                    f"the loss is of several forward passes, and {type(self).__name__} passes back "
                    "one at a time: call backward for each before the next"
                )
        with torch.autocast(loss.device.type, enabled=False):  # differences of targets are small
            roots = [(tensor, g) for tensor, g in self.roots(done) if tensor.requires_grad]
            torch.autograd.backward([t for t, _ in roots], [g for _, g in roots])

    def _pass_of(self, loss: Tensor, target: Tensor | None) -> BlockPass:
        if self._trace is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward needs a forward pass of the learner in training "
                "before it: learner.train(); loss = loss_fn(learner(x), y)"
            )
        logits = self._trace.outputs[-1]
        error = None
        if loss.requires_grad and logits.requires_grad:
            (error,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
        if error is None:
            raise RuntimeError("the loss does not come from the learner's last forward pass")
        return replace(self._trace, loss=loss, target=target, error=error)

    def roots(self, done: BlockPass) -> list[tuple[Tensor, Tensor | None]]:
        """
        Return what is passed backwards, with the gradient that each begins with (None for a
        scalar's 1), scaled as the loss is: the loss itself for the last block, and the outputs of
        the others.

        Args:
            done: the forward pass.
        """
        raise NotImplementedError

    def reference_gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """
        Return backpropagation's gradients for the last batch, by a forward pass of its own, as the
        learner's is cut into blocks. Dropout is drawn anew in it.
        """
        done = self._pass_of(loss, None)
        return backpropagation_gradients(
            self.model, (self._uncut(done).outputs[-1] * done.error).sum()
        )

    def measure(self, loss: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """
        Return error_cosine/BLOCK of each hidden block: of the gradient that it learns from at its
        output (for target propagation, -d) with backpropagation's there.
        """
        done = self._pass_of(loss, target)
        uncut = self._uncut(done)
        with torch.autocast(loss.device.type, enabled=False):
            expected = torch.autograd.grad(uncut.outputs[-1], uncut.outputs[:-1], done.error)
            got = {output: g for output, g in self.roots(done) if g is not None}
        return {
            f"error_cosine/{name}": _cosine(got[output], gradient)
            for name, output, gradient in zip(
                self.block_names[:-1], done.outputs[:-1], expected, strict=True
            )
            if output in got
        }

    def _uncut(self, done: BlockPass) -> BlockPass:
        """A forward pass once more, but not cut."""
        uncut = BlockPass()
        with (
            kept_buffers(self.model),
            torch.random.fork_rng([done.loss.device] if done.loss.is_cuda else []),
            self._watch(uncut, False),
        ):
            self.model(*done.args, **done.kwargs)
        return uncut

    def __getstate__(self) -> dict[str, Any]:
        # A forward pass is neither copied nor saved.
        return {**self.__dict__, "_trace": None, "_earlier": None}

    @contextmanager
    def _watch(self, trace: BlockPass, cut: bool = True) -> Iterator[None]:
        handles = []
        for index, block in enumerate(self.blocks):
            enter, leave = partial(self._enter, trace, index), partial(self._leave, trace, index)
            handles.append(block[0].register_forward_pre_hook(enter))
            handles.append(block[-1].register_forward_hook(partial(leave, cut)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(
        self, trace: BlockPass, index: int, module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        if not (len(trace.inputs) == len(trace.outputs) == index):
            raise ValueError(
                f"the blocks must run once each and in their order: {self.block_names[index]!r} "
                f"ran after {len(trace.outputs)} of them"
            )
        taken = args[0] if args else None
        if index and not self._begun:
            given, same = trace.outputs[-1], None
            if isinstance(taken, Tensor) and taken.numel() == given.numel():
                same = torch.equal(taken.flatten(1), given.flatten(1))
            trace.same.append(same)
        trace.inputs.append(taken)

    def _leave(
        self, trace: BlockPass, index: int, cut: bool, module: nn.Module, args: Any, output: Any
    ) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the block {self.block_names[index]!r} gives a {type(output).__name__}; "
                f"{type(self).__name__} needs blocks that give one tensor"
            )
        last = len(self.blocks) - 1
        if not output.requires_grad and _learn(self.blocks[index]):
            raise ValueError(
                f"the block {self.block_names[index]!r} ran without gradients: activations are "
                "checkpointed with use_reentrant=False, and nothing of it runs under no_grad"
            )
        trace.outputs.append(output)
        if not cut or index == last:
            return output
        cut_off: Tensor = output.detach()
        if index == last - 1 and (self.needs_top_gradient or not _learn(self.blocks[last])):
            cut_off = trace.top = cut_off.requires_grad_()
        # A copy where the next block may begin by changing it, and of a leaf, which would refuse.
        copied = cut_off.requires_grad or self._in_place[index + 1]
        return cut_off.clone() if copied else cut_off


def _learn(block: Iterable[nn.Module]) -> bool:
    return any(parameter.requires_grad for top in block for parameter in top.parameters())


@contextmanager
def kept_buffers(*modules: nn.Module) -> Iterator[None]:
    """Have buffers that are changed within, such as batch norm's statistics, as before after it."""
    before = [(b, b._version, b.clone()) for module in modules for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version:  # others may be saved for a backward pass
                    buffer.copy_(value)


def _cosine(a: Tensor, b: Tensor) -> float:
    return nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


def _as_block(block: Any, names: dict[str, nn.Module]) -> tuple[nn.Module, ...]:
    parts: Sequence[Any] = [block] if isinstance(block, str | nn.Module) else block
    for part in parts:
        if isinstance(part, str) and part not in names:
            raise ValueError(f"there is no module {part!r}; the model has {', '.join(names)}")
    return tuple(names[part] if isinstance(part, str) else part for part in parts)


def _default_blocks(model: nn.Module) -> list[Any]:
    if hasattr(model, "learner_blocks"):
        return list(model.learner_blocks())  # type: ignore[operator]
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"{type(model).__name__} does not say what its blocks are: pass blocks=[...], modules "
            "of the model or their names, from the first to the last; in a config, this "
            "MODEL.LEARNER.NAME needs the MODEL.META_ARCHITECTURE ImageClassifier"
        )
    blocks: list[list[nn.Module]] = [[]]
    complete = False
    for module in model:
        weighted = any(p.dim() >= 2 for p in module.parameters())
        if complete and (weighted or isinstance(module, nn.Flatten)):
            blocks.append([])
            complete = False
        complete = complete or weighted
        blocks[-1].append(module)
    return blocks
