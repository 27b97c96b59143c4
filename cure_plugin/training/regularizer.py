"""The warm-up regulariser of Shi et al. 2021: bound tightness and ReLU balance during annealing."""

from __future__ import annotations

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.training.world import ALONE, Share

_TOLERANCE = 0.5


def warmup_regularizer(bounded: BoundedModule, input_width: Tensor, share: Share | None = None) -> Tensor:
    """Penalty on the pre-activation bounds that the last ``compute_bounds`` left in ``bounded``; a scalar.

    Call it right after bounding the set it should watch (an linf set, whose boxes have the width that
    annealing is about). Tightness: layers whose bounds are wider than the input's by more than 2x.
    Balance: layers whose active and inactive neurons differ in mean or variance by more than 2x.

    Args:
        input_width: widths of the input box, a row a sample.
        share: the samples that these are of a larger batch, over which the means are taken; None: all of it.
    """
    share = share or ALONE.share(len(input_width))
    layers = [relu.inputs[0] for relu in bounded.relus]
    total = input_width.new_zeros(())
    for layer in layers:
        lower, upper = layer.lower, layer.upper
        width = share.mean(upper - lower)
        tightness = (_TOLERANCE - share.mean(input_width) / width.clamp(min=1e-12)).clamp(min=0)
        total = total + (tightness + _imbalance(lower, upper, share)) / _TOLERANCE
    return total / max(1, len(layers))


def _imbalance(lower: Tensor, upper: Tensor, share: Share) -> Tensor:
    """How far active and inactive neurons are out of balance; 0 where either kind is missing."""
    centre = (lower + upper) / 2
    active, inactive = (lower > 0).to(centre.dtype), (upper < 0).to(centre.dtype)
    if not share.any(lower > 0) or not share.any(upper < 0):
        return centre.new_zeros(())
    spread = (centre - share.mean(centre)).square()
    ratios = (
        share.mean(centre * active) / (-share.mean(centre * inactive)).clamp(min=1e-12),
        share.sum(spread * active) / share.sum(spread * inactive).clamp(min=1e-12),
    )
    penalty = centre.new_zeros(())
    for ratio in ratios:
        ratio = torch.minimum(ratio, 1 / ratio.clamp(min=1e-12))
        penalty = penalty + (_TOLERANCE - ratio).clamp(min=0)
    return penalty
