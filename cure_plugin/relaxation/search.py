"""Branch and bound over ReLU neurons: subdomains where a bound is not enough are split at one neuron, worst first."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cure_plugin.progress import Watch, unwatched
from cure_plugin.relaxation.dual import Domain, Dual, Duals, Found
from cure_plugin.relaxation.optimise import Ascent, Best, climb
from cure_plugin.relaxation.recheck import certified
from cure_plugin.relaxation.root import WORKING, Root
from cure_plugin.relaxation.trace import Trace

_ROOT = Ascent(50)

_SEPARATE, _COUPLED = (Ascent(12, rate=0.03, splits=0.01), 1), (Ascent(30), 2)
"""How a node is bounded, and how many neurons by each of two scores are tried for its split, without and with balls.

Children start from their parent's duals, so that small steps are enough; larger ones lose what it had found. A ball's
multipliers take longer, and its splits prune more.
"""

_LEAF = Ascent(400, decay=0.99, mean=True)

_CLOSE = 2e-5
"""Of the largest logit term: how far above 0 the working precision's bounds must be before float64 is asked."""


Refute = Callable[[Tensor, bool], bool]


@dataclass(frozen=True)
class Limits:
    """When to give up.

    Attributes:
        seconds: of the clock. nodes: subdomains bounded in all. batch: at a time. bytes: of those that wait.
    """

    seconds: float
    nodes: int
    batch: int = 128
    bytes: int = 1 << 29


@dataclass(frozen=True)
class Searched:
    """What the search found.

    Attributes:
        proved: every subdomain is. margin: a lower bound of the smallest margin. nodes: subdomains bounded.
        depth: the most splits on one of them.
    """

    proved: bool
    margin: float
    nodes: int
    depth: int


def search(
    start: Root,
    limits: Limits,
    is_counterexample: Refute,
    trace: Trace | None = None,
    watch: Watch = unwatched,
) -> Searched:
    """Prove all margins of ``start`` positive, or end where a point is none.

    Args:
        is_counterexample: given inputs (R, n), which may stick out of the set by rounding, and whether to look around
            them too: whether one was found.
        trace: takes the subdomains that are proved. watch: told what is going on.
    """
    return Search(start, limits, is_counterexample, trace).run(watch)


