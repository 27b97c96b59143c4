"""Linear functions over the set around one image: their minimum, and where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cure_plugin.errors import SpecError
from cure_plugin.sets import PerturbationBox, PerturbationLpBall, Region
from cure_plugin.sets.linear_minimum import l1_box_maximizer

_LEAST = 1e-12
"""Multipliers stay above this."""


@dataclass(frozen=True)
class InputSet:
    """All x + d with low <= d <= high and ||d||_p <= eps.

    Attributes:
        x: the image, flat (n,). low, high: (n,). p: 1, 2 or inf. eps: the radius; of no use where p is inf.
        joint: whether the first ReLU layer is to be bounded together with it.
    """

    x: Tensor
    low: Tensor
    high: Tensor
    p: float
    eps: float
    joint: bool = False

    @property
    def largest(self) -> Tensor:
        """The largest absolute values in the set, (n,)."""
        return torch.maximum((self.x + self.low).abs(), (self.x + self.high).abs())

    def to(self, dtype: torch.dtype) -> InputSet:
        return InputSet(self.x.to(dtype), self.low.to(dtype), self.high.to(dtype), self.p, self.eps, self.joint)

    def first_multiplier(self, rows: Tensor) -> Tensor:
        """A multiplier of the budget to start from for rows (R, n), (R,)."""
        multiplier = rows.norm(dim=1).clamp(min=_LEAST) / max(self.eps, _LEAST)
        for _ in range(8 if self.p == 2 else 0):
            multiplier = self._moved(multiplier, self._at(rows, multiplier))
        return multiplier

    def minimum(self, rows: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(lower bounds of ``rows . d`` (R,), minimisers d (R, n), better multipliers) of rows (R, n).

        Any multiplier >= 0 gives a bound (Lagrangian duality); only l2 balls have use for one.
        """
        if self.p == math.inf:
            positive = torch.gt(rows, 0, out=torch.empty_like(rows))
            point = torch.lerp(self.high.expand_as(rows), self.low.expand_as(rows), positive)
            return (rows * point).sum(1), point, multiplier
        if self.p == 1:
            budget = rows.new_full((len(rows), 1), self.eps)
            point = l1_box_maximizer(-rows, self.low.expand_as(rows), self.high.expand_as(rows), budget)
            return self._over_budget(rows, point), point, multiplier
        multiplier = self._moved(multiplier, self._at(rows, multiplier))
        point = self._at(rows, multiplier)
        value = (rows * point).sum(1) + multiplier / 2 * (point.square().sum(1) - self.eps**2)
        return value, point, self._moved(multiplier, point)

    def _over_budget(self, rows: Tensor, point: Tensor) -> Tensor:
        """The dual's value at the price that the l1 budget has where it ends: a bound even if ``point`` is off."""
        moved = (rows.abs() * (point != 0)).masked_fill(point == 0, torch.inf).amin(1, keepdim=True)
        spent = point.abs().sum(1, keepdim=True) >= self.eps * (1 - 1e-6)
        price = torch.where(spent & moved.isfinite(), moved, 0.0)
        least = torch.minimum((rows + price) * self.high, (rows - price) * self.low).clamp(max=0)
        return least.sum(1) - price.squeeze(1) * self.eps

    def _at(self, rows: Tensor, multiplier: Tensor) -> Tensor:
        """Where ``rows . d + multiplier / 2 ||d||^2`` is smallest between the ends."""
        return torch.maximum(torch.minimum(rows / -multiplier.unsqueeze(1), self.high), self.low)

    def _moved(self, multiplier: Tensor, point: Tensor) -> Tensor:
        """Nearer to the best, where the minimiser lies on the surface: alone, its norm falls like 1 / multiplier."""
        share = point.norm(dim=1) / max(self.eps, _LEAST)
        return (multiplier * share.clamp(0.2, 5)).clamp(min=_LEAST)


def input_set(region: Region) -> InputSet:
    """The set around one image, in float64.

    Raises:
        SpecError: more than one image, or a set that is neither an lp ball nor a box.
    """
    perturbation, x = region.perturbation, region.x.double()
    if type(perturbation) not in (PerturbationBox, PerturbationLpBall) or len(x) != 1:
        raise SpecError(f"takes lp balls and boxes around one image, got {perturbation!r} around {len(x)}")
    lower, upper = perturbation.box(x)
    p = getattr(perturbation, "p", math.inf)
    eps = float(torch.as_tensor(getattr(perturbation, "eps", 0.0), dtype=torch.float64).flatten()[0])
    flat = x.flatten()
    return InputSet(flat, lower.flatten() - flat, upper.flatten() - flat, p, eps)
