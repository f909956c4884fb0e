"""Difference target propagation, and its variants without weight transport."""

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ss_detectron.layers import LocallyConnected2d, LocallyConnectedTranspose2d
from ss_detectron.layers.feedback import seed_of

from .blocks import BlockLearner, BlockPass
from .learner import LEARNER_REGISTRY, feedback_seed

__all__ = [
    "AuxiliaryOutputTargetPropagation",
    "DifferenceTargetPropagation",
    "Inverse",
    "SimplifiedTargetPropagation",
]

_SCHEDULES = "parallel", "alternating"
_LEAST = 1e-20  # what is divided by


class Inverse(nn.Module):
    """
    The learned inverse g_l of a block f_l: a map back of the same kind as the block's layer, with
    weights V of its own, then the nonlinearity of the block below.

    Args:
        layer: the block's one layer with a weight: an ``nn.Linear``, ``nn.Conv2d`` or
            :class:`~ss_detectron.layers.LocallyConnected2d`.
        activation: of the block below; none by default.
        inputs: how many values a linear layer's inverse reads, if not the layer's outputs.
        generator: of the initial V, Glorot's.

    Raises:
        ValueError: there is no inverse of such a layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        activation: nn.Module | None = None,
        inputs: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        back: nn.Module
        if isinstance(layer, nn.Linear):
            back = nn.Linear(inputs or layer.out_features, layer.in_features, device="meta")
        elif (
            isinstance(layer, nn.Conv2d)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        ):
            back = nn.ConvTranspose2d(
                layer.out_channels,
                layer.in_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                groups=layer.groups,
                dilation=layer.dilation,  # type: ignore[arg-type]
                device="meta",
            )
        elif isinstance(layer, LocallyConnected2d):
            back = LocallyConnectedTranspose2d(layer, device="meta")
        else:
            raise ValueError(f"there is no inverse of {layer}: pass inverses=[...]")
        # On the CPU and from the generator: the same on all processes and devices.
        back = back.to_empty(device="cpu").to(layer.weight.dtype)
        if isinstance(back, LocallyConnectedTranspose2d):
            back.reset_parameters(generator)
        else:
            nn.init.xavier_uniform_(back.weight, generator=generator)
            nn.init.zeros_(back.bias)  # type: ignore[arg-type]
        self.layer = back if layer.weight.is_meta else back.to(layer.weight.device)
        self.activation = nn.Identity() if activation is None else copy.deepcopy(activation)

    def forward(self, h: Tensor, like: Tensor) -> Tensor:
        """
        Return g(h).

        Args:
            h: the block's output, (N, ...).
            like: the output of the block below, of whose shape g(h) is.
        """
        if isinstance(self.layer, nn.Linear):
            h = self.layer(h.flatten(1))
        elif isinstance(self.layer, nn.ConvTranspose2d):
            h = self.layer(h, like.shape[2:])
        else:
            h = self.layer(h)
        estimate: Tensor = self.activation(h.reshape(like.shape))
        return estimate


@LEARNER_REGISTRY.register
class DifferenceTargetPropagation(BlockLearner):
    """
    Give each hidden block a target instead of an error (DTP; Lee et al. 2015, arXiv:1412.7525, as
    Bartunov et al. 2018, arXiv:1807.04587, ran it).

    For blocks h_l = f_l(h_(l-1)), logits h_L, p = softmax(h_L) and labels y, the targets of a
    sample are h_l + d_l:

        d_(L-1) = -alpha dE/dh_(L-1)             by the last block's own weights
        d_l     = g_(l+1)(h_(l+1) + d_(l+1)) - g_(l+1)(h_(l+1))

    A hidden block lowers abs(f_l(h_(l-1)) - (h_l + d_l))^2 with its input and its target constant,
    the last one E. The learned inverses g_l, from the second block to the last but one, lower
    abs(g_l(u) - (h_(l-1) + e))^2, where u = f_l(h_(l-1) + e) and e ~ N(0, sigma^2). These losses
    are sums over the units and means over the batch::

        learner = DifferenceTargetPropagation(model, inverse_lr=1e-3)
        optimizer = torch.optim.Adam(learner.parameter_groups(), lr=3e-4)
        loss = F.cross_entropy(learner(x), y)
        learner.backward(loss, target=y)
        optimizer.step()
        learner.step()

    E is the mean cross entropy of the logits. Where it is scaled (accumulation, a gradient scaler),
    the labels must come with it: they tell the scale.

    Args:
        model, blocks: see :class:`~ss_detectron.learners.BlockLearner`. Each block takes what the
            one below gives, reshaped at most, and is one layer with a weight and elementwise
            functions.
        alpha: the step of the top target.
        noise: sigma.
        schedule: "parallel", both updates in each step and from the same old state, or
            "alternating", ``period`` steps of the inverses alone and then as many of the model's
            alone.
        period: of the alternating schedule: the batches of an epoch.
        inverse_lr: of the inverses; the optimiser's by default.
        inverses: modules (h_l, like h_(l-1)) -> an estimate of h_(l-1), for the blocks that have
            one; by default an :class:`Inverse` of each.
        seed: of the inverses' initial weights and of the noise.

    Raises:
        ValueError: the blocks do not fit, or an option is out of its range.
    """

    name = "difference_target_propagation"
    short_name = "dtp"

    top_inverse = False
    """Whether the last block has an inverse as well."""
    denoising = False
    """Whether the inverses are to give h_(l-1) without the noise that the block met."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[Any] | None = None,
        *,
        alpha: float = 0.2,
        noise: float = 0.1,
        schedule: str = "parallel",
        period: int = 0,
        inverse_lr: float | None = None,
        inverses: Iterable[nn.Module] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, blocks)
        if schedule not in _SCHEDULES:
            raise ValueError(f"the schedule is {schedule!r}; choose one of {', '.join(_SCHEDULES)}")
        if schedule == "alternating" and period < 1:
            raise ValueError(f"the period is {period}; alternating needs the batches of an epoch")
        if not (math.isfinite(alpha) and math.isfinite(noise) and noise >= 0):
            raise ValueError(f"alpha is {alpha} and noise {noise}; both are finite, noise not < 0")
        self.alpha, self.noise, self.seed = alpha, noise, seed
        self.schedule, self.period, self.inverse_lr = schedule, period, inverse_lr
        self._steps = self._passes = 0
        # inverses[i] is of the block i + 1.
        count = len(self.blocks) - (1 if self.top_inverse else 2)
        self._own_inverses = inverses is None
        if inverses is None:
            inverses = [self._make_inverse(i) for i in range(1, count + 1)]
        self.inverses = nn.ModuleList(inverses)
        if len(self.inverses) != count:
            raise ValueError(
                f"{type(self).__name__} on {len(self.blocks)} blocks needs {count} inverses, not "
                f"{len(self.inverses)}"
            )

    @classmethod
    def options(cls, cfg: Any) -> dict[str, Any]:
        """Return the keyword arguments that a config's MODEL.LEARNER stands for."""
        keys = cfg.MODEL.LEARNER
        return {
            "alpha": keys.ALPHA,
            "noise": keys.NOISE,
            "schedule": keys.SCHEDULE,
            "period": keys.PERIOD,
            "inverse_lr": keys.INVERSE_LR or None,
            "seed": feedback_seed(cfg),
        }

    @classmethod
    def from_config(cls, cfg: Any, model: nn.Module) -> "DifferenceTargetPropagation":
        return cls(model, **cls.options(cfg))

    def _make_inverse(self, index: int) -> Inverse:
        layer, _ = self._split(index)
        _, activations = self._split(index - 1)
        generator = torch.Generator().manual_seed(seed_of(f"{self.seed}/inverse/{index}"))
        inputs = self._top_inputs(layer) if index == len(self.blocks) - 1 else None
        activation = activations[0] if len(activations) == 1 else nn.Sequential(*activations)
        return Inverse(layer, activation, inputs, generator)

    def _top_inputs(self, layer: Any) -> int | None:
        return None  # the last layer's outputs

    def _split(self, index: int) -> tuple[nn.Module, list[nn.Module]]:
        """Return a block's layer with a weight, and its nonlinearity."""
        parts = [m for top in self.blocks[index] for m in top.modules() if not [*m.children()]]
        parts = [m for m in parts if not isinstance(m, nn.Flatten | nn.Identity)]
        functions = nn.modules.activation.__all__
        if not parts or any(type(m).__name__ not in functions for m in parts[1:]):
            raise ValueError(
                f"no inverse follows from the block {self.block_names[index]!r}: it is no single "
                f"layer with a nonlinearity ({', '.join(type(m).__name__ for m in parts)}); pass "
                "inverses=[...]"
            )
        return parts[0], parts[1:]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def phase(self) -> str:  # type: ignore[override]
        """What the next step updates: "both", "inverses" or "model"."""
        if self.schedule == "parallel":
            return "both"
        return "model" if self._steps // self.period % 2 else "inverses"

    @property
    def needs_top_gradient(self) -> bool:  # type: ignore[override]
        """For the top target, where no inverse makes it."""
        return not self.top_inverse and self.phase != "inverses"

    def _hidden(self, done: BlockPass) -> list[Tensor]:
        # Under autocast the activations are of another type.
        hidden, dtype = done.outputs[: len(self.blocks) - 1], self._dtype
        return [output.detach().to(dtype) for output in hidden]

    def starts(self, done: BlockPass) -> list[Tensor]:
        """Return the inverses' estimates, and in several processes what is idle."""
        estimates: list[Tensor] = []
        if self.phase != "model":
            with torch.autocast(done.outputs[0].device.type, enabled=False), done.apart():
                estimates, done.wanted = self.estimates(done, self._hidden(done))
        return estimates + self._idle_starts()

    def errors(self, done: BlockPass) -> list[Tensor]:
        return self._errors(done, _loss_scale(done))

    def _errors(self, done: BlockPass, scale: Tensor) -> list[Tensor]:
        factor = -_of_square(done, scale)
        return [factor * d for d in self.target_steps(done, self._hidden(done), scale)]

    def gradients(self, done: BlockPass) -> list[Tensor | None]:
        scale = _loss_scale(done)
        if not self._passes & (self._passes - 1):  # now and then, for a GPU has to wait
            _check_is_cross_entropy(done, scale)
        self._passes += 1
        gradients: list[Tensor | None] = [None] * (len(self.blocks) - 1)
        if self.phase != "inverses":
            gradients = [*self._errors(done, scale)]
        if done.wanted:
            factor = _of_square(done, scale)
            for estimate, wanted in zip(done.starts, done.wanted, strict=False):
                gradients.append((estimate.detach() - wanted).mul_(factor))
        return gradients + [torch.zeros_like(p) for p in done.starts[len(done.wanted) :]]

    def _pass_back(self, done: BlockPass, arrived: Tensor) -> list[Tensor | None]:
        through, *others = super()._pass_back(done, arrived)
        return [None if self.phase == "inverses" else through, *others]

    @torch.no_grad()
    def target_steps(self, done: BlockPass, h: list[Tensor], scale: Tensor) -> list[Tensor]:
        """
        Return d_1 to d_(L-1), from each hidden block's output to its target.

        Args:
            done: the forward pass.
            h: the outputs of the hidden blocks.
            scale: of the loss over the mean cross entropy.
        """
        steps = [self.top_step(done, h, scale)]
        for index in range(len(h) - 1, 0, -1):
            inverse, below = self.inverses[index - 1], h[index - 1]
            steps.append(inverse(h[index] + steps[-1], below) - inverse(h[index], below))
        return steps[::-1]

    def top_step(self, done: BlockPass, h: list[Tensor], scale: Tensor) -> Tensor:
        """Return d_(L-1); see :meth:`target_steps`."""
        gradient = done.top_gradient.to(h[-1].dtype).view_as(h[-1])
        return gradient * (-self.alpha * len(gradient) / scale)

    def estimates(self, done: BlockPass, h: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """
        Return what each inverse makes of its block's output for a noisy h, from the second block's
        up, and what it is to make of it; see :meth:`target_steps`.
        """
        estimates, wanted = [], []
        noises = self._draw(h[: len(self.inverses)])
        for index, (inverse, noise) in enumerate(zip(self.inverses, noises, strict=True), start=1):
            below = h[index - 1]
            noisy = torch.add(below, noise, alpha=self.noise)
            with torch.no_grad():
                output = self.run_block(index, noisy)
                if index == len(self.blocks) - 1:
                    output = self.top_code(output.softmax(1), noisy)
            estimates.append(inverse(output, below))
            wanted.append(below if self.denoising else noisy)
        return estimates, wanted

    def inverse_losses(self, done: BlockPass, h: list[Tensor]) -> list[Tensor]:
        """Return each inverse's loss, from the second block's up; see :meth:`estimates`."""
        pairs = zip(*self.estimates(done, h), strict=True)
        return [(r - wanted).square().sum() / len(wanted) for r, wanted in pairs]

    def top_code(self, p: Tensor, below: Tensor) -> Tensor:
        """
        Return what the last block's inverse reads.

        Args:
            p: softmax of the logits, (N, classes), or the labels in their place.
            below: the output of the last block but one.
        """
        return p

    def _draw(self, h: list[Tensor]) -> Iterator[Tensor]:
        """
        Noise N(0, 1) for each h, that does not depend on how many processes share a batch: the
        first of as many numbers as the largest takes, for no inverse sees another's noise, and
        numbers cost as much as layers do.
        """
        if not h:
            return
        rank, world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        generator = torch.Generator(h[0].device)
        generator.manual_seed(seed_of(f"{self.seed}/noise/{self._passes}"))
        count = world * max(each.numel() for each in h)
        drawn = h[0].new_empty(count).normal_(generator=generator)
        for each in h:
            # as samplers share out a batch
            yield drawn[: world * each.numel()].view(-1, *each.shape[1:])[rank::world]

    def check_link(self, index: int, same: bool | None) -> None:
        if not same:
            below, above = self.block_names[index - 1 : index + 1]
            raise ValueError(
                f"{type(self).__name__} needs a chain of blocks, and {above!r} does not take what "
                f"{below!r} gives"
            )

    def check_block(self, index: int, x: Any, y: Tensor) -> None:
        if not self._own_inverses or not self.inverses:
            return
        layer, functions = self._split(index)
        expected = layer(x.flatten(1) if isinstance(layer, nn.Linear) else x)
        for function in functions:
            expected = function(expected)
        if not torch.allclose(expected.reshape(y.shape), y, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"no inverse follows from the block {self.block_names[index]!r}: its forward "
                "computes more than its layer and its nonlinearity; pass inverses=[...]"
            )

    def _idle_starts(self) -> list[Tensor]:
        """
        In several processes, all parameters must come up in a backward pass: those that it does not
        update get a gradient of zero, which :meth:`backward` takes away again.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return []
        return [*self._idle()]

    def _idle(self) -> list[nn.Parameter]:
        if self.phase == "both":
            return []
        part = self.model if self.phase == "inverses" else self.inverses
        return [p for p in part.parameters() if p.requires_grad]

    def backward(self, loss: Tensor, target: Tensor | None = None) -> None:
        super().backward(loss, target)
        for parameter in self._idle():
            parameter.grad = None

    def measure(self, loss: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """
        Return, beside error_cosine, target_step/BLOCK, the norm of d over that of h, and
        inverse_loss/BLOCK.
        """
        return super().measure(loss, target)

    @torch.no_grad()
    def _measure(self, done: BlockPass, errors: list[Tensor]) -> dict[str, float]:
        factor, hidden = _of_square(done, _loss_scale(done)), self._hidden(done)
        found = {
            f"target_step/{name}": (error.norm() / factor / h.norm()).item()
            for name, error, h in zip(self.block_names[:-1], errors, hidden, strict=True)
        }
        losses = self.inverse_losses(done, hidden)
        for name, value in zip(self.block_names[1:], losses, strict=False):
            found[f"inverse_loss/{name}"] = value.item()
        return found

    def step(self) -> None:
        super().step()
        self._steps += 1

    def own_parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().own_parameter_groups()
        if self.inverse_lr is not None:
            groups = [{**group, "lr": self.inverse_lr} for group in groups]
        return groups

    def get_extra_state(self) -> Tensor:
        """Return how many steps and backward passes there were: they decide phase and noise."""
        return torch.tensor([self._steps, self._passes])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from there."""
        self._steps, self._passes = state.tolist()


@LEARNER_REGISTRY.register
class SimplifiedTargetPropagation(DifferenceTargetPropagation):
    """
    Difference target propagation without weight transport in the last block (SDTP; Bartunov et al.
    2018): its inverse carries labels down,

        d_(L-1) = g_L(p + t (y - p)) - g_L(p),  t = 1 in the paper

    and the inverses lower abs(g_l(u) - h_(l-1))^2, g_L with u = softmax(f_L(h_(L-1) + e)).

    Args:
        target_step: t; a smaller one damps the top target.
        others: see :class:`DifferenceTargetPropagation`; alpha has no meaning here.
    """

    name = "simplified_difference_target_propagation"
    short_name = "sdtp"
    top_inverse = True
    denoising = True

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[Any] | None = None,
        *,
        target_step: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, blocks, **options)
        self.target_step = target_step

    @classmethod
    def options(cls, cfg: Any) -> dict[str, Any]:
        return {**super().options(cfg), "target_step": cfg.MODEL.LEARNER.TARGET_STEP}

    def top_step(self, done: BlockPass, h: list[Tensor], scale: Tensor) -> Tensor:
        if done.target is None:
            raise ValueError(f"{type(self).__name__} needs the labels: backward(loss, target=y)")
        inverse, below = self.inverses[-1], h[-1]
        p = done.outputs[-1].to(self._dtype).softmax(1)
        wanted = p + self.target_step * (F.one_hot(done.target, p.shape[1]) - p)
        reached: Tensor = inverse(self.top_code(p, below), below)
        aimed: Tensor = inverse(self.top_code(wanted, below), below)
        return aimed - reached


