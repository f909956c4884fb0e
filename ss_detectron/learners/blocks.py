"""What the learners share that pass no error from one block of a network to the one below."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ss_detectron.alignment import backpropagation_gradients, compiled_parts
from ss_detectron.layers.functional import is_saving_hooked

from .learner import Learner

__all__ = ["BlockLearner", "BlockPass", "kept_buffers"]

logger = logging.getLogger(__name__)

_NOT_OF_IT = "the loss does not come from the learner's last forward pass"


@dataclass(eq=False)
class BlockPass:
    """
    A forward pass through the blocks, and what has arrived from above. Nothing in it leads to the
    graph above the hidden blocks, which refers to it.
    """

    args: tuple[Any, ...] = ()
    """Of the model."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)
    """The first argument of each block, cut off; in a first pass."""
    outputs: list[Tensor] = field(default_factory=list)
    """Of each block; the last is the logits, cut off, and the others have their graphs."""
    starts: list[Tensor] = field(default_factory=list)
    """What else a gradient begins at; see :meth:`BlockLearner.starts`."""
    wanted: list[Tensor] = field(default_factory=list)
    """What the first of these are to be, for target propagation's inverses."""
    top_gradient: Tensor = field(default_factory=Tensor)
    """The gradient of the loss at what the last block takes in, if the learner needs it."""
    error: Tensor = field(default_factory=Tensor)
    """The gradient of the loss at the logits."""
    target: Tensor | None = None
    """The labels, if they were given."""
    phase: str = ""
    """Of the learner, when the pass was made."""
    complete: bool = False
    """Whether all blocks ran; what they do after it is no part of the pass."""

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Have what blocks do within be no part of the pass."""
        before, self.complete = self.complete, True
        try:
            yield
        finally:
            self.complete = before


class _PassBack(torch.autograd.Function):
    """
    Stands where the error leaves the last block or has not yet entered it, and sends each hidden
    block what the learner says in its place.
    """

    @staticmethod
    def forward(
        ctx: Any, learner: "BlockLearner", done: BlockPass, through: Tensor, *starts: Tensor
    ) -> Tensor:
        ctx.learner, ctx.done = learner, done
        return through.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor) -> Any:
        return None, None, *ctx.learner._pass_back(ctx.done, arrived)


class BlockLearner(Learner):
    """
    Train each block of a network by a gradient at its own output that does not come from the
    blocks above it.

    In training, the outputs of all blocks but the last are cut from the graph; within a block, and
    from the loss to the last one's input, it is that of backpropagation (or of the layers' feedback
    rules). One backward pass, of the loss, fills all gradients.

    A subclass says in :meth:`errors` what arrives at the outputs of the hidden blocks.

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
    """Whether :meth:`errors` asks for the gradient at what the last block takes in."""
    phase = ""
    """Which of its phases a learner is in, if it has any."""

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
        self._done: BlockPass | None = None
        self._ends: list[Tensor] = []  # the logits and, if needed, what the last block took in
        self._passing: BlockPass | None = None  # in backward
        self._begun = False
        self._reshaped: list[torch.Size | None] = [None] * len(self.blocks)
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
        done = BlockPass(args, kwargs, phase=self.phase)
        with self._watch(done, cut=True):
            result = super().forward(*args, **kwargs)
        if not done.complete:
            raise ValueError(
                f"the forward pass did not run the block {self.block_names[len(done.outputs)]!r}"
            )
        self._begun, self._done = True, done
        return result

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
        done = self._last_pass()
        if not loss.requires_grad:
            raise RuntimeError(_NOT_OF_IT)
        done.target, self._passing = target, done
        self._done, self._ends = None, []
        try:  # in full precision, for differences of targets are small
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self._passing = None
        if done.error.dim() == 1:
            raise RuntimeError(_NOT_OF_IT)

    def _last_pass(self) -> BlockPass:
        if self._done is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward needs a forward pass of the learner in training "
                "before it: learner.train(); loss = loss_fn(learner(x), y)"
            )
        return self._done

    def _pass_back(self, done: BlockPass, arrived: Tensor) -> list[Tensor | None]:
        """The gradients of what :class:`_PassBack` was given."""
        if self._passing is not None and self._passing is not done:
            raise RuntimeError(
                f"the loss is of several forward passes, and {type(self).__name__} passes back "
                "one at a time: call backward for each before the next"
            )
        if done.phase != self.phase:
            raise RuntimeError(
                f"{type(self).__name__}.step() came between a forward pass and its backward pass, "
                "at a change of phase: call it after the optimiser's step"
            )
        through: Tensor | None = arrived
        if self.needs_top_gradient:
            done.top_gradient, through = arrived, None
        return [through, *self.gradients(done)]

    def _pass_of(self, loss: Tensor, target: Tensor | None) -> BlockPass:
        """The last forward pass, with what would arrive in it."""
        done = self._last_pass()
        found: Sequence[Tensor] = ()
        if loss.requires_grad:
            found = torch.autograd.grad(loss, self._ends, retain_graph=True, allow_unused=True)
        if not found or any(gradient is None for gradient in found):
            raise RuntimeError(_NOT_OF_IT)
        error, *top = found
        return replace(done, target=target, error=error, top_gradient=top[0] if top else Tensor())

    def errors(self, done: BlockPass) -> list[Tensor]:
        """
        Return the gradient that each hidden block learns from at its output, scaled as the loss is.

        Args:
            done: the forward pass, and what has arrived.
        """
        raise NotImplementedError

    def gradients(self, done: BlockPass) -> list[Tensor | None]:
        """
        Return what begins, in this step, at the output of each hidden block and at each of the
        :meth:`starts`; see :meth:`errors`.
        """
        return [*self.errors(done)]

    def starts(self, done: BlockPass) -> list[Tensor]:
        """
        Return what else is to be passed back with the loss; by default nothing.

        Args:
            done: the forward pass as far as it has come: to the logits, or to the last hidden block
                if the top gradient is needed.
        """
        return []

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
            done.top_gradient = expected[-1]
            got = self.errors(done)
            found = self._measure(done, got)
        for name, gradient, other in zip(self.block_names[:-1], got, expected, strict=True):
            found[f"error_cosine/{name}"] = _cosine(gradient, other)
        return found

    def _measure(self, done: BlockPass, errors: list[Tensor]) -> dict[str, float]:
        """What else there is to know of a pass and its :meth:`errors`."""
        return {}

    def _uncut(self, done: BlockPass) -> BlockPass:
        """A forward pass once more, but not cut."""
        uncut = BlockPass()
        with (
            kept_buffers(self.model),
            torch.random.fork_rng([done.error.device] if done.error.is_cuda else []),
            self._watch(uncut, cut=False),
        ):
            self.model(*done.args, **done.kwargs)
        return uncut

    def __getstate__(self) -> dict[str, Any]:
        # A forward pass is neither copied nor saved.
        return {**self.__dict__, "_done": None, "_ends": []}

    @contextmanager
    def _watch(self, done: BlockPass, cut: bool) -> Iterator[None]:
        handles = []
        for index, block in enumerate(self.blocks):
            if not self._begun:
                enter = partial(self._enter, done, index)
                handles.append(block[0].register_forward_pre_hook(enter))
            leave = partial(self._leave, done, index, cut)
            handles.append(block[-1].register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, done: BlockPass, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if done.complete:
            return
        self._check_order(done, index)
        taken = args[0] if args else None
        if isinstance(taken, Tensor):
            taken = taken.detach()
        if index:
            given, same = done.outputs[-1], None
            if isinstance(taken, Tensor) and taken.numel() == given.numel():
                same = torch.equal(taken.flatten(1), given.flatten(1))
                self._reshaped[index] = None if taken.shape == given.shape else taken.shape[1:]
            self.check_link(index, same)
        done.inputs.append(taken)

    def run_block(self, index: int, below: Tensor) -> Tensor:
        """
        Return what a block gives for another output of the one below. Buffers stay as they are.

        Args:
            index: of the block, not the first.
            below: in the place of that output, of its shape; it is kept.
        """
        shape = self._reshaped[index]
        output = below if shape is None else below.reshape(len(below), *shape)
        if self._in_place[index]:
            output = output.clone()
        with kept_buffers(*self.blocks[index]):
            for module in self.blocks[index]:
                output = module(output)
        return output

    def _check_order(self, done: BlockPass, index: int) -> None:
        if len(done.outputs) != index:
            raise ValueError(
                f"the blocks must run once each and in their order: {self.block_names[index]!r} "
                f"ran after {len(done.outputs)} of them"
            )

    def check_link(self, index: int, same: bool | None) -> None:
        """
        Look, in the first pass, at how a block is linked to the one below.

        Args:
            index: of the block.
            same: whether what it takes in is what the other gave, reshaped at most; None if it is
                of another size.
        """
        if same is False:
            logger.warning(
                "Between the blocks %r and %r something is computed that is in neither, and "
                "%s does not pass the error through it.",
                *(self.block_names[index - 1], self.block_names[index], type(self).__name__),
            )

    def check_block(self, index: int, x: Any, y: Tensor) -> None:
        """
        Look, in the first pass, at what a block computes.

        Args:
            index: of the block.
            x, y: what it took in and gave.
        """

    def _leave(
        self, done: BlockPass, index: int, cut: bool, module: nn.Module, args: Any, output: Any
    ) -> Tensor | None:
        if done.complete:
            return None
        self._check_order(done, index)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the block {self.block_names[index]!r} gives a {type(output).__name__}; "
                f"{type(self).__name__} needs blocks that give one tensor"
            )
        if not self._begun:
            with torch.no_grad(), done.apart():
                self.check_block(index, done.inputs[index], output)
        last = len(self.blocks) - 1
        if not output.requires_grad and _learn(self.blocks[index]):
            raise ValueError(
                f"the block {self.block_names[index]!r} ran without gradients: activations are "
                "checkpointed with use_reentrant=False, and nothing of it runs under no_grad"
            )
        if not cut:
            done.outputs.append(output)
            return None
        if index < last:
            done.outputs.append(output)
            if index == last - 1 and self.needs_top_gradient:
                top = self._join(done, output.detach().requires_grad_())
                self._ends = [top]
                return top
            # The next block may begin by changing it.
            return output.detach().clone() if self._in_place[index + 1] else output.detach()
        done.outputs.append(output.detach())
        done.complete = True
        # The model may go on by changing them, and what is kept is to stay.
        if self.needs_top_gradient:
            logits = output.clone()
            self._ends = [logits, *self._ends]
        else:
            logits = self._join(done, output)
            self._ends = [logits]
        logits.register_hook(partial(setattr, done, "error"))  # type: ignore[no-untyped-call]
        return logits

    def _join(self, done: BlockPass, through: Tensor) -> Tensor:
        """Join what is passed back from there."""
        # A block that is checkpointed is computed once more without this.
        apart = saved_tensors_hooks(_same, _same) if is_saving_hooked() else nullcontext()
        with apart:
            done.starts = self.starts(done)
        hidden = done.outputs[: len(self.blocks) - 1]
        joined: Tensor = _PassBack.apply(self, done, through, *hidden, *done.starts)
        return joined


def _same(saved: Tensor) -> Tensor:
    return saved


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
