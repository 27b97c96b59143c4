"""Bounds of given duals in float64, less what rounding can have added: what a proof rests on.

Coefficients that were computed are taken as chosen, so that every layer starts anew: what is left of rounding there is
how far ``g W`` as computed lies from g W, at most gamma_n |g| |W|, times the largest values below. ``sizes`` of a layer
(:mod:`cure_plugin.bounds.rounding`) bound those products, chains of linear layers included. The closed forms and sums
add a few units of the sum of their terms' absolute values (Higham 2002, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cure_plugin.bounds.rounding import growth
from cure_plugin.relaxation.corners import concave_part, smallest
from cure_plugin.relaxation.dual import Domain, Duals
from cure_plugin.relaxation.reduced import Layer, ReducedNet, Rows

_FORMS = 64
"""Roundings of the closed form of one neuron, at most."""


def certified(
    net: ReducedNet, rows: Rows, sizes: Tensor, duals: Duals, domain: Domain | None, coupled: bool, terms: int
) -> Tensor:
    """Lower bounds of ``rows`` (R,) that hold whatever rounding did.

    Args:
        net, rows, duals: in float64. sizes: of the rows' own terms (R,). domain: signs of splits, in float64.
        terms: along a chain of sums through the net.
    """
    factor, forms = growth(terms + _FORMS, torch.float64), growth(_FORMS, torch.float64)
    over: dict[int, Tensor] = dict(rows.weights)
    value, error = rows.bias.clone(), factor * sizes
    parts = net.parts()
    concave: Tensor | None = None
    for k in range(len(net.layers), 0, -1):
        layer, part = net.layers[k - 1], parts[k - 1]
        a = over.pop(k, None)
        if a is None:
            continue
        unstable = a[:, : layer.unstable]
        lower, upper = (layer.lower, layer.upper) if domain is None else domain.ends(layer, part)
        if layer.jump:
            concave = concave_part(unstable, None if domain is None else domain.signs[:, part])
            unstable = unstable - concave
            value += concave @ layer.clean.clamp(min=0)
            error += _of_corners(layer, concave, factor)
        by_ball = coupled and not layer.jump
        g = _coefficients(layer, unstable, duals.slopes[:, part], duals.splits[:, part], domain, part, by_ball)
        multiplier = duals.multipliers[:, k - 1] if by_ball else None
        h, size = _intercepts(layer, unstable, g, multiplier, lower, upper)
        passed = torch.cat([g, a[:, layer.unstable :]], 1)
        value += h + passed @ layer.bias
        error += (forms + growth(layer.unstable + 8, torch.float64)) * size + factor * (passed.abs() @ layer.sizes)
        for j, product in layer.products.items():
            over[j] = product.down(passed) if j not in over else over[j] + product.down(passed)
    first = over.get(0)
    if first is not None:
        inputs, sums = net.start, growth(first.shape[1] + _FORMS, torch.float64)
        if concave is None:
            least, point, _ = inputs.minimum(first, duals.budget)
        else:
            least, point, size = smallest(net.layers[0], inputs, concave, first)
            error += 2 * sums * size
        value += first @ inputs.x + least
        error += sums * (first.abs() @ (inputs.x.abs() + 2 * torch.maximum(inputs.low.abs(), inputs.high.abs())))
        if inputs.p == 2:  # the multiplier may have grown fivefold
            error += sums * 5 * duals.budget * (point.square().sum(1) + inputs.eps**2)
    return value - error


def _of_corners(layer: Layer, concave: Tensor, factor: float) -> Tensor:
    """How far rounding may move what negative coefficients (R, u) make of the first layer at an l1 ball's corners.

    Clean values err by at most ``factor`` times the layer's sizes, and so do those that corners add to.
    """
    furthest = layer.clean.abs() + layer.jump * layer.weights[0][: layer.unstable].abs().amax(1)
    sums = growth(layer.unstable + _FORMS, torch.float64)
    return concave.abs() @ (4 * factor * layer.sizes[: layer.unstable] + 2 * sums * furthest)


def _coefficients(
    layer: Layer, a: Tensor, slopes: Tensor, splits: Tensor, domain: Domain | None, part: slice, coupled: bool
) -> Tensor:
    """g of the unstable neurons; any values would do."""
    if not coupled:
        chord = layer.chord if domain is None else domain.chord(layer, part)
        slopes = torch.where(a >= 0, slopes, chord.expand_as(a))
    return slopes * a - splits


def _intercepts(
    layer: Layer, a: Tensor, g: Tensor, multiplier: Tensor | None, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """(h summed, the sum of its terms' absolute values), (R,) each; without a multiplier no ball is used."""
    rest = a - g
    ends = torch.maximum(lower.abs(), upper.abs())
    size = ((a.abs() + 2 * g.abs()) * ends).sum(1)
    if multiplier is None:
        return torch.minimum((rest * upper).clamp(max=0), (-g * lower).clamp(max=0)).sum(1), size
    m = multiplier[:, None]
    active = torch.minimum((layer.clean - rest / m).clamp(min=0), upper)
    inactive = torch.maximum((layer.clean + g / m).clamp(max=0), lower)
    at_active = rest * active + m / 2 * (active - layer.clean).square()
    at_inactive = -g * inactive + m / 2 * (inactive - layer.clean).square()
    size += (m * (ends + layer.clean.abs()).square()).sum(1) + multiplier * layer.radius**2
    return torch.minimum(at_active, at_inactive).sum(1) - multiplier / 2 * layer.radius**2, size