class Search:
    """The state of a search; arguments as of :func:`search`."""

    def __init__(self, start: Root, limits: Limits, is_counterexample: Refute, trace: Trace | None = None) -> None:
        self.trace = trace
        self.start, self.limits, self.is_counterexample = start, limits, is_counterexample
        self.deadline = time.monotonic() + limits.seconds
        self.dual = Dual(start.net, start.coupled)
        self.ascent, self.tried = _COUPLED if start.coupled else _SEPARATE
        self.rows = start.margins.to(WORKING)
        self.count = len(self.dual.lower)
        largest = float(start.exact.net.forward(start.exact.start.x[None])[-1].abs().max())
        self.target = _CLOSE * max(1.0, largest)
        self.nodes = self.depth = 0
        self.proved_least = torch.full((len(self.rows),), math.inf, dtype=torch.float64)
        self.refuted = False
        self.scale = torch.ones(1, self.count)

    def run(self, watch: Watch = unwatched) -> Searched:
        """Until all is proved, or an end is reached."""
        pool = self._begin()
        if isinstance(pool, Searched):
            return pool
        while len(pool):
            watch(self.nodes, pool.worst())
            if self._spent() or pool.full():
                return self._open(pool.worst())
            outcome = self._step(pool)
            if outcome is not None:
                return outcome
        return self._proved()

    def _spent(self) -> bool:
        """Whether the limits are reached."""
        return time.monotonic() > self.deadline or self.nodes >= self.limits.nodes

    def _begin(self) -> Pool | Searched:
        """The subdomains to start from, or what ends the search at once."""
        everything = torch.zeros(len(self.rows), self.count, dtype=torch.int8)
        classes = torch.arange(len(self.rows))
        best = climb(self.dual, self.rows, self.dual.start(self.rows), _ROOT, done=self._done)
        self.nodes += len(classes)
        open_ = self._settle(classes, everything, best.value, best.duals)
        if best.last is not None and len(open_):
            self._look(best.last.point)
        if len(open_) == 0:
            return self._proved()
        if self.refuted or self.count == 0:
            return self._open(float(best.value[open_].min()))
        last, chosen = self._evaluated(best, open_, classes, None)
        self.scale = _usual(last.over_all("a"), self.dual)
        pool = Pool(len(self.rows), self.count, best.duals.multipliers.shape[1], self.limits.bytes)
        pool.push(
            open_, everything[open_], best.value[open_], best.duals.select(open_), self._candidates(last, chosen, None)
        )
        return pool

    def _pop(self, pool: Pool) -> tuple[Tensor, Tensor, Tensor, Duals, Tensor]:
        """What is split next."""
        return pool.pop(max(1, self.limits.batch // 2))

    def _step(self, pool: Pool) -> Searched | None:
        """Split the worst subdomains; what ends the search, if anything does."""
        classes, signs, bounds, duals, candidates = self._pop(pool)
        neurons = self._choose(classes, signs, bounds, duals, candidates)
        twice = torch.cat([torch.arange(len(classes))] * 2)
        sides = torch.cat([torch.ones(len(classes)), -torch.ones(len(classes))])
        signs = signs[twice].scatter(1, neurons[twice, None], sides[:, None].to(torch.int8))
        classes, parents = classes[twice], bounds[twice]
        given = self._split(duals.select(twice), neurons[twice], sides)
        domain = Domain(signs.to(WORKING))
        best = climb(self.dual, self.rows.select(classes), given, self.ascent, domain, self.scale, self._done)
        self.nodes += len(classes)
        self.depth = max(self.depth, int((signs != 0).sum(1).max()))
        value = torch.maximum(best.value, parents)
        open_ = self._settle(classes, signs, value, best.duals)
        whole = open_[(signs[open_] != 0).all(1)]
        if len(whole):  # convex there: only steps are missing
            leaf = Domain(signs[whole].to(WORKING))
            closed = climb(
                self.dual,
                self.rows.select(classes[whole]),
                best.duals.select(whole),
                _LEAF,
                leaf,
                self.scale,
                self._done,
            )
            stuck = self._settle(classes[whole], signs[whole], closed.value, closed.duals)
            if len(stuck):
                outcome = self._stuck(closed, stuck, classes[whole[stuck]], signs[whole[stuck]])
                if outcome is not None:
                    return outcome
            open_ = open_[(signs[open_] == 0).any(1)]
        if len(open_) == 0:
            return None
        domain_open = Domain(signs[open_].to(WORKING))
        last, chosen = self._evaluated(best, open_, classes, domain_open)
        self._look(last.point)
        if self.refuted:
            return self._open(float(value[open_].min()))
        found = self._candidates(last, chosen, domain_open)
        pool.push(classes[open_], signs[open_], value[open_], best.duals.select(open_), found)
        return None

    def _stuck(self, closed: Best, rows: Tensor, classes: Tensor, signs: Tensor) -> Searched | None:
        """What follows from subdomains, ``rows`` of ``closed``, that are not proved and cannot be split."""
        if closed.last is not None and closed.mean is not None:
            self._look(torch.cat([closed.mean, closed.last.point]), closely=True)
        return self._open(float(closed.value[rows].min()))

    def _evaluated(self, best: Best, open_: Tensor, classes: Tensor, domain: Domain | None) -> tuple[Found, Tensor]:
        """(an evaluation, which of its rows are the subdomains ``open_``, in their ``domain``)."""
        where = torch.full((len(classes),), -1)
        where[best.left] = torch.arange(len(best.left))
        if best.last is not None and bool((where[open_] >= 0).all()):
            return best.last, where[open_]
        # float64 refused what the working precision took for done
        again = self.dual.evaluate(self.rows.select(classes[open_]), best.duals.select(open_), domain)
        return again, torch.arange(len(open_))

    def _split(self, duals: Duals, neurons: Tensor, sides: Tensor) -> Duals:
        """Duals of the children: the split neuron's slope is its own."""
        slopes = duals.slopes.scatter(1, neurons[:, None], (sides[:, None] > 0).to(WORKING))
        return Duals(slopes, duals.splits, duals.multipliers, duals.budget)

    def _done(self, value: Tensor) -> Tensor:
        """Which bounds (R,) of the working precision are taken to float64."""
        return value > self.target

    def _settle(self, classes: Tensor, signs: Tensor, value: Tensor, duals: Duals) -> Tensor:
        """Which of the subdomains are not proved in float64."""
        done = self._done(value).nonzero().flatten()
        if len(done) == 0:
            return torch.arange(len(classes))
        bound = self._certified(classes[done], signs[done], duals.select(done))
        proved = bound > 0
        self.proved_least.scatter_reduce_(0, classes[done[proved]], bound[proved], "amin")
        if self.trace is not None and bool(proved.any()):
            some = done[proved]
            self.trace.leaves.append((classes[some], signs[some], duals.select(some)))
        left = torch.ones(len(classes), dtype=torch.bool)
        left[done[proved]] = False
        return left.nonzero().flatten()

    def _certified(self, classes: Tensor, signs: Tensor, duals: Duals) -> Tensor:
        """Bounds of subdomains in float64, less what rounding can have added."""
        start, domain = self.start, Domain(signs.double())
        rows, sizes = start.margins.select(classes), start.sizes[classes]
        return certified(start.exact, rows, sizes, duals.to(torch.float64), domain, start.coupled, start.terms)

    def _look(self, moved: Tensor, closely: bool = False) -> None:
        """Whether the input moved by minimisers (R, n) is a counterexample; ``closely``: or what lies near."""
        self.refuted = self.is_counterexample(self.start.net.start.x + moved, closely)

    def _candidates(self, found: Found, chosen: Tensor, domain: Domain | None) -> Tensor:
        """Neurons worth splitting, of the rows ``chosen``, (R, 2 * tried).

        First-order gains of both children, and what each neuron's relaxation costs.
        """
        a, g, h, z = (found.over_all(name)[chosen] for name in ("a", "g", "h", "reached"))
        extra: list[Tensor | float] = [0.0, 0.0]
        if self.start.coupled:
            widths = torch.tensor([part.stop - part.start for part in self.dual.parts])
            m = found.multipliers[chosen].repeat_interleave(widths, 1) / 2
            extra = [m * self.dual.clean.clamp(max=0).square(), m * self.dual.clean.clamp(min=0).square()]
            cost = -h
        else:
            cost = (-a).clamp(min=0) * (-self.dual.lower * torch.cat([layer.chord for layer in self.dual.net.layers]))
        active, inactive = extra[0] - h + (a - g) * z, extra[1] - h - g * z
        gain = torch.minimum(active, inactive).clamp(min=0) + 0.1 * torch.maximum(active, inactive).clamp(min=0)
        count = min(self.tried, a.shape[1])
        free = torch.zeros_like(a) if domain is None else domain.signs.abs()
        picked = [(score - 1e9 * free).topk(count, dim=1).indices for score in (gain, cost)]
        return torch.cat(picked, 1)

    def _choose(self, classes: Tensor, signs: Tensor, bounds: Tensor, duals: Duals, candidates: Tensor) -> Tensor:
        """The candidate (R,) whose children's bounds, one step from their parent's duals, are best."""
        count, each = candidates.shape
        many = torch.arange(count).repeat_interleave(each)
        neurons = candidates.flatten()
        rows, given = self.rows.select(classes[many]), duals.select(many)
        values = []
        for side in (1, -1):
            sides = torch.full((len(many),), float(side))
            child = signs[many].scatter(1, neurons[:, None], side).to(WORKING)
            values.append(self.dual.value(rows, self._split(given, neurons, sides), Domain(child)).view(count, each))
        parents = bounds[:, None]
        low, high = torch.minimum(*values).maximum(parents), torch.maximum(*values).maximum(parents)
        taken = signs.gather(1, candidates) != 0
        score = (low.clamp(max=self.target) + 0.3 * high.clamp(max=self.target)).masked_fill(taken, -torch.inf)
        return candidates.gather(1, score.argmax(1, keepdim=True)).squeeze(1)

    def _proved(self) -> Searched:
        return Searched(True, float(self.proved_least.min()), self.nodes, self.depth)

    def _open(self, worst: float) -> Searched:
        """``worst``: the smallest bound of what is left, in the working precision."""
        return Searched(False, min(worst, float(self.proved_least.min())), self.nodes, self.depth)


def _usual(coefficients: Tensor, dual: Dual) -> Tensor:
    """Mean absolute coefficients of each layer, at each of its neurons, (1, N)."""
    means = [
        coefficients[:, part].abs().mean().clamp(min=1e-6).expand(part.stop - part.start)
        for part in dual.parts
        if part.stop > part.start
    ]
    return torch.cat(means)[None]


class Pool:
    """Subdomains that wait, of each row the worst bound first, in rows of a few tensors."""

    def __init__(self, rows: int, neurons: int, layers: int, limit: int) -> None:
        each = neurons * 9 + layers * 4 + 64
        self._most = max(256, limit // each)
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in range(rows)]
        self._free: list[int] = []
        self._kept: dict[str, Tensor] = {}
        self._size = 0

    def __len__(self) -> int:
        return sum(map(len, self._heaps))

    def full(self) -> bool:
        """Whether the limit is reached."""
        return len(self) >= self._most

    def worst(self) -> float:
        """The smallest bound."""
        return min(heap[0][0] for heap in self._heaps if heap)

    def push(self, classes: Tensor, signs: Tensor, bounds: Tensor, duals: Duals, candidates: Tensor) -> None:
        values: dict[str, Tensor] = {"classes": classes, "signs": signs, "bounds": bounds, "candidates": candidates}
        values.update({name: getattr(duals, name) for name in Duals.__dataclass_fields__})
        while len(self._free) < len(classes):
            self._grow(values)
        places = torch.tensor([self._free.pop() for _ in range(len(classes))])
        for name, value in values.items():
            self._kept[name][places] = value
        for row, bound, place in zip(classes.tolist(), bounds.tolist(), places.tolist(), strict=True):
            heapq.heappush(self._heaps[row], (bound, place))

    def _grow(self, like: dict[str, Tensor]) -> None:
        more = max(256, self._size)
        for name, value in like.items():
            added = value.new_empty(more, *value.shape[1:])
            self._kept[name] = torch.cat([self._kept[name], added]) if self._size else added
        self._free += range(self._size + more - 1, self._size - 1, -1)
        self._size += more

    def pop(self, count: int) -> tuple[Tensor, Tensor, Tensor, Duals, Tensor]:
        """The ``count`` worst: classes, signs, bounds, duals, candidates."""
        waiting = [heap for heap in self._heaps if heap]
        places: list[int] = []
        while waiting and len(places) < count:
            heap = min(waiting, key=lambda one: one[0])
            places.append(heapq.heappop(heap)[1])
            if not heap:
                waiting.remove(heap)
        return self._taken(places)

    def pop_each(self) -> tuple[Tensor, Tensor, Tensor, Duals, Tensor]:
        """The worst of every row."""
        return self._taken([heapq.heappop(heap)[1] for heap in self._heaps if heap])

    def _taken(self, places: list[int]) -> tuple[Tensor, Tensor, Tensor, Duals, Tensor]:
        self._free += places
        index = torch.tensor(places)
        found: dict[str, Any] = {name: value[index] for name, value in self._kept.items()}
        duals = Duals(*(found[name] for name in Duals.__dataclass_fields__))
        return found["classes"], found["signs"], found["bounds"], duals, found["candidates"]
