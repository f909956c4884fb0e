"""The feedback rules: what stands in the weight's place when the error flows back.

A rule is one class in :data:`FEEDBACK_REGISTRY`. It maps the forward weight W to the feedback
weight B and says what state it keeps: none, a fixed buffer, or a learned parameter. All kinds of
layers share it.

| name | short | B | state |
|---|---|---|---|
| backpropagation | bp | W | |
| sign_symmetry | ss | s sign(W), as W changes (uSF) | |
| sign_symmetry_fixed_magnitude | frsf | abs(M) o sign(W), M drawn once | feedback_magnitude |
| sign_symmetry_batchwise_magnitude | brsf | the same, M drawn anew after each update of W | |
| feedback_alignment | fa | random, fixed | feedback_weight |
| feedback_alignment_signed_init | fasi | s sign(W at the start), fixed | feedback_weight |
| kolen_pollack | kp | random at the start, then updated as W is | feedback_weight, learned |
| weight_mirror | wm | learns from noise sent through the layer | feedback_weight |
| information_alignment | ia | the same, or from what the layer takes in | feedback_weight |

Sources: Lillicrap et al. 2016 (FA); Liao, Leibo and Poggio 2016, arXiv:1510.05067 (uSF, frSF,
brSF); Xiao et al. 2019, arXiv:1811.03567 (FA with signed initialisation, in the authors' code);
Akrout et al. 2019, arXiv:1904.05391 (Kolen-Pollack, weight mirrors); Kunin et al. 2020,
arXiv:2003.01513 (information alignment).

How large B is decides whether training works, so the magnitude s is explicit: ``gain`` times one
of :data:`FEEDBACK_SCALES`. Random feedback is drawn from N(0, s^2), except where the source of a
scale draws it otherwise.
"""

import functools
import hashlib
import logging
import math
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from .registry import Registry

__all__ = ["FEEDBACK_REGISTRY", "FEEDBACK_SCALES", "FeedbackRule", "Fans", "get_rule", "seed_of"]

logger = logging.getLogger(__name__)


class Fans(NamedTuple):
    """What a scale needs to know of the layer besides its weight."""

    fan_in: int
    """C_in / groups * the kernel's size: the inputs of one output unit (of a transposed convolution
    with a stride, this convention counts more)."""
    fan_out: int
    """C_out * the kernel's size (as torchvision and the authors count it, whatever the groups)."""
    is_linear: bool


