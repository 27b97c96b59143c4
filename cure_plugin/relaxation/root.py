"""What a search starts from: the reduced net of one image, with boxes and balls of its layers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

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
from cure_plugin.relaxation.trace import Trace
from cure_plugin.sets import Region

_ROWS = 400
"""Unstable neurons up to which a layer's bounds are optimised; wider ones are convolutions, for which it takes long."""

_STEPS, _WIDE_STEPS = 20, 3
"""Evaluations of the dual for such a bound, and for one of a wider layer."""

_NARROW = 128
"""Neurons up to which optimising takes no time."""

_CHUNK = 512
"""Neurons bounded at a time."""

_NORM_SIDE = 1600
"""Rows or columns up to which the norm of what is kept of a matrix is computed for each image."""

_ROUNDED = 1.01
"""Sizes are sums of absolute values in the net's own precision."""

_SLACK = 1e-7
"""Of a neuron's terms: boxes are that much wider than what was found, so that other arithmetic finds no wider ones."""

_STABLE = 2e-5
"""Of a neuron's terms: how far beyond 0 an end must be in the working precision for the neuron to count as stable."""

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
    y: int
    sizes: Tensor
    coupled: bool
    terms: int


def root(
    affine: AffineNet,
    bounded: BoundedModule,
    region: Region,
    y: int,
    hints: Mapping[str, NodeBox],
    trace: Trace | None = None,
    until: float = math.inf,
) -> Root:
    """The root of one image; its boxes are bounded here, in float64, whatever the hints say.

    Args:
        bounded: what ``affine`` was read from. region: around one image, in the net's dtype. y: its label.
        hints: bounds of the ReLUs' inputs by name, (1, *shape): neurons that are stable there are bounded with less
            work.
        trace: takes the layers, and the duals that their boxes rest on.
        until: when to leave bounds of a layer's many neurons as they are, by ``time.monotonic``.

    Raises:
        SpecError: a set that is neither an lp ball nor a box, a node whose rounding has no rule, or bounds that are not
            finite.
    """
    start = input_set(region)
    start = replace(start, joint=start.p == 1 and trace is None)  # the checker of proofs does not know of it
    sizes = node_sizes(bounded, region.x, region.perturbation, {})
    if sizes is None:
        raise SpecError("the net has a node whose rounding has no rule")
    coupled = region.perturbation.shared_budget
    trace = trace or Trace()
    boxes = _Boxes(ReducedNet(affine, start), coupled, terms_along(bounded, region.x), trace, until)
    clean = [value[0] for value in affine.forward(start.x[None])]
    reach = [_Reach(*(float(radius.double()) * (1 + 1e-6) for radius in region.radii))]
    for k, name in enumerate(affine.names, 1):
        size = sizes[name][0].flatten().double() * _ROUNDED
        hint = [end[0].flatten() for end in hints[name]] if name in hints else None
        lower, upper = boxes.of(k, size, clean[k - 1], reach, None if hint is None else (hint[0] < 0) & (hint[1] > 0))
        if not bool(lower.isfinite().all() and upper.isfinite().all()):
            raise SpecError(f"bounds of node {name} are not finite")
        radius, passed = _radii(boxes.net, k, lower, upper, clean[k - 1], reach) if coupled else (math.inf, reach[0])
        reach.append(passed)
        radius += boxes.rounding * float(size.norm())  # of the clean values
        boxes.net.add(lower, upper, clean[k - 1], radius, size)
    net = trace.net = boxes.net
    final = sizes[bounded.final_node().name][0].double() * _ROUNDED
    others = _others(net, y)
    return Root(net, net.to(WORKING), _margins(net, y), y, final[y] + final[others], coupled, boxes.terms)


def tightened(start: Root, lower: Tensor, upper: Tensor) -> Root:
    """The same with other bounds of the last layer's unstable neurons (u,)."""
    old = start.exact
    k, layer = len(old.layers), old.layers[-1]
    all_lower, all_upper = old.boxes(k)
    unstable = layer.kept[: layer.unstable]
    all_lower[unstable], all_upper[unstable] = lower, upper
    sizes = torch.zeros_like(all_lower)
    sizes[layer.kept] = layer.sizes
    clean = old.net.forward(old.start.x[None])[k - 1][0]
    net = ReducedNet(old.net, old.start, old.layers[:-1])
    net.add(torch.minimum(all_lower, clean), torch.maximum(all_upper, clean), clean, layer.radius, sizes)
    return replace(start, exact=net, net=net.to(WORKING), margins=_margins(net, start.y))


def _others(net: ReducedNet, y: int) -> Tensor:
    return torch.tensor([j for j in range(len(net.net.biases[-1])) if j != y])


def _margins(net: ReducedNet, y: int) -> Rows:
    """z_y - z_j of the other classes."""
    rows, others = net.rows(len(net.layers) + 1), _others(net, y)
    weights = {j: weight[y] - weight[others] for j, weight in rows.weights.items()}
    return Rows(weights, rows.bias[y] - rows.bias[others])


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
        norms = net.net.norms[k - 1]
        return min(box, sum(_through(weight[which], norms[j], reach[j]) for j, weight in rows.weights.items()))

    after = torch.maximum(clean.clamp(min=0) - lower.clamp(min=0), upper.clamp(min=0) - clean.clamp(min=0))
    passed = min(radius(kept), float(after.norm()) * (1 + 1e-9))
    return radius(unstable), _Reach(math.inf, passed)


