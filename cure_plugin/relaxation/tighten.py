"""Tighter boxes of the last hidden layer by branch and bound: what every class and every subdomain gains from."""

from __future__ import annotations

import torch
from torch import Tensor

from cure_plugin.relaxation.dual import Duals
from cure_plugin.relaxation.optimise import Best
from cure_plugin.relaxation.reduced import ReducedNet, Rows
from cure_plugin.relaxation.root import WORKING, Root, tightened
from cure_plugin.relaxation.search import Limits, Pool, Search, Searched

_MOST = 64
"""Unstable neurons up to which it pays: a step splits subdomains of every end of every box."""

_CHUNK = 256
"""Subdomains bounded in float64 at a time."""


def worthwhile(start: Root) -> bool:
    """Whether :func:`tighten` is for it: nets of several layers with balls, few unstable neurons in the last."""
    layers = start.exact.layers
    return start.coupled and len(layers) > 1 and 0 < layers[-1].unstable <= _MOST


def tighten(start: Root, limits: Limits) -> Root:
    """``start`` with tighter boxes of its last hidden layer."""
    layers = start.exact.layers
    layer, unstable = layers[-1], layers[-1].unstable
    below = ReducedNet(start.exact.net, start.exact.start, layers[:-1])
    rows = Rows(layer.weights, layer.bias).select(torch.arange(unstable)).and_negated()
    sizes = layer.sizes[:unstable].repeat(2)
    ends = Root(below, below.to(WORKING), rows, start.y, sizes, start.coupled, start.terms)
    bounds = _Ends(ends, limits).bounds()
    lower, upper = torch.maximum(layer.lower, bounds[:unstable]), torch.minimum(layer.upper, -bounds[unstable:])
    return tightened(start, lower, upper)


class _Ends(Search):
    """Lower bounds of all rows alike: of each, its worst subdomain is split."""

    def __init__(self, start: Root, limits: Limits) -> None:
        super().__init__(start, limits, lambda *_: False)

    def bounds(self) -> Tensor:
        """(R,) in float64; -inf where there is none."""
        pool = self._begin()
        if isinstance(pool, Searched):
            return self.proved_least if pool.proved else torch.full_like(self.proved_least, -torch.inf)
        while len(pool) and not self._spent() and not pool.full():
            self._step(pool)
        while len(pool):
            classes, signs, _, duals, _ = pool.pop(_CHUNK)
            self._settle_at(classes, self._certified(classes, signs, duals))
        return self.proved_least

    def _settle_at(self, classes: Tensor, bounds: Tensor) -> None:
        """Take bounds of subdomains that are not split further."""
        self.proved_least.scatter_reduce_(0, classes, bounds, "amin")

    def _stuck(self, closed: Best, rows: Tensor, classes: Tensor, signs: Tensor) -> None:
        self._settle_at(classes, self._certified(classes, signs, closed.duals.select(rows)))

    def _pop(self, pool: Pool) -> tuple[Tensor, Tensor, Tensor, Duals, Tensor]:
        return pool.pop_each()
