"""The warm-up regulariser of Shi et al. 2021: bound tightness and ReLU balance during annealing."""

from __future__ import annotations

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

_TOLERANCE = 0.5


def warmup_regularizer(bounded: BoundedModule, input_width: Tensor) -> Tensor:
    """Penalty on the pre-activation bounds that the last ``compute_bounds`` left in ``bounded``; a scalar.

    Call it right after bounding the set it should watch (an linf set, whose boxes have the width that
    annealing is about). Tightness: layers whose bounds are wider than the input's by more than 2x.
    Balance: layers whose active and inactive neurons differ in mean or variance by more than 2x.

    Args:
        input_width: widths of the input box, any shape.
    """
    layers = [relu.inputs[0] for relu in bounded.relus]
    total = input_width.new_zeros(())
    for layer in layers:
        lower, upper = layer.lower, layer.upper
        width = (upper - lower).mean()
        tightness = (_TOLERANCE - input_width.mean() / width.clamp(min=1e-12)).clamp(min=0)
        total = total + (tightness + _imbalance(lower, upper)) / _TOLERANCE
    return total / max(1, len(layers))


def _imbalance(lower: Tensor, upper: Tensor) -> Tensor:
    """How far active and inactive neurons are out of balance; 0 where either kind is missing."""
    centre = (lower + upper) / 2
    active, inactive = (lower > 0).to(centre.dtype), (upper < 0).to(centre.dtype)
    if not bool(active.any()) or not bool(inactive.any()):
        return centre.new_zeros(())
    spread = (centre - centre.mean()).square()
    ratios = (
        (centre * active).mean() / (-(centre * inactive).mean()).clamp(min=1e-12),
        (spread * active).sum() / (spread * inactive).sum().clamp(min=1e-12),
    )
    penalty = centre.new_zeros(())
    for ratio in ratios:
        ratio = torch.minimum(ratio, 1 / ratio.clamp(min=1e-12))
        penalty = penalty + (_TOLERANCE - ratio).clamp(min=0)
    return penalty
