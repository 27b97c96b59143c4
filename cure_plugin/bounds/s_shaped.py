"""Lines below and above Sigmoid and Tanh that hold to the last digits.

auto_LiRPA takes tangents from a table made in steps and up to an end: beyond it, 0.3's lines cut through the function.
Any slope k is as good as another; what a line with it may be shifted by is known in closed form, from the ends of the
interval and the points where the function's own slope is k. So its slopes are kept, and the lines are moved there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor


def mend_s_shaped(bounded: BoundedModule) -> None:
    """Let every Sigmoid and Tanh of ``bounded`` be bounded by lines that hold."""
    for node in bounded.modules():
        if type(node).__name__ in ("BoundSigmoid", "BoundTanh"):
            node.bound_relax = functools.partial(_relaxed, node, node.bound_relax)


def _relaxed(node: Any, original: Any, x: Any, *args: Any, **kwargs: Any) -> None:
    """auto_LiRPA's hook: its relaxation, with exact offsets ``lb`` and ``ub`` for its slopes ``lw`` and ``uw``."""
    original(x, *args, **kwargs)
    is_sigmoid = type(node).__name__ == "BoundSigmoid"
    function, turning = (torch.sigmoid, _turning_of_sigmoid) if is_sigmoid else (torch.tanh, _turning_of_tanh)

    def offsets(slope: Tensor) -> Tensor:
        """``f(z) - slope z`` at the ends of the interval and where it turns, inside it; (4, ...)."""
        turn = turning(slope)
        inside = [torch.minimum(torch.maximum(point, x.lower), x.upper) for point in (turn, -turn)]
        return torch.stack([function(z) - slope * z for z in (x.lower, x.upper, *inside)])

    node.lb, node.ub = offsets(node.lw).amin(0), offsets(node.uw).amax(0)


def _turning_of_sigmoid(slope: Tensor) -> Tensor:
    """z >= 0 with s (1 - s) = slope, s = sigmoid(z); where there is none, the steepest point 0."""
    root = (1 - 4 * slope.clamp(0, 0.25)).sqrt()
    return torch.logit(((1 + root) / 2).clamp(max=1 - torch.finfo(slope.dtype).eps))


def _turning_of_tanh(slope: Tensor) -> Tensor:
    """z >= 0 with 1 - tanh(z)^2 = slope; where there is none, the steepest point 0."""
    return torch.atanh((1 - slope.clamp(0, 1)).sqrt().clamp(max=1 - torch.finfo(slope.dtype).eps))
