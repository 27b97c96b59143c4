"""What a search starts from: the reduced net of one image, with boxes and balls of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.bounds.margins import NodeBox
from cure_plugin.bounds.norms import matrix_norm
from cure_plugin.bounds.rounding import growth, node_sizes, terms_along
from cure_plugin.errors import SpecError
from cure_plugin.relaxation.affine import AffineNet
from cure_plugin.relaxation.dual import Dual
from cure_plugin.relaxation.inputs import input_set
from cure_plugin.relaxation.optimise import Ascent, climb
from cure_plugin.relaxation.recheck import certified
from cure_plugin.relaxation.reduced import ReducedNet, Rows
from cure_plugin.sets import Region

_ROWS = 400
"""Unstable neurons up to which a layer's bounds are optimised; wider ones are convolutions, for which it takes long."""

_STEPS = 20
"""Of the optimisation of such a bound."""

_NORM_SIDE = 1200
"""Rows or columns up to which a matrix's norm is computed exactly."""

_ROUNDED = 1.01
"""Sizes are sums of absolute values in the net's own precision."""

WORKING = torch.float32
"""Of the search; proofs rest on float64."""


@dataclass(frozen=True)
class Root:
    """See above.

    Attributes:
        exact: in float64. net: the same in the working precision. margins: rows z_y - z_j of the classes j != y,
            float64, and ``sizes`` of their terms. coupled: whether layers have balls. terms: along a chain of sums.
    """

    exact: ReducedNet
    net: ReducedNet
    margins: Rows
    sizes: Tensor
    coupled: bool
    terms: int


def root(affine: AffineNet, bounded: BoundedModule, region: Region, y: int, boxes: Mapping[str, NodeBox]) -> Root:
    """The root of one image.

    Args:
        bounded: what ``affine`` was read from. region: around one image, in the net's dtype. y: its label.
        boxes: bounds of the ReLUs' inputs, (1, *shape), as computed in that dtype.

    Raises:
        SpecError: a set that is neither an lp ball nor a box, a node whose rounding has no rule, or bounds that are not
            finite.
    """
    start = input_set(region)
    sizes = node_sizes(bounded, region.x, region.perturbation, dict(boxes))
    if sizes is None:
        raise SpecError("the net has a node whose rounding has no rule")
    terms = terms_along(bounded, region.x)
    coupled = region.perturbation.shared_budget
    net = ReducedNet(affine, start)
    clean = [value[0] for value in affine.forward(start.x[None])]
    reach = [_Reach(*(float(radius.double()) * (1 + 1e-6) for radius in region.radii))]
    for k, name in enumerate(affine.names, 1):
        size = sizes[name][0].flatten().double() * _ROUNDED
        slack = growth(terms, region.x.dtype) * size
        lower, upper = (end[0].flatten().double() for end in boxes[name])
        lower, upper = torch.minimum(lower - slack, clean[k - 1]), torch.maximum(upper + slack, clean[k - 1])
        if not bool(lower.isfinite().all() and upper.isfinite().all()):
            raise SpecError(f"bounds of node {name} are not finite")
        if k > 1:
            lower, upper = _tightened(net, k, lower, upper, size, coupled, terms)
        radius, passed = _radii(net, k, lower, upper, clean[k - 1], reach) if coupled else (math.inf, reach[0])
        reach.append(passed)
        radius += growth(terms, torch.float64) * float(size.norm())  # of the clean values
        net.add(lower, upper, clean[k - 1], radius, size)
    rows = net.rows(len(affine.names) + 1)
    others = torch.tensor([j for j in range(len(rows)) if j != y])
    margins = Rows(
        {j: weight[y] - weight[others] for j, weight in rows.weights.items()}, rows.bias[y] - rows.bias[others]
    )
    final = sizes[bounded.final_node().name][0].double() * _ROUNDED
    return Root(net, net.to(WORKING), margins, final[y] + final[others], coupled, terms)


@dataclass(frozen=True)
class _Reach:
    """How far what a layer puts out, or the input, moves in all: l1 and l2 norms."""

    l1: float
    l2: float


def _radii(
    net: ReducedNet, k: int, lower: Tensor, upper: Tensor, clean: Tensor, reach: list[_Reach]
) -> tuple[float, _Reach]:
    """(l2 radius of layer ``k``'s unstable inputs, reach of what the layer puts out)."""
    rows = net.rows(k)
    unstable, kept = (lower < 0) & (upper > 0), upper > 0

    def radius(which: Tensor) -> float:
        box = float(torch.maximum(clean - lower, upper - clean)[which].norm()) * (1 + 1e-9)
        return min(box, sum(_through(weight[which], reach[j]) for j, weight in rows.weights.items()))

    after = torch.maximum(clean.clamp(min=0) - lower.clamp(min=0), upper.clamp(min=0) - clean.clamp(min=0))
    passed = min(radius(kept), float(after.norm()) * (1 + 1e-9))
    return radius(unstable), _Reach(math.inf, passed)


def _through(matrix: Tensor, reach: _Reach) -> float:
    """l2 radius behind a matrix."""
    if matrix.numel() == 0:
        return 0.0
    by_l1 = float(matrix.norm(dim=0).max()) * (1 + 1e-9) * reach.l1 if reach.l1 < math.inf else math.inf
    small = min(matrix.shape) <= _NORM_SIDE
    spectral = matrix_norm(matrix) if small else float(matrix.norm()) * (1 + 1e-9)
    return min(by_l1, spectral * reach.l2)


def _tightened(
    net: ReducedNet, k: int, lower: Tensor, upper: Tensor, size: Tensor, coupled: bool, terms: int
) -> tuple[Tensor, Tensor]:
    """Bounds of layer ``k``'s inputs, those of unstable neurons optimised over the layers below."""
    unstable = ((lower < 0) & (upper > 0)).nonzero().flatten()
    if not 0 < len(unstable) <= _ROWS:
        return lower, upper
    rows = net.rows(k).select(unstable)
    both = Rows({j: torch.cat([w, -w]) for j, w in rows.weights.items()}, torch.cat([rows.bias, -rows.bias]))
    dual = Dual(net.to(WORKING), coupled)
    working = both.to(WORKING)
    best = climb(dual, working, dual.start(working), Ascent(_STEPS, rate=0.2))
    sizes = size[unstable].repeat(2)
    found = certified(net, both, sizes, best.duals.to(torch.float64), None, coupled, terms)
    low, high = found.split(len(unstable))
    lower, upper = lower.clone(), upper.clone()
    lower[unstable] = torch.fmax(lower[unstable], low)
    upper[unstable] = torch.fmin(upper[unstable], -high)
    return lower, upper
