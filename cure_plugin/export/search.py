"""Questions about outputs that are no robustness: boxes of inputs, or / and of linear inequalities over outputs.

Is there an input of some box whose outputs satisfy all inequalities of one alternative? A box is done where every
alternative has an inequality that bounds show to fail all over it; else it is attacked, and cut in two.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from auto_LiRPA import BoundedModule, BoundedTensor
from torch import Tensor, nn

from cure_plugin.bounds.margins import relu_boxes
from cure_plugin.bounds.memory import crown_bytes
from cure_plugin.bounds.module import bounded_module, default_dtype
from cure_plugin.bounds.rounding import required_margins
from cure_plugin.sets import PerturbationBox
from cure_plugin.vnncomp.query import Case, Linear

RUNTIME_SHARE = 1e-5
"""Of the largest output (at least 1): what is missed by less is no answer, as files are judged by what a float32
runtime makes of them, which the real-number function of their weights does not say."""

_BATCH, _MEMORY = 512, 1 << 30
"""Boxes bounded at a time, at most, and bytes that may take."""

_BOXES = 200_000
"""That are bounded until hope is lost."""

_STEPS, _STARTS, _LONG = 6, 64, 60
"""Of the attack on every box that is left; random points and steps of the attack on a whole box."""

_EVEN = 0.05
"""Share of the mean sensitivity that every input is given when a side to cut is chosen: those measured at a few points
may be 0 there alone."""


_Form = tuple[tuple[tuple[int, float], ...], float]
"""Coefficients by output, and the bound."""


@dataclass(frozen=True)
class Searched:
    """What the search found.

    Attributes:
        verdict: ``robust`` (no input satisfies the query), ``violated``, ``unknown`` or ``timeout``.
        margin: the smallest bound by which an inequality fails, over all boxes that are done.
        point: flattened input (d,) in float32 numbers where ``violated``.
        boxes: how many were bounded.
    """

    verdict: str
    margin: float
    point: np.ndarray | None
    boxes: int


@dataclass(frozen=True)
class _Box:
    """Inputs (d,) between two ends, and which alternatives (A,) are left there."""

    lower: Tensor
    upper: Tensor
    left: Tensor


class Search:
    """Decides cases of a net (in float64, (B, *shape) to (B, outputs)).

    Args:
        cases: boxes with alternatives over the outputs.
        confirm: whether a flattened input (d,) is a counterexample for whoever judges it.

    Raises:
        SpecError: the net cannot be bounded.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: tuple[int, ...],
        outputs: int,
        cases: Sequence[Case],
        confirm: Callable[[np.ndarray], bool],
    ) -> None:
        self._net, self._shape, self._confirm = net, shape, confirm
        rows: dict[_Form, int] = {}
        wanted: dict[tuple[int, ...], int] = {}
        memberships = [
            [wanted.setdefault(_numbers(alternative, rows), len(wanted)) for alternative in case.alternatives]
            for case in cases
        ]
        rows = rows or {((), 0.0): 0}  # nothing is asked of outputs
        forms = _layer(rows, outputs)
        self._factors = forms.weight.detach().abs().amax(1).clamp(min=1)
        self._uses = torch.zeros(len(wanted), len(rows), dtype=torch.bool)
        for numbers, place in wanted.items():
            self._uses[place, list(numbers)] = True
        self._margins = nn.Sequential(net, forms).eval()
        self._margins.requires_grad_(False)
        self._bounded: BoundedModule = bounded_module(self._margins, shape)
        needed = max(1, crown_bytes(self._bounded, 8))
        self._batch = max(1, min(_BATCH, _MEMORY // needed))
        self._boxes = []
        for case, members in zip(cases, memberships, strict=True):
            left = torch.zeros(len(wanted), dtype=torch.bool)
            left[members] = True
            self._boxes.append(_Box(torch.from_numpy(case.lower), torch.from_numpy(case.upper), left))
        self._random = torch.Generator().manual_seed(0)

    def decide(self, deadline: float = math.inf) -> Searched:
        """Search until ``deadline`` (of ``time.monotonic()``)."""
        tie, count, smallest, tied = itertools.count(), 0, math.inf, False
        pending = [(-math.inf, next(tie), box) for box in self._boxes]
        for box in self._boxes:
            point = self._attack(box) if time.monotonic() < deadline else None
            if point is not None:
                return self._violated(point, count)
        while pending:
            if time.monotonic() > deadline or count >= _BOXES:
                return Searched("timeout" if count < _BOXES else "unknown", smallest, None, count)
            some = [heapq.heappop(pending)[2] for _ in range(min(self._batch, len(pending)))]
            count += len(some)
            lower, upper, left = (torch.stack([getattr(box, name) for box in some]) for name in _Box.__annotations__)
            points, slopes, reached = self._descend(lower, upper, left, (lower + upper) / 2, _STEPS)
            point = self._confirmed(points[reached <= 0])
            if point is not None:
                return self._violated(point, count)
            bounds, needed = self._bound(lower, upper)
            failing = self._missed(bounds - needed)
            worst = failing.masked_fill(~left, math.inf).amin(1)
            left &= ~(failing > 0)  # NaN is no proof
            with torch.no_grad():
                almost = ((self._missed(self._margins(self._shaped(points)) - needed) <= 0) & left).any(1)
            for index in range(len(some)):
                if not left[index].any():
                    smallest = min(smallest, float(worst[index]))
                elif almost[index]:  # no bound can settle what a point comes that close to
                    point = None if tied else self._attack(_Box(lower[index], upper[index], left[index]))
                    tied = True
                    if point is not None:
                        return self._violated(point, count)
                else:
                    for half in _halves(lower[index], upper[index], slopes[index]):
                        heapq.heappush(pending, (float(worst[index]), next(tie), _Box(*half, left[index])))
        return Searched("unknown" if tied else "robust", smallest, None, count)

    def _bound(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """(lower bounds of how far each inequality fails, what they must exceed), (B, S) each, of boxes (B, d)."""
        ends = self._shaped(lower), self._shaped(upper)
        middle = ((ends[0] + ends[1]) / 2).clamp(*ends)
        boxes = PerturbationBox(*ends)
        rows = torch.eye(self._uses.shape[1], dtype=torch.float64).expand(len(lower), -1, -1)
        with torch.no_grad(), default_dtype(torch.float64):
            bounds, _ = self._bounded.compute_bounds(
                x=(BoundedTensor(middle, boxes),), C=rows, method="CROWN", bound_upper=False
            )
            first = torch.zeros(len(middle), dtype=torch.long)
            rounding = required_margins(self._bounded, middle, first, boxes, relu_boxes(self._bounded))
            largest = self._net(middle).abs().amax(1).clamp(min=1)
        return bounds, torch.maximum(rounding[:, None], RUNTIME_SHARE * largest[:, None] * self._factors)

    def _shaped(self, points: Tensor) -> Tensor:
        return points.view(-1, *self._shape)

    def _missed(self, margins: Tensor) -> Tensor:
        """By how much each alternative is missed, (B, A), of what its inequalities are missed by (B, S)."""
        return margins.unsqueeze(1).masked_fill(~self._uses, -math.inf).amax(2)

    def _reached(self, points: Tensor, left: Tensor) -> Tensor:
        """By how much the closest alternative is missed at ``points`` (B, d); at most 0: it holds. (B,)"""
        return self._missed(self._margins(self._shaped(points))).masked_fill(~left, math.inf).amin(1)

    def _violated(self, point: np.ndarray, count: int) -> Searched:
        with torch.no_grad():
            missed = self._missed(self._margins(self._shaped(torch.from_numpy(point))))
        return Searched("violated", float(missed.min()), point, count)

    def _descend(
        self, lower: Tensor, upper: Tensor, left: Tensor, points: Tensor, steps: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(best points on the way down, mean absolute gradients, (B, d) each; what the points reach (B,))."""
        best, slopes = points, torch.zeros_like(points)
        smallest = torch.full((len(points),), math.inf, dtype=torch.float64)
        for step in range(steps):
            points = points.detach().requires_grad_()
            reached = self._reached(points, left)
            (gradient,) = torch.autograd.grad(reached.clamp(max=1e300).sum(), points)
            better = reached.detach() < smallest
            best = torch.where(better[:, None], points.detach(), best)
            smallest = torch.where(better, reached.detach(), smallest)
            slopes += gradient.abs() / steps
            length = (upper - lower) / 2 * (1 - step / steps)
            points = torch.minimum(torch.maximum(points.detach() - length * gradient.sign(), lower), upper)
        return best, slopes, smallest

    def _attack(self, box: _Box) -> np.ndarray | None:
        """A counterexample in one box, sought from random points."""
        lower, upper = box.lower.expand(_STARTS, -1), box.upper.expand(_STARTS, -1)
        starts = lower + (upper - lower) * torch.rand(lower.shape, dtype=torch.float64, generator=self._random)
        points, _, reached = self._descend(lower, upper, box.left.expand(_STARTS, -1), starts, _LONG)
        order = reached.argsort()
        return self._confirmed(points[order][reached[order] <= 0])

    def _confirmed(self, points: Tensor) -> np.ndarray | None:
        """The first of a few points (., d) that is a counterexample as a float32 runtime sees it."""
        for point in points[:4].float().double().numpy():
            if self._confirm(point):
                return np.asarray(point)
        return None


def _numbers(alternative: Sequence[Linear], rows: dict[_Form, int]) -> tuple[int, ...]:
    """Which of ``rows`` an alternative asks for; new ones are added."""
    forms = [(tuple(sorted(linear.coefficients.items())), linear.bound) for linear in alternative]
    return tuple(sorted({rows.setdefault(form, len(rows)) for form in forms}))


def _layer(rows: dict[_Form, int], outputs: int) -> nn.Linear:
    """By how much each inequality is missed, of outputs (B, outputs)."""
    layer = nn.utils.skip_init(nn.Linear, outputs, len(rows), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()
        for (coefficients, bound), row in rows.items():
            layer.bias[row] = -bound
            for number, factor in coefficients:
                layer.weight[row, number] = factor
    return layer


def _halves(lower: Tensor, upper: Tensor, slopes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A box cut in two where that may change outputs most."""
    side = int(((upper - lower) * (slopes + _EVEN * slopes.mean() + 1e-12)).argmax())
    middle = (lower[side] + upper[side]) / 2
    below, above = upper.clone(), lower.clone()
    below[side] = above[side] = middle
    return [(lower, below), (above, upper)]
