"""The first ReLU layer and an l1 ball around its input, bounded together.

For coefficients c <= 0 of ReLUs and any row f over the input, c relu(z(x + d)) + f d is concave in d, so that in
d = sum_v t_v e_v, with the corners e_v = +-eps e_j of the ball, t_v >= 0 and sum_v t_v <= 1, it is at least

    c relu(z(x)) + sum_v t_v (c (relu(z(x + e_v)) - relu(z(x))) + f e_v),

and where the input stays within low <= d <= high, t_v is at most the end over eps. What is left is a fractional
knapsack. The pixels' budget is spent once, where bounds of a layer followed by bounds of the input spend it twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cure_plugin.relaxation.inputs import InputSet
from cure_plugin.relaxation.reduced import Layer

_CORNERS = 64
"""That are looked at first: most are moved by more than a share of the budget, and all share it."""


def concave_part(a: Tensor, signs: Tensor | None) -> Tensor:
    """Negative coefficients (R, u), but of neurons that are split; ``signs`` of splits (R, u)."""
    concave = a.clamp(max=0)
    return concave if signs is None else concave * (1 - signs.abs())


def smallest(layer: Layer, start: InputSet, concave: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lower bounds of c (relu(z) - relu(clean)) + f d (R,), the shares t (R, 2 n_0), sizes of their terms (R,)).

    Args:
        layer: the first, with a ``jump``. concave: c <= 0 of its unstable neurons (R, u). first: f (R, n_0).
    """
    gains = layer.corners.down(concave) + layer.jump * torch.cat([first, -first], 1)
    caps = (torch.cat([start.high, -start.low]) / layer.jump).clamp(max=1)
    least, order = gains.topk(min(_CORNERS, gains.shape[1]), largest=False)
    if not bool(((caps[order].sum(1) >= 1) | (least[:, -1] >= 0)).all()):
        least, order = gains.sort(1)  # the budget goes further than to a few corners
    most = caps[order]
    taken = torch.minimum(most, (1 - (most.cumsum(1) - most)).clamp(min=0)) * (least < 0)
    # any price of the budget gives a bound: that of the corner where it ends
    full = taken.sum(1, keepdim=True) >= 1 - 1e-6
    price = torch.where(full, (-least).masked_fill(taken <= 0, torch.inf).amin(1, keepdim=True), 0.0)
    terms = caps * (gains + price).clamp(max=0)
    shares = torch.zeros_like(gains).scatter_(1, order, taken)
    return (terms.sum(1) - price.squeeze(1)), shares, price.squeeze(1) - terms.sum(1)


def moved(layer: Layer, shares: Tensor) -> Tensor:
    """d = sum_v t_v e_v of shares (R, 2 n_0), (R, n_0)."""
    up, down = shares.chunk(2, 1)
    return layer.jump * (up - down)


def mean_outputs(layer: Layer, shares: Tensor) -> Tensor:
    """What the unstable neurons put out in the mean of the corners and the clean input, (R, u)."""
    return layer.clean.clamp(min=0) + layer.corners.up(shares)