def _through(matrix: Tensor, norm: float, reach: _Reach) -> float:
    """l2 radius behind a matrix, a part of one that has the ``norm``."""
    if matrix.numel() == 0:
        return 0.0
    by_l1 = float(matrix.norm(dim=0).max()) * (1 + 1e-9) * reach.l1 if reach.l1 < math.inf else math.inf
    own = matrix_norm(matrix) if min(matrix.shape) <= _NORM_SIDE else math.inf
    return min(by_l1, min(norm, own) * reach.l2)


def _stable(margins: Tensor, both: Tensor) -> Tensor:
    """Which bounds (2 R,) are done since one of a neuron's two shows which side of 0 it is on.

    Args:
        margins: by how much it must (R,). both: lower bounds, then negated upper ones (2 R,).
    """
    return (both.view(2, -1) > margins).any(0).repeat(2)


class _Boxes:
    """Bounds of one layer's inputs after the other, over the layers below; all hold in float64.

    Args:
        net: without layers. coupled: whether layers have balls. terms: along a chain of sums.
        trace: takes the duals. until: when to stop optimising bounds of many neurons.
    """

    def __init__(self, net: ReducedNet, coupled: bool, terms: int, trace: Trace, until: float) -> None:
        self.net, self.coupled, self.terms, self.trace, self.until = net, coupled, terms, trace, until
        self.rounding = growth(terms, torch.float64)

    def of(
        self, k: int, size: Tensor, clean: Tensor, reach: list[_Reach], unstable: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(lower, upper), (n,) each: intervals, then rows of what they leave unstable, then optimised rows.

        Args:
            size: (n,). clean: values at the clean input (n,). reach: of the layers below.
            unstable: neurons that rows of fixed slopes will not show to be stable, (n,) bool; None: unknown.
        """
        rows = self.net.rows(k)
        lower, upper = self._intervals(rows, size)
        if self.coupled:
            moved = sum(weight.norm(dim=1) * reach[j].l2 for j, weight in rows.weights.items())
            moved = moved * (1 + 1e-9) + self.rounding * size
            lower, upper = torch.maximum(lower, clean - moved), torch.minimum(upper, clean + moved)
        left = (lower < 0) & (upper > 0)
        many = int(left.sum() if unstable is None else (left & unstable).sum()) > _ROWS
        first = left if unstable is None or many or k == 1 else left & ~unstable
        lower, upper = self._by_rows(rows, first, size, lower, upper, _WIDE_STEPS if many and k > 1 else 1)
        left = (lower < 0) & (upper > 0)
        if k > 1 and not many:
            lower, upper = self._by_rows(rows, left, size, lower, upper, _STEPS)
        lower, upper = lower - _SLACK * size, upper + _SLACK * size
        return torch.minimum(lower, clean), torch.maximum(upper, clean)

    def _intervals(self, rows: Rows, size: Tensor) -> tuple[Tensor, Tensor]:
        """By the ends of what the layers below put out."""
        lower, upper = rows.bias - self.rounding * size, rows.bias + self.rounding * size
        for j, weight in rows.weights.items():
            low, high = self.net.outputs(j)
            positive, negative = weight.clamp(min=0), weight.clamp(max=0)
            lower = lower + positive @ low + negative @ high
            upper = upper + positive @ high + negative @ low
        return lower, upper

    def _by_rows(
        self, rows: Rows, chosen: Tensor, size: Tensor, lower: Tensor, upper: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Bounds of the neurons ``chosen`` (n,) bool by duals after so many ``steps``, where they are better."""
        if not bool(chosen.any()):
            return lower, upper
        lower, upper = lower.clone(), upper.clone()
        dual = Dual(self.net.to(WORKING), self.coupled)
        neurons = chosen.nonzero().flatten()
        parts = neurons.split(_CHUNK)
        for number, index in enumerate(parts):
            both = rows.select(index).and_negated()
            working = both.to(WORKING)
            duals = dual.start(working)
            if steps > 1:
                stable = partial(_stable, _STABLE * size[index].to(WORKING))
                until = self._share(len(parts) - number) if len(neurons) > _NARROW else math.inf
                duals = climb(dual, working, duals, Ascent(steps, rate=0.2, until=until), done=stable).duals
            self.trace.boxes.append((len(self.net.layers) + 1, index, duals))
            sizes = size[index].repeat(2)
            found = certified(self.net, both, sizes, duals.to(torch.float64), None, self.coupled, self.terms)
            low, high = found.split(len(index))
            lower[index] = torch.fmax(lower[index], low)
            upper[index] = torch.fmin(upper[index], -high)
        return lower, upper

    def _share(self, parts: int) -> float:
        """When the first of so many parts of a layer is to end."""
        now = time.monotonic()
        return now + max(0.0, self.until - now) / parts
