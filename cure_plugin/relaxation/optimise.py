"""Better duals by Adam: any are valid, so the best bound met is one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cure_plugin.relaxation.dual import Domain, Dual, Duals, Found
from cure_plugin.relaxation.reduced import Rows

_FIRST, _SECOND, _TINY = 0.9, 0.999, 1e-10

_LEAST_SQUARE = 1e-30
"""Where Adam's means of squares start: of 0 the square root takes ten times as long."""


@dataclass(frozen=True)
class Ascent:
    """How to climb.

    Attributes:
        steps: evaluations. rate: Adam's, of slopes, times ``decay`` each step. splits: its rate for the multipliers of
            splits, relative to the neurons' usual coefficients. mean: whether the mean of the points met is kept.
        until: when to stop, by ``time.monotonic``; each row is bounded once at least.
    """

    steps: int
    rate: float = 0.1
    splits: float = 0.05
    decay: float = 0.97
    mean: bool = False
    until: float = math.inf


@dataclass
class Best:
    """The best bounds met, (R,), their duals, and the last evaluation of the rows ``left``, which are not done.

    ``mean``, where asked for: of the points of the input met on the way, later ones weighing more (L, n): where the
    bound is tight, they go from corner to corner around the true minimiser.
    """

    value: Tensor
    duals: Duals
    left: Tensor
    last: Found | None
    mean: Tensor | None


def climb(
    dual: Dual,
    rows: Rows,
    duals: Duals,
    ascent: Ascent,
    domain: Domain | None = None,
    scale: Tensor | None = None,
    done: Callable[[Tensor], Tensor] | None = None,
) -> Best:
    """Climb from ``duals``.

    Args:
        domain: of splits, whose multipliers are free then. scale: usual coefficients of the neurons, (1, N).
        done: given the best bounds of all rows (R,), which of them need no more, (R,) bool.
    """
    count = len(rows)
    best = rows.bias.new_full((count,), -torch.inf)
    kept = duals.select(torch.arange(count))
    left = torch.arange(count)
    state = replace(duals)
    momenta = [torch.zeros_like(duals.slopes), torch.full_like(duals.slopes, _LEAST_SQUARE)]
    split_momenta = [one.clone() for one in momenta] if domain is not None else []
    last: Found | None = None
    mean: Tensor | None = None
    for step in range(1, ascent.steps + 1):
        last = dual.evaluate(rows, state, domain)
        if ascent.mean:
            mean = last.point if mean is None else torch.lerp(mean, last.point, 2 / (step + 1))
        better = (last.value > best[left]).nonzero().flatten()
        best[left[better]] = last.value[better]
        kept.put(left[better], state.select(better))
        if step == ascent.steps or time.monotonic() > ascent.until:
            break
        if done is not None:
            open_ = (~done(best)[left]).nonzero().flatten()
            if len(open_) == 0:
                return Best(best, kept, left[:0], None, None)
        else:
            open_ = left
        rate = ascent.decay**step
        slopes = _stepped(state.slopes, last.slopes, momenta, step, ascent.rate * rate).clamp_(0, 1)
        splits = state.splits
        if domain is not None:
            free = last.splits * domain.signs.abs()
            length = ascent.splits * rate * (1.0 if scale is None else scale)
            splits = _stepped(splits, free, split_momenta, step, length)
        state = Duals(slopes, splits, last.multipliers, last.budget)
        if len(open_) <= 0.8 * len(left):  # copying costs less than going on with what is done
            left, rows, state = left[open_], rows.select(open_), state.select(open_)
            domain = None if domain is None else Domain(domain.signs[open_])
            mean = None if mean is None else mean[open_]
            momenta = [one[open_] for one in momenta]
            split_momenta = [one[open_] for one in split_momenta]
    return Best(best, kept, left, last, mean)


def _stepped(value: Tensor, gradient: Tensor, momenta: list[Tensor], step: int, rate: float | Tensor) -> Tensor:
    """One step of Adam upwards (Kingma and Ba 2015)."""
    first, second = momenta
    first.mul_(_FIRST).add_(gradient, alpha=1 - _FIRST)
    second.mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
    size = (second / (1 - _SECOND**step)).sqrt_().add_(_TINY)
    direction = first / (1 - _FIRST**step) / size
    return value + direction * rate
