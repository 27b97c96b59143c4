"""Intervals through a 1 x 1 convolution that mixes no channels, as a normalisation is one, channel by channel.

Said as a convolution, on a CPU they take longer than those of the layer after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from auto_LiRPA.operators.base import Interval
from torch import Tensor

from cure_plugin.bounds.elementwise import constant

Ends = tuple[Tensor, Tensor]


def channel_scaling(node: Any) -> Ends | None:
    """(factor, shift) of each channel, (C, 1, 1) both, of a convolution that is no more; None of another."""
    fixed = [None if parent.perturbed else constant(parent) for parent in node.inputs[1:]]
    if any(value is None for value in fixed):
        return None
    weight, bias = fixed[0], fixed[1] if node.has_bias else None
    if weight is None or weight.ndim != 4 or weight.shape[0] != weight.shape[1] or weight[0, 0].numel() != 1:
        return None
    if (tuple(node.stride), tuple(node.padding)) != ((1, 1), (0, 0)):
        return None
    matrix = weight[:, :, 0, 0]
    factor = matrix.diagonal()
    if bool((matrix != torch.diag(factor)).any()):
        return None
    shift = torch.zeros_like(factor) if bias is None else bias
    return factor[:, None, None], shift[:, None, None]


def with_channel_scaling(original: Callable[..., Any]) -> Callable[..., Any]:
    """``BoundConv.interval_propagate`` that scales the channels of a box where that is all there is to do."""

    def interval_propagate(self: Any, *v: Any, **named: Any) -> Any:
        box = Interval.get_perturbation(v[0])[0] == math.inf
        fixed = not v[1][0].requires_grad  # entries off the diagonal would get no gradient
        scaling = channel_scaling(self) if box and fixed and v[0][0].ndim == 4 else None
        if scaling is None:
            return original(self, *v, **named)
        factor, shift = scaling
        ends = v[0][0] * factor + shift, v[0][1] * factor + shift
        return torch.minimum(*ends), torch.maximum(*ends)

    return interval_propagate