@LEARNER_REGISTRY.register
class AuxiliaryOutputTargetPropagation(SimplifiedTargetPropagation):
    """
    SDTP whose last inverse also reads an auxiliary output z = tanh(Z h_(L-1)), with Z fixed and
    random (AO-SDTP; Bartunov et al. 2018): d_(L-1) = g_L([y, z]) - g_L([p, z]).

    Args:
        auxiliary_units: the width of z.
        others: see :class:`SimplifiedTargetPropagation`.
    """

    name = "auxiliary_output_sdtp"
    short_name = "aosdtp"

    auxiliary: Tensor
    """Z, (auxiliary_units, units of the last hidden block)."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[Any] | None = None,
        *,
        auxiliary_units: int = 256,
        **options: Any,
    ) -> None:
        self.auxiliary_units = auxiliary_units
        super().__init__(model, blocks, **options)

    @classmethod
    def options(cls, cfg: Any) -> dict[str, Any]:
        return {**super().options(cfg), "auxiliary_units": cfg.MODEL.LEARNER.AUXILIARY_UNITS}

    def _top_inputs(self, layer: Any) -> int:
        generator = torch.Generator().manual_seed(seed_of(f"{self.seed}/auxiliary"))
        drawn = torch.empty(self.auxiliary_units, layer.in_features, dtype=layer.weight.dtype)
        nn.init.xavier_uniform_(drawn, generator=generator)
        if not layer.weight.is_meta:
            drawn = drawn.to(layer.weight.device)
        self.register_buffer("auxiliary", drawn)
        return int(layer.out_features) + self.auxiliary_units

    def top_code(self, p: Tensor, below: Tensor) -> Tensor:
        return torch.cat([p, torch.tanh(F.linear(below.flatten(1), self.auxiliary))], 1)


def _cross_entropys_error(logits: Tensor, labels: Tensor) -> Tensor:
    """N times the gradient of the mean cross entropy at the logits, p - y, in float32 or better."""
    p = logits.detach().softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return p.scatter_(1, labels[:, None], -1.0, reduce="add")


def _loss_scale(done: BlockPass) -> Tensor:
    """How many times the mean cross entropy the loss is, by its gradient; 1 without labels."""
    logits = done.outputs[-1]
    if done.target is None:
        kept = torch.promote_types(logits.dtype, torch.float32)
        return torch.ones((), dtype=kept, device=logits.device)
    expected = _cross_entropys_error(logits, done.target).flatten()
    error = done.error.flatten().to(expected.dtype)
    # Where all is fitted to the last bit there is nothing to learn, whatever the scale.
    found = error.dot(expected) / expected.dot(expected).clamp_min(_LEAST)
    return (found * len(logits)).clamp_min(_LEAST)


def _of_square(done: BlockPass, scale: Tensor) -> Tensor:
    """The gradient of abs(a - b)^2 over a - b, of a mean over the batch."""
    return 2 / len(done.outputs[-1]) * scale


def _check_is_cross_entropy(done: BlockPass, scale: Tensor) -> None:
    if done.target is None:
        return
    logits, count = done.outputs[-1], len(done.outputs[-1])
    expected = _cross_entropys_error(logits, done.target)
    missed = (done.error * count - expected * scale).norm()
    # A batch that is almost fitted says little.
    if expected.norm() > 1e-3 * count**0.5 and missed > 0.03 * (done.error * count).norm():
        raise ValueError(
            "target propagation is defined for the mean cross entropy of the logits, and this loss "
            "is another (label smoothing, class weights)"
        )
