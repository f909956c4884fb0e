"""Layers whose backward pass goes through a feedback weight.

Forward and state-dict keys are the stock layers'; a rule that keeps state adds one buffer or
parameter whose name begins with ``feedback``.
"""

import functools
import logging
from typing import Any

import detectron2.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .feedback import Fans, FeedbackRule, get_rule
from .functional import asymmetric_conv2d, asymmetric_conv_transpose2d, asymmetric_linear

__all__ = [
    "AsymmetricConv2d",
    "AsymmetricConvTranspose2d",
    "AsymmetricLayer",
    "AsymmetricLinear",
]

logger = logging.getLogger(__name__)


class AsymmetricLayer(nn.Module):
    """
    What the asymmetric layers share: the rule, its state, and how both are kept and loaded.

    Args:
        *args, **kwargs: those of the stock layer.
        rule: a rule's name or class.
        scale, gain, seed, layer_name: see :class:`~ss_detectron.layers.feedback.FeedbackRule`. Two
            layers with the same seed and name draw the same random feedback: layers that are built
            by hand need names of their own.
    """

    stock_class: type[nn.Module]
    """The class to go back to; conversion sets it to the module's own."""

    weight: nn.Parameter
    rule: FeedbackRule

    # True while backward passes are to run on backpropagation for a moment.
    feedback_suspended = False

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

    def set_rule(self, rule: FeedbackRule) -> None:
        """Makes ``rule`` this layer's rule and its state, made from the weight, the layer's."""
        self.drop_state()
        self.rule = rule
        if rule.counts_updates:
            # The weight's version when it was last looked at, and how often it has changed.
            # No buffer: it must stay on the CPU, where reading it makes no GPU wait.
            self.feedback_updates = torch.tensor([self.weight._version, 0], device="cpu")
            _count_fused_updates()
        state = rule.initial_state(self.weight.detach(), self.fans())
        if state is None:
            return
        if rule.learned:
            parameter = nn.Parameter(state, requires_grad=self.weight.requires_grad)
            self.register_parameter(rule.state_name, parameter)
        else:
            self.register_buffer(rule.state_name, state)

    def drop_state(self) -> None:
        """Removes the rule's state, if there is any."""
        if getattr(self, "rule", None) is not None and self.rule.state_name is not None:
            delattr(self, self.rule.state_name)
        self.__dict__.pop("feedback_updates", None)

    @property
    def feedback_state(self) -> Tensor | None:
        """The rule's state, of the weight's shape, or None."""
        return None if self.rule.state_name is None else getattr(self, self.rule.state_name)

    @torch.no_grad()
    def current_feedback(self) -> Tensor:
        """B as a backward pass would use it now, of the weight's shape."""
        return self._feedback(self.weight).detach()

    def fans(self) -> Fans:
        """The layer's fan-in and fan-out, for the scales that depend on the shape alone."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_feedback(self) -> None:
        """Derives the state again from the weight as it is; what is drawn stays the same draw."""
        if self.feedback_state is not None:
            if self.feedback_state.device != self.weight.device:
                # A model on the meta device was given its weights: load_state_dict(assign=True).
                self.set_rule(self.rule)
                return
            fresh = self.rule.initial_state(self.weight.detach(), self.fans())
            self.feedback_state.copy_(fresh)
        if self.rule.counts_updates:
            self._set_updates(0)

    def _feedback(self, weight: Tensor, state: Tensor | None = None) -> Tensor:
        # Called in backward: what counts is the rule in force then, with its state. A compiler has
        # to be shown the state it is to use, which is that of the forward pass.
        if not isinstance(self, AsymmetricLayer) or self.feedback_suspended:
            return weight
        rule, fans = self.rule, self.fans()
        if torch.compiler.is_compiling():
            if rule.counts_updates or not rule.traced:
                options = rule.name, rule.scale, rule.gain, rule.seed, rule.layer_name
                return _feedback_operator(weight, state, [int(n) for n in fans], *options)
        else:
            state = (
                self.feedback_updates.tolist()[1] if rule.counts_updates else self.feedback_state
            )
        return rule.feedback(weight, state, fans)

    def _backward_through(self) -> dict[str, Any]:
        """The keyword arguments that make an asymmetric operation use this layer's rule."""
        if not self.rule.counts_updates:
            return {"feedback": self._feedback, "state": self.feedback_state}
        if torch.is_grad_enabled():
            self._count_update()
        return {"feedback": self._feedback, "state": self.feedback_updates}

    def _count_update(self) -> None:
        if self.rule.counts_updates and not self.weight.is_meta:
            if not self.weight.is_leaf:
                _warn_of_computed_weight(self.rule.name, self.rule.layer_name)
            count = _count_compiled if torch.compiler.is_compiling() else _count
            count(self.weight.detach(), self.feedback_updates)

    def _set_updates(self, number: int) -> None:
        self.feedback_updates[0] = self.weight._version
        self.feedback_updates[1] = number

    def __getstate__(self) -> dict[str, Any]:
        self._count_update()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "feedback_updates" in self.__dict__:
            _count_fused_updates()
            # A copy's weight counts its versions anew.
            self._set_updates(int(self.feedback_updates[1]))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.rule.counts_updates:
            # A run that goes on from here must not miss the last update.
            self._count_update()
            destination[prefix + "feedback_updates"] = self.feedback_updates[1].clone()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.rule.counts_updates:
            updates = prefix + "feedback_updates"
            if updates in unexpected_keys:
                unexpected_keys.remove(updates)
            if updates in state_dict:
                self._set_updates(int(state_dict[updates]))
            elif prefix + "weight" in state_dict:
                self._set_updates(0)
        if self.rule.state_name is None:
            return
        key = prefix + self.rule.state_name
        if key in state_dict or prefix + "weight" not in state_dict:
            return
        if key in missing_keys:
            missing_keys.remove(key)
        self.reset_feedback()
        logger.info(
            "%s: the checkpoint brings the weight without its %s; derived again from the loaded "
            "weight (%s).",
            prefix.rstrip("."),
            self.rule.state_name,
            self.rule.name,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self.rule.name}"


