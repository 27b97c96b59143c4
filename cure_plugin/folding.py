"""A net for attacks to call: in eval mode, without parameter gradients, BatchNorm folded into the layers before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from cure_plugin.inputs import like
from cure_plugin.modes import evaluation_mode
from cure_plugin.nets import Normalize


class AttackNet(nn.Module):
    """Computes what ``model`` computes in eval mode, faster: a snapshot of its weights, to attack and throw away.

    Folding is exact up to rounding, and done where it is plain to see that it is: in chains (``nn.Sequential`` itself,
    nested or not, no layer with hooks). Any other model is called as it is.

    Args:
        model: left untouched, its mode too.
        amp: run convolutions and linear layers in bfloat16 (torch.autocast); logits come back as float.
        channels_last: memory layout of images, which some devices prefer; on a CPU it is chosen here.
    """

    def __init__(self, model: nn.Module, amp: bool = False, channels_last: bool = False) -> None:
        super().__init__()
        self.amp = amp
        with evaluation_mode(model), torch.no_grad():
            layers = _folded(copy.deepcopy(list(_flattened(model)))) if _is_chain(model) else []
            here = not amp and like(model).device.type == "cpu"
            channels_last = channels_last or (here and _prefers_channels_last(layers))
            self.format = torch.channels_last if channels_last else torch.contiguous_format
            if layers:
                layers = [_quick(layer, self.format) for layer in layers] if here else layers
                self.net: nn.Module = nn.Sequential(*layers)
                self.net.requires_grad_(False)
                for parameter in self.net.parameters():
                    if parameter.ndim == 4:
                        parameter.data = parameter.data.contiguous(memory_format=self.format)
            else:
                self.net = model

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.contiguous(memory_format=self.format)
        with evaluation_mode(self.net), torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            return self.net(x).to(x.dtype)


_ORDINARY = (
    Normalize,
    nn.Conv2d,
    nn.Linear,
    nn.ReLU,
    nn.Flatten,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.Dropout,
    nn.Identity,
)
"""Layers that do not mind how images lie in memory."""


class _OneChannel(nn.Module):
    """A convolution of grey images whose weights are given: its gradient as a matrix product, several times faster."""

    def __init__(self, layer: nn.Conv2d, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.layer, self.format = layer, memory_format

    def forward(self, x: Tensor) -> Tensor:
        return _GreyConvolution.apply(x, self.layer).contiguous(memory_format=self.format)


class _GreyConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.layer, ctx.size = layer, x.shape[2:]
        return layer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        columns = (gradient.permute(0, 2, 3, 1).flatten(1, 2) @ layer.weight.flatten(1)).transpose(1, 2)
        places = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
        return F.fold(columns, ctx.size, layer.kernel_size, **places), None


def _quick(layer: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """``layer``, or one that gives the same and passes gradients to its input faster on a CPU."""
    if type(layer) is not nn.Conv2d or layer.in_channels > 1 or layer.padding_mode != "zeros":
        return layer
    return layer if isinstance(layer.padding, str) else _OneChannel(layer, memory_format)


def _prefers_channels_last(chain: Sequence[nn.Module]) -> bool:
    """Whether a CPU's convolutions are to lie so in memory: up to a fifth faster, where no layer minds."""
    return any(isinstance(layer, nn.Conv2d) for layer in chain) and all(type(layer) in _ORDINARY for layer in chain)


def _is_chain(model: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether calling the layers one after the other is all that ``model`` does."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return type(model) is nn.Sequential and not hooked


def _flattened(chain: nn.Sequential) -> Iterator[nn.Module]:
    """The layers of nested chains, one after the other."""
    for module in chain:
        if isinstance(module, nn.Sequential) and type(module) is nn.Sequential:
            yield from _flattened(module)
        else:
            yield module


def _folded(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers without the BatchNorm that the layer before can take over."""
    result: list[nn.Module] = []
    for layer in layers:
        before = result[-1] if result else None
        if type(before) is nn.Conv2d and type(layer) is nn.BatchNorm2d and _folds(layer):
            result[-1] = fuse_conv_bn_eval(before, layer)
        elif type(before) is nn.Linear and type(layer) is nn.BatchNorm1d and _folds(layer) and _flat(result):
            result[-1] = fuse_linear_bn_eval(before, layer)
        else:
            result.append(layer)
    return result


def _flat(layers: list[nn.Module]) -> bool:
    """Whether the layers surely end in (B, features), where BatchNorm1d's channels are what a linear layer puts out."""
    for layer in reversed(layers):
        if type(layer) is nn.Flatten:
            return (layer.start_dim, layer.end_dim) == (1, -1)
        if type(layer) not in (nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Dropout, nn.Identity):
            return False
    return False


def _folds(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    return norm.running_mean is not None and norm.affine
