"""Layers whose backward pass goes through a feedback weight.

Forward and state-dict keys are the stock layers'; a rule that keeps state adds one buffer or
parameter whose name begins with ``feedback``.
"""

import functools
import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feedback import (
    Fans,
    FeedbackAlignment,
    FeedbackAlignmentSignedInit,
    FeedbackRule,
    FoldedKolenPollack,
    KolenPollack,
    get_rule,
)
from .functional import (
    asymmetric_conv1d,
    asymmetric_conv2d,
    asymmetric_conv3d,
    asymmetric_conv_transpose1d,
    asymmetric_conv_transpose2d,
    asymmetric_conv_transpose3d,
    asymmetric_linear,
    is_recording,
)
from .sharded import gather, shard_as

__all__ = [
    "AsymmetricConv1d",
    "AsymmetricConv2d",
    "AsymmetricConv3d",
    "AsymmetricConvTranspose1d",
    "AsymmetricConvTranspose2d",
    "AsymmetricConvTranspose3d",
    "AsymmetricLayer",
    "AsymmetricLinear",
    "asymmetric_form",
    "is_form",
    "is_registered",
    "obstacle",
    "register_layer",
]

logger = logging.getLogger(__name__)

_UPDATES = "feedback_updates"
_FACTOR = "feedback_factor"
_INPUTS = "_feedback_inputs"
# As many as a step may well have; without steps, they must not become more and more.
_MOST_INPUTS = 16
_PATIENCE = 1000  # backward passes