@functools.cache
def _warn_of_computed_weight(rule: str, layer_name: str) -> None:
    logger.warning(
        "%s: the weight is computed anew in every forward pass (pruning, a parametrization, "
        "DataParallel), so that its updates cannot be counted: %s draws nothing anew.",
        layer_name or "a layer",
        rule,
    )


@functools.cache
def _count_fused_updates() -> None:
    """Makes fused optimisers count up the versions of what they update, as others do."""

    def count(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    torch.autograd.graph.increment_version(parameter)

    register_optimizer_step_post_hook(count)


def _count(weight: Tensor, updates: Tensor) -> None:
    """Counts an update if the weight's version has changed."""
    version, number = updates.tolist()
    if version != weight._version:
        updates.copy_(torch.tensor([weight._version, number + 1], device="cpu"))


# An operator, because a compiler would take the version for a constant.
_count_compiled = torch.library.custom_op(
    "ss_detectron::count_update", _count, mutates_args=("updates",)
)


@torch.library.custom_op("ss_detectron::feedback", mutates_args=())
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
    """B by a rule that is not traced."""
    rule = get_rule(rule)(scale, gain, seed, layer_name)
    if rule.counts_updates:
        state = state.tolist()[1]
    return rule.feedback(weight, state, Fans(*fans[:2], bool(fans[2])))


@_feedback_operator.register_fake
def _(weight: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(weight)


def _convolution_fans(layer: nn.modules.conv._ConvNd) -> Fans:
    area = layer.kernel_size[0] * layer.kernel_size[1]
    return Fans(layer.in_channels // layer.groups * area, layer.out_channels * area, False)


class AsymmetricConv2d(AsymmetricLayer, detectron2.layers.Conv2d):
    """
    :class:`torch.nn.Conv2d` and :class:`detectron2.layers.Conv2d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``detectron2.layers.Conv2d``: ``torch.nn.Conv2d``'s, ``norm`` and
            ``activation``. ``padding_mode`` holds, as in ``torch.nn.Conv2d``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = detectron2.layers.Conv2d

    def fans(self) -> Fans:
        return _convolution_fans(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H_out, W_out), norm and activation applied."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        x = asymmetric_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            **self._backward_through(),
        )
        # A converted torch.nn.Conv2d has neither.
        norm, activation = getattr(self, "norm", None), getattr(self, "activation", None)
        if x.numel() == 0 and self.training and isinstance(norm, nn.SyncBatchNorm):
            raise AssertionError("SyncBatchNorm does not support empty inputs!")  # as stock
        if norm is not None:
            x = norm(x)
        if activation is not None:
            x = activation(x)
        return x


class AsymmetricConvTranspose2d(AsymmetricLayer, nn.ConvTranspose2d):
    """
    :class:`torch.nn.ConvTranspose2d` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``torch.nn.ConvTranspose2d``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = nn.ConvTranspose2d

    def fans(self) -> Fans:
        return _convolution_fans(self)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H_out, W_out)."""
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            2,
            self.dilation,
        )
        return asymmetric_conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            **self._backward_through(),
        )


class AsymmetricLinear(AsymmetricLayer, nn.Linear):
    """
    :class:`torch.nn.Linear` with asymmetric feedback.

    Args:
        *args, **kwargs: those of ``torch.nn.Linear``.
        rule, scale, gain, seed, layer_name: see :class:`AsymmetricLayer`.
    """

    stock_class = nn.Linear

    def fans(self) -> Fans:
        return Fans(self.in_features, self.out_features, True)

    def forward(self, input: Tensor) -> Tensor:
        """(*, C_in) -> (*, C_out)."""
        return asymmetric_linear(input, self.weight, self.bias, **self._backward_through())
