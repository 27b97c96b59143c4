"""BatchNorm under bounds: whose statistics auto_LiRPA's nodes normalise with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from auto_LiRPA import BoundedModule
from auto_LiRPA.operators.base import Interval
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cure_plugin.errors import SpecError

Statistics = list[tuple[Any, Tensor, Tensor]]
"""(auto_LiRPA's node, mean, variance) per BatchNorm that normalises by the batch."""


@contextmanager
def batch_statistics(bounded: BoundedModule, model: nn.Module, x: Tensor) -> Iterator[None]:
    """For a while, let bounds normalise as ``model`` does in its present mode; see :func:`clean_statistics`.

    Outside, ``bounded`` normalises by the running statistics, as a net that is to be certified does.
    """
    with normalising_by(clean_statistics(bounded, model, x)):
        yield


def clean_statistics(bounded: BoundedModule, model: nn.Module, x: Tensor) -> Statistics:
    """Statistics of the clean batch ``x`` for every BatchNorm layer in training mode (Shi et al. 2021).

    One forward pass of ``model``, which moves its running statistics as ever; none where no layer asks for it.
    Gradients reach the statistics. Also lets ``bounded`` pass gradients to the parameters.

    Raises:
        SpecError: such a layer is used twice.
    """
    bounded.train()  # in eval mode auto_LiRPA switches requires_grad of the parameters off
    nodes = [node for node in bounded.modules() if type(node).__name__ == "BoundBatchNormalization"]
    for node in nodes:
        node.training = False
    layers = [(node, _layer_of(node, model)) for node in nodes]
    active = [(node, layer) for node, layer in layers if layer.training]
    if not active:
        return []
    if len({id(layer) for _, layer in active}) < len(active):
        raise SpecError("a BatchNorm layer is used twice in the net: its statistics cannot be told apart; use a copy")
    found: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = [layer.register_forward_pre_hook(_keep_moments(found, index)) for index, (_, layer) in enumerate(active)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [(node, *found[index]) for index, (node, _) in enumerate(active)]


def _layer_of(node: Any, model: nn.Module) -> nn.Module:
    """The layer that a BatchNorm node was traced from: the one its running mean belongs to."""
    return model.get_submodule(str(node.inputs[3].ori_name).rpartition(".")[0])


def _keep_moments(found: dict[int, tuple[Tensor, Tensor]], index: int) -> Callable[[nn.Module, Any], None]:
    def hook(layer: nn.Module, inputs: Any) -> None:
        found[index] = _Moments.apply(inputs[0])

    return hook


class _Moments(torch.autograd.Function):
    """(mean, variance) of each channel of a batch; ``torch.var_mean`` is four times slower and holds more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        _, mean, root = torch.native_batch_norm(x, None, None, None, None, True, 0.0, 0.0)
        ctx.save_for_backward(x, mean)
        return mean, torch.where(root > 0, root.pow(-2), 0.0)  # 0 is how it says that a channel is constant

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = 2 * of_variance / count
        return _affine(x, slope, of_mean / count - slope * mean)


@contextmanager
def normalising_by(statistics: Statistics) -> Iterator[None]:
    """For a while, let bounds normalise by these statistics."""
    for node, mean, variance in statistics:
        node.training, node.current_mean, node.current_var = True, mean, variance
        node.interval_propagate = functools.partial(_interval, node)
    try:
        yield
    finally:
        for node, _, _ in statistics:
            node.training = False
            del node.interval_propagate  # the instance's; the class's is there again


def _interval(node: Any, *inputs: Any) -> Any:
    """What auto_LiRPA computes from centre and radius, straight from the two ends: half the tensors to hold."""
    plain = Interval.get_perturbation(inputs[0])[0] == torch.inf  # two ends, not an lp ball's centre
    if not (plain and node.use_mean and node.use_var and node.use_affine):
        return type(node).interval_propagate(node, *inputs)
    (lower, upper), weight, bias = inputs[0], inputs[1][0], inputs[2][0]
    scale = weight / torch.sqrt(node.current_var + node.eps)
    shift = bias - node.current_mean * scale
    falling = (scale < 0).view(1, -1, *[1] * (lower.ndim - 2))
    if falling.any():
        lower, upper = torch.where(falling, upper, lower), torch.where(falling, lower, upper)
    return _affine(lower, scale, shift), _affine(upper, scale, shift)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift by channel, in one pass there and one back."""
    return F.batch_norm(x, torch.zeros_like(shift), torch.ones_like(scale), scale, shift, eps=0.0)


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """For a while, normalise by the batch where ``model`` is in training mode without moving the running statistics."""
    moving = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.track_running_stats]
    moving = [module for module in moving if module.training]
    for module in moving:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in moving:
            module.track_running_stats = True