class FeedbackScale(NamedTuple):
    """A formula for the magnitude s, and how random feedback of that magnitude is drawn."""

    magnitude: Callable[[Tensor, Fans], Tensor]
    """(weight, fans) -> s, a scalar tensor on the weight's device."""
    uniform_bound: Callable[[Fans], float | None] = lambda fans: None
    """Random feedback is U(-bound s, bound s); N(0, s^2) where this is None."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that magnitudes are computed in: the weight's, but float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _mean_abs(weight: Tensor, fans: Fans) -> Tensor:
    return weight.abs().mean(dtype=_wide(weight.dtype))


def _root_mean_square(weight: Tensor, fans: Fans) -> Tensor:
    norm = torch.linalg.vector_norm(weight, dtype=_wide(weight.dtype))
    return cast(Tensor, norm / math.sqrt(weight.numel()))


def _kaiming(weight: Tensor, fans: Fans) -> Tensor:
    s = 1 / math.sqrt(fans.fan_in) if fans.is_linear else math.sqrt(2 / fans.fan_out)
    return _constant(weight, s)


def _xavier(weight: Tensor, fans: Fans) -> Tensor:
    return _constant(weight, math.sqrt(2 / (fans.fan_in + fans.fan_out)))


def _constant(weight: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=_wide(weight.dtype), device=weight.device)


FEEDBACK_SCALES: dict[str, FeedbackScale] = {
    # The mean of abs(W) now: B has W's L1 norm, and less than its L2 norm.
    "mean_abs": FeedbackScale(_mean_abs),
    # The root mean square of W now: B has W's L2 norm.
    "rms": FeedbackScale(_root_mean_square),
    # The authors' code (Xiao et al. 2019): constants of the layer's shape.
    "kaiming": FeedbackScale(_kaiming, lambda fans: 1.0 if fans.is_linear else None),
    # BioTorch: the standard deviation of Glorot and Bengio's (2010) uniform initialisation.
    "xavier": FeedbackScale(_xavier, lambda fans: math.sqrt(3)),
}


class FeedbackRule:
    """
    How one layer's feedback weight B comes from its forward weight W.

    A new rule is a subclass with a ``name``, registered with ``@FEEDBACK_REGISTRY.register()``,
    that overrides :meth:`feedback` and, if it keeps state, names it in ``state_name`` and makes it
    in :meth:`initial_state`. An instance belongs to one layer, or to those that share a weight, and
    never changes.

    Args:
        scale: one of :data:`FEEDBACK_SCALES`.
        gain: multiplies the scale's magnitude.
        seed: with ``layer_name``, determines everything that is drawn at random.
        layer_name: the layer's name within the converted module.

    ``str()`` gives the name and what it is set to.

    Raises:
        ValueError: unknown scale, or a gain that is not a positive number.
    """

    name: ClassVar[str] = ""
    """The name in the registry and in reports."""
    short_name: ClassVar[str] = ""
    """What the literature calls it, in lower case."""
    other_names: ClassVar[tuple[str, ...]] = ()
    state_name: ClassVar[str | None] = None
    """The buffer or parameter that holds the state; must begin with 'feedback'."""
    learned: ClassVar[bool] = False
    """Whether the state is a parameter that receives the weight's gradient."""
    counts_updates: ClassVar[bool] = False
    """Whether the layer counts how often W has been updated
    (:func:`~ss_detectron.layers.advance_feedback`): the state of a rule that has no other."""
    has_factor: ClassVar[bool] = False
    """Whether the layer keeps a number beside the state, the buffer feedback_factor, which is 1 at
    first; :meth:`feedback` then takes both as its state."""
    needs_inputs: ClassVar[bool] = False
    """Whether :meth:`update` is to have what the layer took in."""
    traced: ClassVar[bool] = True
    """Whether a compiler (torch.compile) looks into :meth:`feedback`. Otherwise it is one operator
    to it, for which the rule must be registered: where the compiler's code is slower, and always
    where updates are counted, because their number must not become a constant."""

    def __init__(
        self, scale: str = "mean_abs", gain: float = 1.0, seed: int = 0, layer_name: str = ""
    ) -> None:
        if scale not in FEEDBACK_SCALES:
            raise ValueError(
                f"unknown feedback scale {scale!r}; choose one of {', '.join(FEEDBACK_SCALES)}"
            )
        real = isinstance(gain, numbers.Real) and not isinstance(gain, bool)
        if not (real and math.isfinite(gain) and gain > 0):
            raise ValueError(f"the feedback gain is {gain!r}; it must be a positive number")
        self.scale = scale
        self.gain = float(gain)
        self.seed = seed
        self.layer_name = layer_name

    @property
    def state_is_count(self) -> bool:
        """Whether the number of updates is all the state there is."""
        return self.counts_updates and self.state_name is None

    def __str__(self) -> str:
        options = f"scale={self.scale}, gain={self.gain:g}"
        if self.state_name is not None or self.counts_updates:
            options += f", seed={self.seed}"
        return f"{self.name}({options})"

    def feedback(self, weight: Tensor, state: Any, fans: Fans) -> Tensor:
        """
        B for this moment's W, of W's shape; called in the backward pass.

        Args:
            weight: W.
            state: what :meth:`initial_state` made, as it is now; for a rule that
                ``counts_updates``, how often W has been updated; for one that ``has_factor``,
                (state, factor).
            fans: of the layer.
        """
        raise NotImplementedError(f"rule {self.name!r} does not say what its feedback is")

    def initial_state(self, weight: Tensor, fans: Fans) -> Tensor | None:
        """
        The state at conversion, of W's shape and exactly as :meth:`feedback` uses it; made anew
        when a checkpoint brings another W without feedback.
        """
        return None

    def update(
        self, layer: Any, weight: Tensor, state: Tensor, updates: int, inputs: list[Tensor]
    ) -> None:
        """
        Change the state in place, after an update of W; of rules that count updates and keep state.

        Args:
            layer: an :class:`~ss_detectron.layers.AsymmetricLayer`.
            weight: W.
            state: of the rule.
            updates: which update this is, from 1.
            inputs: what the layer took in since the last one, the last 16 times at most, for a
                rule that ``needs_inputs``.
        """

    def magnitude(self, weight: Tensor, fans: Fans) -> Tensor:
        """Return s, a scalar tensor: gain times the scale; 0 of a weight without elements."""
        if not weight.numel():
            return _constant(weight, 0.0)
        magnitude = FEEDBACK_SCALES[self.scale].magnitude(weight, fans)
        return magnitude if self.gain == 1 else magnitude * self.gain

    def sign(self, weight: Tensor, fans: Fans) -> Tensor:
        """Return s sign(W). A weight that is exactly zero gets no feedback."""
        # First, so that the signs have the memory that it has just used: new memory costs more.
        magnitude = self.magnitude(weight, fans)
        return torch.sign(weight).mul_(magnitude)

    def draw(self, weight: Tensor, fans: Fans) -> Tensor:
        """
        Random feedback of magnitude s, of W's shape, type and device. The same for the same seed
        and layer name on every rank: it comes from a generator of its own, on the CPU, that no
        other random state touches.
        """
        generator = torch.Generator("cpu").manual_seed(seed_of(f"{self.seed}/{self.layer_name}/0"))
        drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        bound = FEEDBACK_SCALES[self.scale].uniform_bound(fans)
        if bound is None:
            drawn.normal_(generator=generator)
        else:
            drawn.uniform_(-bound, bound, generator=generator)
        magnitude = self.magnitude(weight, fans)
        drawn = drawn.to(weight.device, magnitude.dtype).mul_(magnitude)
        # empty_like keeps the weight's memory format, which the convolution wants of B as well.
        return torch.empty_like(weight, requires_grad=False).copy_(drawn)

    def multiply_at_random(self, tensor: Tensor, fans: Fans, index: int) -> Tensor:
        """
        Multiplies ``tensor`` in place by the absolute values of random feedback of magnitude 1,
        at the cost of a multiplication: each part of it meets a window, at a random place, of one
        table of 4 million random numbers (Salimans et al. 2017, arXiv:1703.03864, share noise
        likewise). The places depend on seed, layer name and ``index`` alone.
        """
        bound = FEEDBACK_SCALES[self.scale].uniform_bound(fans)
        table = _magnitude_table(self.seed, bound, tensor.device)
        for i, part in enumerate(_parts(tensor)):
            place = seed_of(f"{self.seed}/{self.layer_name}/{index}/{i}")
            start = place % (_TABLE_SIZE - part.numel() + 1)
            part.mul_(table[start : start + part.numel()].view(part.shape))
        return tensor