class AsymmetricLayer(nn.Module):
    """
    What the asymmetric layers share: the rule, its state, and how both are kept and loaded.

    An asymmetric form of a layer of one's own extends this class and the stock one, says its
    :meth:`fans`, and passes :meth:`feedback_arguments` to an asymmetric operation::

        class AsymmetricScaledLinear(AsymmetricLayer, ScaledLinear):
            def fans(self):
                return Fans(self.in_features, self.out_features, True)

            def forward(self, input):
                return self.scale * asymmetric_linear(
                    input, self.weight, self.bias, **self.feedback_arguments()
                )

        register_layer(ScaledLinear, AsymmetricScaledLinear)

    Args:
        *args, **kwargs: those of the stock layer.
        rule: a rule's name or class.
        scale, gain, seed, layer_name: see :class:`~ss_detectron.layers.feedback.FeedbackRule`. Two
            layers with the same seed and name draw the same random feedback: layers that are built
            by hand need names of their own.
    """

    stock_class: type[nn.Module]
    """The class to go back to; conversion sets it to the module's own."""

    weight: Tensor
    rule: FeedbackRule
    feedback_updates: Tensor
    feedback_factor: Tensor

    bypass_feedback: bool = False
    """True while backward passes are to run on backpropagation for a moment."""

    def __init__(
        self,
        *args: Any,
        rule: str | type[FeedbackRule] = "sign_symmetry",
        scale: str = "mean_abs",
        gain: float = 1.0,
        seed: int = 0,
        layer_name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_rule(get_rule(rule)(scale, gain, seed, layer_name))

    @staticmethod
    def obstacle(layer: nn.Module) -> str | None:
        """Return why a stock layer of the registered type cannot be converted, or None."""
        return None

    @staticmethod
    def weight_names(layer: nn.Module) -> tuple[str, ...]:
        """
        Return the names of the parameters that are the weight of a layer, stock or asymmetric.
        Several stand side by side in it, as columns.
        """
        return ("weight",)

    @classmethod
    def weight_of(cls, layer: nn.Module) -> Tensor:
        """Return a layer's weight, which a rule has the feedback for."""
        weights = [cast(Tensor, getattr(layer, name)) for name in cls.weight_names(layer)]
        return weights[0] if len(weights) == 1 else torch.cat(weights, 1)

    def set_rule(
        self, rule: FeedbackRule, state: Tensor | None = None, factor: Tensor | None = None
    ) -> None:
        """
        Make ``rule`` this layer's, and its state.

        Args:
            rule: an instance for this layer alone.
            state: what ``rule.initial_state`` gives for the weight; it is asked if this is None.
            factor: of a rule that has one, (1,); 1 if this is None.
        """
        if state is None:
            state = rule.initial_state(self.weight.detach(), self.fans())
        self.drop_state()
        self.rule = rule
        # torch.fx, asked whether to look into a layer, takes those of torch.nn as they are: so a
        # traced model (torchvision's create_feature_extractor) keeps the layer and its rule.
        self.__module__ = "torch.nn"
        if rule.needs_inputs:
            self._keeps_inputs = self.register_forward_pre_hook(_keep_input, with_kwargs=True)
            self.__dict__[_INPUTS] = []
        if rule.counts_updates:
            # No buffer: it must stay on the CPU, where reading it makes no GPU wait.
            self.feedback_updates = torch.zeros(1, dtype=torch.int64, device="cpu")
            self._backward_passes = 0
        if state is None or rule.state_name is None:
            return
        if rule.has_factor:
            # In float32 at least: in 16 bits, 1 less a weight decay is 1.
            wide = torch.promote_types(state.dtype, torch.float32)
            made = torch.ones(1, dtype=wide, device=state.device)
            self.register_buffer(_FACTOR, made if factor is None else factor)
            self._backward_passes = 0
        if rule.learned:
            learns = any(getattr(self, name).requires_grad for name in self.weight_names(self))
            # Layers that share their weight share a parameter.
            parameter = state if isinstance(state, nn.Parameter) else nn.Parameter(state)
            parameter.requires_grad_(learns)
            self.register_parameter(rule.state_name, parameter)
        else:
            self.register_buffer(rule.state_name, state)

    def drop_state(self) -> None:
        """Remove the rule's state, if there is any."""
        rule = getattr(self, "rule", None)
        if rule is not None and rule.state_name is not None:
            delattr(self, rule.state_name)
        self._buffers.pop(_FACTOR, None)
        self.__dict__.pop(_UPDATES, None)
        self.__dict__.pop("_backward_passes", None)
        self.__dict__.pop(_INPUTS, None)
        if hook := self.__dict__.pop("_keeps_inputs", None):
            hook.remove()

    def gradients(self) -> Iterator[Tensor]:
        """Return the gradients that the weight has now: one at most, if it is one parameter."""
        for name in self.weight_names(self):
            if (gradient := getattr(self, name).grad) is not None:
                yield gradient

    @property
    def feedback_state(self) -> Tensor | None:
        """The rule's state, of the weight's shape, or None."""
        name = self.rule.state_name
        return None if name is None else cast(Tensor, getattr(self, name))

    @torch.no_grad()
    def current_feedback(self) -> Tensor:
        """Return B as a backward pass would use it now, of the weight's shape."""
        state = None if self.feedback_state is None else gather(self.feedback_state)
        return self._feedback(gather(self.weight), state, self.rule).detach()

    def fans(self) -> Fans:
        """Return the layer's fan-in and fan-out, for the scales that depend on the shape alone."""
        raise NotImplementedError

    @torch.no_grad()
    def advance_feedback(self) -> None:
        """Note an update of the weight, for a rule that counts them, and let it learn."""
        if not self.rule.counts_updates:
            return
        self.feedback_updates += 1
        if self.rule.state_name is not None:
            inputs = self.__dict__.get(_INPUTS, [])
            # torch 2.4 records programs by tensors that have no values.
            inputs = [x for x in inputs if type(x).__name__ != "FunctionalTensor"]
            self.forget_inputs()
            updates, state = int(self.feedback_updates), cast(Tensor, self.feedback_state)
            self.rule.update(self, gather(self.weight.detach()), state, updates, inputs)

    @torch.no_grad()
    def keep_feedback(self, before: Tensor) -> None:
        """
        Have B as it was, of a rule that has it as an offset from W.

        Args:
            before: W at that time.
        """
        if self.rule.has_factor and not torch.equal(before, self.weight):
            state = cast(Tensor, self.feedback_state)
            if self.feedback_factor.abs() < torch.finfo(self.feedback_factor.dtype).tiny:
                state.zero_()
                self.feedback_factor.fill_(1)
            state.add_((before - self.weight) / self.feedback_factor)

    def forget_inputs(self) -> None:
        """Let go of what the layer took in, which its rule is then not told of."""
        self.__dict__.get(_INPUTS, []).clear()

    def __getstate__(self) -> Any:
        state = getattr(super(), "__getstate__", self.__dict__.copy)()
        # Whole batches, which belong to no copy and no file.
        return {**state, _INPUTS: []} if _INPUTS in state else state

    def as_matrix(self, weight: Tensor) -> Tensor:
        """
        Return a tensor of the weight's shape as (..., outputs, inputs): a view of a contiguous one.
        """
        return weight.flatten(1)

    linear_map: Callable[[Tensor, Tensor], Tensor] | None = None
    """(input, weight) -> what the stock layer gives with this weight, without bias and whatever
    follows; a method of the forms that can learn from their inputs (information alignment)."""

    @torch.no_grad()
    def reset_feedback(self) -> None:
        """Derive the state again from the weight as it is; what is drawn stays the same draw."""
        self.forget_inputs()
        if self.feedback_state is not None:
            made = self.rule.initial_state(gather(self.weight.detach()), self.fans())
            self._set_state(cast(Tensor, made))
        if self.rule.counts_updates:
            self.feedback_updates.zero_()

    @torch.no_grad()
    def mirror_feedback(self, samples: int) -> bool:
        """
        Have B learn from noise, so many times as many vectors of it as the layer has inputs, if it
        is random at first; return whether it is.
        """
        rule = self.rule
        if not isinstance(rule, FeedbackAlignment) or isinstance(rule, FeedbackAlignmentSignedInit):
            return False
        if not self.weight.numel():
            return True
        weight = gather(self.weight.detach()).contiguous()
        matrix = self.as_matrix(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        feedback = torch.empty_like(weight)
        found = rule.mirrored(matrix, samples)
        self.as_matrix(feedback).copy_(found)
        self._set_state(rule.state_of(feedback, weight))
        return True

    def _set_state(self, made: Tensor) -> None:
        """Have a state of the whole weight instead, sharded as this one is."""
        state = cast(Tensor, self.feedback_state)
        made = shard_as(state, made)
        if state.device != self.weight.device:
            # A model on the meta device was given its weights: load_state_dict(assign=True).
            self.set_rule(self.rule, made)
        else:
            state.copy_(made)
        if self.rule.has_factor:
            self.feedback_factor.fill_(1)

    def feedback_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that make an asymmetric operation use this layer's rule."""
        if self.training and is_recording():
            _warn_of_recording()
        state = self.feedback_updates if self.rule.state_is_count else self.feedback_state
        feedback: Any = self._feedback
        if not torch.compiler.is_compiling():  # which may know no partial functions
            feedback = functools.partial(feedback, forward_rule=self.rule)
        return {"feedback": feedback, "state": state}

    def _feedback(
        self, weight: Tensor, state: Tensor | None, forward_rule: FeedbackRule | None = None
    ) -> Tensor:
        # Called in backward: what counts is the rule in force then. If that has not changed, its
        # state is what the forward pass met (torch.func.functional_call brings one of its own).
        if not isinstance(self, AsymmetricLayer) or self.bypass_feedback:
            return weight
        rule, fans = self.rule, self.fans()
        if rule.has_factor:
            if not torch.compiler.is_compiling():
                state = state if rule is forward_rule else self.feedback_state
                passes = self.__dict__["_backward_passes"] = self._backward_passes + 1
                if passes == _PATIENCE:
                    _warn_of_no_optimizer()
            return rule.feedback(weight, (state, self.feedback_factor), fans)
        if torch.compiler.is_compiling():
            if rule.state_is_count or not rule.traced:
                options = rule.name, rule.scale, rule.gain, rule.seed, rule.layer_name
                made = _feedback_operator(weight, state, [int(n) for n in fans], *options)
                return cast(Tensor, made)
            return rule.feedback(weight, state, fans)
        if rule.counts_updates:
            self._backward_passes += 1
            if self._backward_passes == _PATIENCE and not self.feedback_updates:
                _warn_of_no_updates(rule.name, f"{_PATIENCE} backward passes of a layer")
        if rule.state_is_count:
            return rule.feedback(weight, int(self.feedback_updates), fans)
        state = state if rule is forward_rule else self.feedback_state
        return rule.feedback(weight, state, fans)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.rule.counts_updates:
            destination[prefix + _UPDATES] = self.feedback_updates[0].clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.rule.has_factor or self.rule.state_name == KolenPollack.state_name:
            self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, _, missing_keys, unexpected_keys, _ = args
        brings_weight = all(prefix + name in state_dict for name in self.weight_names(self))
        updates = prefix + _UPDATES
        if updates in unexpected_keys:  # of a rule that counts them, whether this one does or not
            unexpected_keys.remove(updates)
        if self.rule.counts_updates and (updates in state_dict or brings_weight):
            self.feedback_updates.fill_(int(state_dict.get(updates, 0)))
        if self.rule.state_name is None:
            return
        key = prefix + self.rule.state_name
        if key in state_dict or not brings_weight:
            return
        for name in (key, prefix + _FACTOR):
            if name in missing_keys:
                missing_keys.remove(name)
        self.reset_feedback()
        logger.info(
            "%s: the checkpoint brings the weight without its %s; derived again from the loaded "
            "weight (%s).",
            prefix.rstrip("."),
            self.rule.state_name,
            self.rule.name,
        )

    def _translate(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Have B of a state dict in the form that the layer has it in."""
        learned, offset, factor = (
            prefix + name
            for name in (KolenPollack.state_name, FoldedKolenPollack.state_name, _FACTOR)
        )
        names = [prefix + name for name in self.weight_names(self)]
        if not all(name in state_dict for name in names):
            if offset not in state_dict:  # which the factor says nothing without
                state_dict.pop(factor, None)
            return
        place = state_dict[names[0]].device if self.weight.is_meta else self.weight.device
        weights = [state_dict[name].to(place) for name in names]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, 1)
        if not self.rule.has_factor:
            if offset in state_dict and learned not in state_dict:
                share = state_dict.pop(factor, torch.ones(1)).to(place)
                state_dict[learned] = weight + share * state_dict.pop(offset).to(place)
            return
        if learned in state_dict:
            state_dict[offset] = state_dict.pop(learned).to(place) - weight
            state_dict.pop(factor, None)
        if offset in state_dict:
            ones = torch.ones(1, dtype=self.feedback_factor.dtype, device=place)
            state_dict.setdefault(factor, ones)
        else:
            state_dict.pop(factor, None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self.rule.name}".removeprefix(", ")

    def _refuse_by_type(self, *_: Any) -> NoReturn:
        raise ValueError(
            f"torch.jit.script and torch.ao.quantization do not know {type(self).__name__}: give "
            "them a stock model, convert_feedback(copy.deepcopy(model), 'backpropagation')"
        )

    # torch.ao.quantization sets a module's qconfig, and then passes over types that it does not
    # know. (A stock copy returned to torch.jit.script would stay in the model that is scripted.)
    qconfig = property(fset=_refuse_by_type)
    __prepare_scriptable__ = _refuse_by_type


def _keep_input(layer: AsymmetricLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if layer.training and torch.is_grad_enabled() and not is_recording():
        kept = layer.__dict__[_INPUTS]
        kept.append((args[0] if args else kwargs["input"]).detach())
        if len(kept) > _MOST_INPUTS:
            kept.pop(0)
            if not torch.compiler.is_compiling() and not layer.feedback_updates:
                passes = f"{len(kept)} forward passes of a layer, whose inputs are kept for it"
                _warn_of_no_updates(layer.rule.name, passes)


@functools.cache
def _warn_of_no_updates(rule: str, passes: str) -> None:
    logger.warning(
        "%s makes nothing new: no update was noted in %s. Call "
        "ss_detectron.advance_feedback(model), or a learner's step(), after every step of the "
        "optimiser.",
        rule,
        passes,
    )


@functools.cache
def _warn_of_no_optimizer() -> None:
    logger.warning(
        "kolen_pollack: no optimiser moved the folded feedback in %d backward passes of a layer, "
        "which stays behind so. Call ss_detectron.solver.fold_kolen_pollack(model, optimizer) for "
        "the optimiser that the weights are in.",
        _PATIENCE,
    )


@functools.cache
def _warn_of_recording() -> None:
    logger.warning(
        "A model in training mode is being recorded (torch.export, torch.jit.trace): the program "
        "holds stock operations, and if it is trained, it learns by backpropagation."
    )


@torch.library.custom_op(
    "ss_detectron::feedback",
    mutates_args=(),
    # torch 2.4 infers none from annotations such as list[int].
    schema="(Tensor weight, Tensor? state, int[] fans, str rule, str scale, float gain, int seed, "
    "str layer_name) -> Tensor",
)
def _feedback_operator(
    weight: Tensor,
    state: Tensor | None,
    fans: list[int],
    rule: str,
    scale: str,
    gain: float,
    seed: int,
    layer_name: str,
) -> Tensor:
    """Return B by a rule that is not traced."""
    made = get_rule(rule)(scale, gain, seed, layer_name)
    number = int(state) if made.state_is_count and state is not None else state
    return made.feedback(weight, number, Fans(fans[0], fans[1], bool(fans[2])))


@_feedback_operator.register_fake
def _(weight: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(weight)


class _ConvolutionForm(AsymmetricLayer):
    """What the forms of convolutions share, transposed or not, of any number of dimensions."""

    operation: Callable[..., Tensor]

    def fans(self) -> Fans:
        layer = cast(nn.modules.conv._ConvNd, self)
        area = math.prod(layer.kernel_size)
        return Fans(layer.in_channels // layer.groups * area, layer.out_channels * area, False)


class _ConvForm(_ConvolutionForm):
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(cast(Any, self).groups, -1, math.prod(weight.shape[1:]))

    def linear_map(self, input: Tensor, weight: Tensor) -> Tensor:
        layer: Any = self
        return cast(Tensor, layer._conv_forward(input, weight, None))

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, *size) -> (N, C_out, *output_size)."""
        layer: Any = self
        padding = layer.padding
        if layer.padding_mode != "zeros":
            sides = layer._reversed_padding_repeated_twice
            input, padding = F.pad(input, sides, mode=layer.padding_mode), 0
        return self.operation(
            input,
            self.weight,
            layer.bias,
            layer.stride,
            padding,
            layer.dilation,
            layer.groups,
            **self.feedback_arguments(),
        )


class _ConvTransposeForm(_ConvolutionForm):
    def as_matrix(self, weight: Tensor) -> Tensor:
        # A weight of it has the inputs first.
        return weight.reshape(cast(Any, self).groups, -1, math.prod(weight.shape[1:])).mT

    def linear_map(self, input: Tensor, weight: Tensor) -> Tensor:
        layer: Any = self
        stock = getattr(F, f"conv_transpose{weight.dim() - 2}d")
        options = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        return cast(Tensor, stock(input, weight, None, *options))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C_in, *size) -> (N, C_out, *output_size)."""
        layer: Any = self
        output_padding = layer._output_padding(
            input,
            output_size,
            layer.stride,
            layer.padding,
            layer.kernel_size,
            len(layer.stride),
            layer.dilation,
        )
        return self.operation(
            input,
            self.weight,
            layer.bias,
            layer.stride,
            layer.padding,
            output_padding,
            layer.groups,
            layer.dilation,
            **self.feedback_arguments(),
        )


class AsymmetricConv1d(_ConvForm, nn.Conv1d):
    """
    :class:`torch.nn.Conv1d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``torch.nn.Conv1d``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = nn.Conv1d
    operation = staticmethod(asymmetric_conv1d)


class AsymmetricConv2d(_ConvForm, nn.Conv2d):
    """
    :class:`torch.nn.Conv2d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``torch.nn.Conv2d``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = nn.Conv2d
    operation = staticmethod(asymmetric_conv2d)


class AsymmetricConv3d(_ConvForm, nn.Conv3d):
    """
    :class:`torch.nn.Conv3d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``torch.nn.Conv3d``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = nn.Conv3d
    operation = staticmethod(asymmetric_conv3d)


class AsymmetricConvTranspose1d(_ConvTransposeForm, nn.ConvTranspose1d):
    """
    :class:`torch.nn.ConvTranspose1d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``torch.nn.ConvTranspose1d``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = nn.ConvTranspose1d
    operation = staticmethod(asymmetric_conv_transpose1d)


class AsymmetricConvTranspose2d(_ConvTransposeForm, nn.ConvTranspose2d):
    """
    :class:`torch.nn.ConvTranspose2d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``torch.nn.ConvTranspose2d``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = nn.ConvTranspose2d
    operation = staticmethod(asymmetric_conv_transpose2d)


class AsymmetricConvTranspose3d(_ConvTransposeForm, nn.ConvTranspose3d):
    """
    :class:`torch.nn.ConvTranspose3d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``torch.nn.ConvTranspose3d``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = nn.ConvTranspose3d
    operation = staticmethod(asymmetric_conv_transpose3d)


class AsymmetricLinear(AsymmetricLayer, nn.Linear):
    """
    :class:`torch.nn.Linear` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``torch.nn.Linear``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = nn.Linear

    def linear_map(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight)

    def fans(self) -> Fans:
        return Fans(self.in_features, self.out_features, True)

    def forward(self, input: Tensor) -> Tensor:
        """(*, C_in) -> (*, C_out)."""
        return asymmetric_linear(input, self.weight, self.bias, **self.feedback_arguments())


_FORMS: dict[type[nn.Module], type[AsymmetricLayer]] = {
    nn.Conv1d: AsymmetricConv1d,
    nn.Conv2d: AsymmetricConv2d,
    nn.Conv3d: AsymmetricConv3d,
    nn.ConvTranspose1d: AsymmetricConvTranspose1d,
    nn.ConvTranspose2d: AsymmetricConvTranspose2d,
    nn.ConvTranspose3d: AsymmetricConvTranspose3d,
    nn.Linear: AsymmetricLinear,
}


def register_layer(stock: type[nn.Module], asymmetric: type[AsymmetricLayer]) -> None:
    """
    Have conversion turn layers of type ``stock`` into ``asymmetric`` ones.

    Subclasses that override nothing but the constructor follow (and are no instances of the
    subclass while they are converted); others may compute something else, and only their author
    knows. One that does not needs no class of its own::

        register_layer(timm.layers.Linear, AsymmetricLinear)

    Args:
        stock: the layer's exact type.
        asymmetric: its form with feedback; see :class:`AsymmetricLayer` for one of your own.

    Raises:
        ValueError: ``asymmetric`` is no asymmetric layer, ``stock`` is one, or the two do not fit.
    """
    if not issubclass(asymmetric, AsymmetricLayer):
        raise ValueError(f"{asymmetric.__name__} is no asymmetric layer: extend AsymmetricLayer")
    if issubclass(stock, AsymmetricLayer):
        raise ValueError(f"{stock.__name__} is an asymmetric layer already")
    if not hasattr(asymmetric, "stock_class"):
        asymmetric.stock_class = stock
    if not issubclass(stock, asymmetric.stock_class):
        raise ValueError(
            f"{asymmetric.__name__} is a form of {asymmetric.stock_class.__name__}, which "
            f"{stock.__name__} does not extend"
        )
    _FORMS[stock] = asymmetric


def asymmetric_form(stock: type[nn.Module]) -> type[AsymmetricLayer] | None:
    """Return the class that layers of type ``stock`` are converted to, or None."""
    if stock not in _FORMS and sys.modules.get("detectron2.layers"):
        importlib.import_module(".detectron2", __package__)  # registers Detectron2's convolution
    own: set[str] = set()
    for base in stock.__mro__:
        if base in _FORMS:
            return None if own & set(dir(base)) else _FORMS[base]
        own.update(name for name, value in vars(base).items() if _overrides(name, value))
    return None


def _overrides(name: str, value: Any) -> bool:
    """Return whether an attribute of a class may change what its parent does."""
    is_code = inspect.isroutine(value) or isinstance(value, property)
    return is_code and name not in ("__init__", "__annotate__", "__annotate_func__")


def is_registered(stock: type[nn.Module]) -> bool:
    """Return whether layers of this very type have a form already."""
    return stock in _FORMS


def is_form(kind: type[nn.Module]) -> bool:
    """Return whether conversion makes layers of this type."""
    return kind in _FORMS.values()


def obstacle(layer: nn.Module) -> str | None:
    """Return why a layer cannot be converted, or None."""
    if isinstance(layer, AsymmetricLayer):
        return None
    kind = type(layer)
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance"
    form = asymmetric_form(kind)
    if form is None:
        known = next((stock for stock in _FORMS if isinstance(layer, stock)), None)
        if known is None:
            return f"no asymmetric form of {kind.__name__}"
        name = kind.__name__
        if name == known.__name__:
            name = f"{kind.__module__.partition('.')[0]}'s {name}"
        return (
            f"{name}, a subclass of {known.__name__} that may compute otherwise; if it does not: "
            "register_layer"
        )
    names = form.weight_names(layer)
    if any(name not in layer._parameters for name in names):
        return "its weight is computed, not a parameter (weight_norm, spectral_norm)"
    if any(layer.get_parameter(name).is_complex() for name in names):
        return "its weight is complex"
    return form.obstacle(layer)