def seed_of(label: str) -> int:
    """Return 63 bits of the label's hash: the same seed for the same label on every machine."""
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") >> 1


_TABLE_SIZE = 1 << 22


@functools.lru_cache(maxsize=2)
def _magnitude_table(seed: int, bound: float | None, device: torch.device) -> Tensor:
    """Absolute values of N(0, 1), or U(0, bound); float32, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed_of(f"{seed}/table"))
    table = torch.empty(_TABLE_SIZE, dtype=torch.float32, device="cpu")
    if bound is None:
        table.normal_(generator=generator).abs_()
    else:
        table.uniform_(0, bound, generator=generator)
    return table.to(device)


def _parts(tensor: Tensor) -> list[Tensor]:
    """Views that make up ``tensor``, each of at most a quarter of the table."""
    if tensor.numel() <= _TABLE_SIZE // 4:
        return [tensor]
    dim = next(d for d, size in enumerate(tensor.shape) if size > 1)
    return [part for half in tensor.chunk(2, dim) for part in _parts(half)]


def _check_state(rule: type[FeedbackRule]) -> None:
    if rule.state_name is not None and not rule.state_name.startswith("feedback"):
        raise ValueError(
            f"{rule.__name__}.state_name is {rule.state_name!r}; it must begin with 'feedback', "
            "so that a checkpoint shows what belongs to the rule"
        )
    if rule.state_name is not None and rule.initial_state is FeedbackRule.initial_state:
        raise ValueError(f"{rule.__name__} keeps {rule.state_name}: it needs an initial_state")
    if rule.learned and rule.counts_updates:
        raise ValueError(f"{rule.__name__} counts updates: its state cannot be learned as well")
    if rule.needs_inputs and not rule.counts_updates:
        raise ValueError(f"{rule.__name__} needs inputs for updates, which it does not count")


FEEDBACK_REGISTRY = Registry("feedback rule", FeedbackRule, _check_state)
"""The rules by name: subclasses of :class:`FeedbackRule`."""


def get_rule(rule: str | type[FeedbackRule]) -> type[FeedbackRule]:
    """
    Return the rule's class, from its name, however it is written, or itself.

    Raises:
        ValueError: no such rule; names those there are.
    """
    if isinstance(rule, type):
        return FEEDBACK_REGISTRY.check(rule)
    return FEEDBACK_REGISTRY.get(rule)


@FEEDBACK_REGISTRY.register()
class Backpropagation(FeedbackRule):
    """B = W: the control."""

    name = "backpropagation"
    short_name = "bp"
    other_names = ("backprop",)

    def feedback(self, weight: Tensor, state: Any, fans: Fans) -> Tensor:
        return weight


@FEEDBACK_REGISTRY.register()
class SignSymmetry(FeedbackRule):
    """B = s sign(W), following W: uniform sign-concordant feedback (uSF)."""

    name = "sign_symmetry"
    short_name = "ss"
    other_names = ("uSF", "uniform sign-concordant feedback", "uniform sign-concordant feedbacks")
    traced = False

    def feedback(self, weight: Tensor, state: Any, fans: Fans) -> Tensor:
        return self.sign(weight, fans)


@FEEDBACK_REGISTRY.register()
class SignSymmetryFixedMagnitude(FeedbackRule):
    """B = abs(M) o sign(W) with M drawn once: fixed random magnitude (frSF)."""

    name = "sign_symmetry_fixed_magnitude"
    short_name = "frsf"
    other_names = (
        "fixed random magnitude sign-concordant feedback",
        "fixed random magnitude sign-concordant feedbacks",
    )
    state_name = "feedback_magnitude"

    def feedback(self, weight: Tensor, state: Any, fans: Fans) -> Tensor:
        return torch.sign(weight).mul_(state)

    def initial_state(self, weight: Tensor, fans: Fans) -> Tensor:
        return self.draw(weight, fans).abs_()


@FEEDBACK_REGISTRY.register()
class SignSymmetryBatchwiseMagnitude(FeedbackRule):
    """
    B = abs(M) o sign(W) with M drawn anew after each update of W: batchwise random magnitude
    (brSF). M itself is not kept, it follows from how often W has been updated: a layer called
    several times between two updates meets the same. Updates are counted by
    :func:`~ss_detectron.layers.advance_feedback`, which a learner's ``step()`` calls.
    """

    name = "sign_symmetry_batchwise_magnitude"
    short_name = "brsf"
    other_names = (
        "batchwise random magnitude sign-concordant feedback",
        "batchwise random magnitude sign-concordant feedbacks",
    )
    counts_updates = True

    def feedback(self, weight: Tensor, state: Any, fans: Fans) -> Tensor:
        return self.multiply_at_random(self.sign(weight, fans), fans, state)


@FEEDBACK_REGISTRY.register()
class FeedbackAlignment(FeedbackRule):
    """B random and fixed (FA)."""

    name = "feedback_alignment"
    short_name = "fa"
    state_name = "feedback_weight"

    def feedback(self, weight: Tensor, state: Any, fans: Fans) -> Tensor:
        return cast(Tensor, state)

    def initial_state(self, weight: Tensor, fans: Fans) -> Tensor:
        return self.draw(weight, fans)

    def state_of(self, feedback: Tensor, weight: Tensor) -> Tensor:
        """Return the state, with a factor of 1, by which B is ``feedback``."""
        return feedback

    def mirrored(self, matrix: Tensor, samples: int) -> Tensor:
        """
        Return gain times the mean of y x^T over ``samples * inputs`` vectors of noise x ~ N(0, 1),
        where y = W x: what they show of W.

        The sum of x x^T is drawn at once, as A A^T with a lower triangular A (Bartlett 1933): the
        same distribution at the price of one vector per input. On the CPU, as other feedback is.

        Args:
            matrix: W, (..., outputs, inputs).
        """
        inputs = matrix.shape[-1]
        generator = torch.Generator("cpu")
        generator.manual_seed(seed_of(f"{self.seed}/{self.layer_name}/mirrored"))
        as_drawn: Any = {"dtype": torch.float32, "device": "cpu"}
        factor = torch.randn(inputs, inputs, generator=generator, **as_drawn).tril_(-1)
        degrees = samples * inputs - torch.arange(inputs, **as_drawn)
        # Half a chi square. (torch.distributions take no generator.)
        halves = torch._standard_gamma(degrees / 2, generator=generator)
        factor.diagonal().copy_(halves.mul_(2).sqrt_())
        factor = factor.to(matrix.device, matrix.dtype)
        return (matrix @ factor @ factor.t()).mul_(self.gain / (samples * inputs))


@FEEDBACK_REGISTRY.register()
class FeedbackAlignmentSignedInit(FeedbackAlignment):
    """B = s sign(W at the start), fixed."""

    name = "feedback_alignment_signed_init"
    short_name = "fasi"

    def initial_state(self, weight: Tensor, fans: Fans) -> Tensor:
        return self.sign(weight, fans)


@FEEDBACK_REGISTRY.register()
class KolenPollack(FeedbackAlignment):
    """
    B starts random and receives W's gradient; with the same learning rate and weight decay it
    converges to W (Kolen and Pollack 1994; Akrout et al. 2019). Layers that share one W when they
    are converted share B. Where others use W as well (an embedding), B would miss a part of what W
    learns: such layers stay on backpropagation.
    """

    name = "kolen_pollack"
    short_name = "kp"
    learned = True


class FoldedKolenPollack(KolenPollack):
    """
    The same feedback as a fixed offset from W and one number: B = W + c (B_0 - W_0). What W and B
    receive alike cancels in their difference, and weight decay is all that is left of it: c follows
    the optimiser as a parameter does whose gradient is always zero
    (:func:`ss_detectron.solver.fold_kolen_pollack` sees to that). The name is that of the rule.
    """

    learned = False
    state_name = "feedback_offset"
    has_factor = True

    def feedback(self, weight: Tensor, state: Any, fans: Fans) -> Tensor:
        offset, factor = state
        return torch.addcmul(weight, offset, factor)

    def initial_state(self, weight: Tensor, fans: Fans) -> Tensor:
        return self.state_of(self.draw(weight, fans), weight)

    def state_of(self, feedback: Tensor, weight: Tensor) -> Tensor:
        return feedback - weight


@FEEDBACK_REGISTRY.register()
class WeightMirror(FeedbackAlignment):
    """
    B starts random and grows along W: after each update of W, noise x ~ N(0, 1) goes into the
    layer, and B moves to the mean of y x^T over the noise by a share of ``rate``, where y = W x
    without bias and nonlinearity (Akrout et al. 2019, Algorithm 1, whose learning rate and decay
    are one here, so that B becomes ``gain`` W). The mean of y x^T is W. ``scale`` says how large
    the random start is.

    A subclass may have another ``rate`` and number of ``samples``. B follows W at a distance of
    1 / rate updates, and misses it by a noise of sqrt(rate * fan_in / (2 samples)) of its norm.
    """

    name = "weight_mirror"
    short_name = "wm"
    counts_updates = True
    learned = False

    rate: ClassVar[float] = 1e-3
    samples: ClassVar[int] = 32

    def update(
        self, layer: Any, weight: Tensor, state: Tensor, updates: int, inputs: list[Tensor]
    ) -> None:
        matrix = layer.as_matrix(weight)  # (..., outputs, inputs)
        noise = self.noise(matrix, updates)
        mirrored = matrix @ noise @ noise.t() * (self.gain / self.samples)
        contiguous = state.contiguous()  # of which a matrix is a view
        layer.as_matrix(contiguous).lerp_(mirrored, self.rate)
        state.copy_(contiguous)

    def noise(self, matrix: Tensor, updates: int) -> Tensor:
        """Draw what goes into a layer, (inputs, samples), the same on every process."""
        generator = torch.Generator(matrix.device)
        generator.manual_seed(seed_of(f"{self.seed}/{self.layer_name}/mirror/{updates}"))
        shape = (matrix.shape[-1], self.samples)
        return torch.randn(shape, generator=generator, dtype=matrix.dtype, device=matrix.device)


@FEEDBACK_REGISTRY.register()
class InformationAlignment(WeightMirror):
    """
    B starts random and descends, after each update of W, a local function of what goes into the
    layer, x, and y = W x without bias and nonlinearity (Kunin et al. 2020):

        -alpha gain tr(x^T B^T y) + gamma / 2 abs(B^T y)^2 + beta / 2 abs(B)^2

    where products with x and y are means over samples. The minimum is, for a linear layer whose
    inputs have the second moment S,

        B^T = alpha gain S W^T (beta I + gamma W S W^T)^-1

    x is a weight mirror's noise, an option of the authors' code, so that S = I: W is close to the
    minimum if gamma abs(W)^2 is well below beta (theirs are equal by default; on MNIST's five
    layers that is 30 degrees, and 0.1 is about 12). A convolution's noise is what one output sees.

    ``needs_inputs = True`` in a subclass makes x what the layer takes in, scaled to a mean square
    of 1. That needs no phase of noise, but S is far from I where a few components carry most of the
    activity: on MNIST, B stays 60 degrees from W and teaches no better than feedback alignment.

    A subclass may also have another ``rate``, number of ``samples``, ``alpha``, ``beta`` and
    ``gamma``. ``scale`` says how large the random start is. A step is rate / (1 + rate c) times the
    slope, where c is the function's curvature along it: so B comes no farther from the minimum,
    however wide the layer and correlated its inputs. Inputs without elements count for nothing; a
    step that is not finite is not made, which a warning says once for each layer.
    """

    name = "information_alignment"
    short_name = "ia"

    alpha: ClassVar[float] = 1.0
    beta: ClassVar[float] = 1.0
    gamma: ClassVar[float] = 0.1

    def update(
        self, layer: Any, weight: Tensor, state: Tensor, updates: int, inputs: list[Tensor]
    ) -> None:
        wide = _wide(weight.dtype)
        contiguous, weight = state.to(wide).contiguous(), weight.to(wide)
        if self.needs_inputs:
            feedback = contiguous
            inputs = [x.to(wide) for x in inputs if x.numel()]
            slope, down = self._of_inputs(layer, weight, feedback, inputs)
        else:
            feedback = layer.as_matrix(contiguous)
            slope, down = self._of_noise(layer.as_matrix(weight), feedback, updates)
        square = slope.square().sum()
        curvature = self.beta + self.gamma * down / square
        share = self.rate / (1 + self.rate * curvature)
        if (share * square).isfinite():
            feedback.sub_(slope.mul_(share))
            state.copy_(contiguous)
        elif square != 0 and (inputs or not self.needs_inputs):
            _warn_of_no_step(self.name, self.layer_name)

    def _of_noise(self, weight: Tensor, feedback: Tensor, updates: int) -> tuple[Tensor, Tensor]:
        """Return the slope and, along it, the mean of abs(slope^T y)^2; of matrices."""
        noise = self.noise(weight, updates)
        y = weight @ noise
        missed = self.gamma * (feedback.mT @ y) - self.alpha * self.gain * noise
        slope = (y @ (missed / self.samples).mT).add_(feedback, alpha=self.beta)
        return slope, (slope.mT @ y).square().sum() / self.samples

    def _of_inputs(
        self, layer: Any, weight: Tensor, feedback: Tensor, inputs: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same of what the layer took in, whose own operation has B^T y as its slope."""
        outputs = weight.numel() / layer.as_matrix(weight).shape[-1]
        passes = [(x, layer.linear_map(x, weight)) for x in inputs]
        # Every process has to take part in the sums, whatever its inputs, and in the same memory
        # format.
        slope = torch.zeros_like(feedback)
        square, along = slope.new_zeros(2)
        for x, y in passes:
            down = _vjp(lambda x: layer.linear_map(x, feedback), x, y)
            missed = (self.gamma * down - self.alpha * self.gain * x) * (outputs / y.numel())
            slope += _vjp(functools.partial(layer.linear_map, missed), feedback, y)
            square += x.square().mean()
        _sum_over_processes(slope)
        _sum_over_processes(square)
        slope = slope / square + self.beta * feedback
        for x, y in passes:
            down = _vjp(lambda x: layer.linear_map(x, slope), x, y)
            along += down.square().sum() * (outputs / y.numel())
        _sum_over_processes(along)
        return slope, along / square


def _sum_over_processes(tensor: Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)


def _vjp(function: Callable[[Tensor], Tensor], at: Tensor, cotangent: Tensor) -> Tensor:
    """Return the slope of the product of ``function`` and the cotangent."""
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(at), at, cotangent)
    return slope


@functools.cache
def _warn_of_no_step(rule: str, layer_name: str) -> None:
    logger.warning(
        "%s: the weight or what the layer takes in is not finite or too large for %s, whose "
        "feedback weight stays as it is in such steps (told once).",
        layer_name,
        rule,
    )
