"""Lp balls cut with a box domain, for p in {1, 2, inf}."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cure_plugin.checks import is_number
from cure_plugin.errors import SpecError
from cure_plugin.sets.base import Domain, PerturbationSet, per_image, shown_domain
from cure_plugin.sets.box import PerturbationBox, box_within
from cure_plugin.sets.linear_minimum import box_minimum, in_chunks, l1_box_maximizer, l1_box_minimum, l2_box_minimum
from cure_plugin.sets.rows import Rows

if TYPE_CHECKING:
    from typing_extensions import Self

_L2_LONGEST_LEAP = 8.0
"""So far out that the domain bends the step: the projected direction then spends the radius where pixels can move."""

_L1_STEP_SHARE = 0.05
"""Share of coordinates that one l1 attack step moves (sparse steps: Tramer and Boneh 2019)."""


class PerturbationLpBall(PerturbationSet):
    """All x' in the domain with ||x' - x||_p <= eps.

    To auto_LiRPA it poses as a box (``norm`` is inf whatever the ball); the ball's own p is ``p``.

    Args:
        norm: 1, 2 or inf.
        eps: radius >= 0, a number or a tensor (B,) with one radius per sample.
        domain: (lowest, highest) value of the input, numbers or tensors that broadcast to it; a box; or None for no
            cut.

    Raises:
        SpecError: another norm, a negative or non-finite eps, an empty domain.

    >>> PerturbationLpBall(2, 0.5)
    PerturbationLpBall(norm=2, eps=0.5, domain=(0.0, 1.0))
    """

    def __init__(self, norm: float, eps: float | Tensor, domain: Domain | PerturbationBox | None = (0.0, 1.0)) -> None:
        super().__init__()
        if not is_number(norm) or norm not in (1, 2, math.inf):
            raise SpecError(f"norm must be 1, 2 or inf, got {norm!r}")
        self.p = float(norm)
        self.name = "linf" if self.p == math.inf else f"l{int(self.p)}"
        if isinstance(domain, PerturbationBox):
            domain = domain.lower, domain.upper
        if domain is not None and not _is_interval(domain):
            raise SpecError(f"domain must be (lowest, highest) with lowest <= highest, got {shown_domain(domain)}")
        self.domain = domain
        self.eps = eps
        if self.p == 2:
            self.longest_leap = _L2_LONGEST_LEAP

    @property
    def eps(self) -> float | Tensor:
        """The radius, checked whenever it is set, as by auto_LiRPA's eps schedulers."""
        return self._eps

    @eps.setter
    def eps(self, eps: float | Tensor) -> None:
        if not isinstance(eps, Real | Tensor):
            raise SpecError(f"eps must be a number or a tensor (B,), got {eps!r}")
        radius = torch.as_tensor(eps, dtype=torch.get_default_dtype() if not isinstance(eps, Tensor) else None)
        if radius.ndim > 1:
            raise SpecError(f"eps must be a number or one number per sample (B,), got shape {tuple(radius.shape)}")
        if not bool((torch.isfinite(radius) & (radius >= 0)).all()):
            raise SpecError(f"eps must be finite and >= 0, got {eps!r}")
        self._eps = eps if isinstance(eps, Tensor) else float(eps)

    def set_eps(self, eps: float | Tensor) -> None:
        """auto_LiRPA's hook of eps schedulers.

        Raises:
            SpecError: negative or non-finite, or a tensor that is not (B,).
        """
        self.eps = eps

    # -- geometry ------------------------------------------------------------------------------

    def check(self, x: Tensor) -> None:
        super().check(x)
        self._radius(x)

    def _radius(self, x: Tensor) -> Tensor:
        """eps as a tensor (B,) like ``x``."""
        radius = torch.as_tensor(self.eps, dtype=x.dtype, device=x.device)
        if radius.ndim == 1 and radius.shape[0] != x.shape[0]:
            raise SpecError(f"eps has {radius.shape[0]} radii but x has {x.shape[0]} samples; give one per sample")
        return radius.expand(x.shape[0])

    def _room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How far each coordinate may move down (<= 0) and up (>= 0) inside the box hull."""
        radius = per_image(self._radius(x), x)
        if self.domain is None:
            return -radius.expand_as(x), radius.expand_as(x)
        lowest, highest = self.domain
        down = torch.maximum(-radius, lowest - x).clamp(max=0)
        up = torch.minimum(radius, highest - x).clamp(min=0)
        return down, up

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.check(x)
        down, up = self._room(x)
        return x + down, x + up

    def deviation(self, x: Tensor, rows: Rows) -> Tensor:
        a = rows.coefficients
        if self.p == math.inf:
            return in_chunks(box_minimum, a, *self._room_of(rows, x))
        eps = rows.per_sample(self._radius(x))
        if self.domain is None:
            touched = rows.pick(torch.ones_like(x[:1]))  # 0 where a row reaches into the padding
            dual = math.inf if self.p == 1 else 2.0
            return -eps.squeeze(-1) * (a * touched).norm(p=dual, dim=-1)
        minimum = l1_box_minimum if self.p == 1 else l2_box_minimum
        return in_chunks(minimum, a, *self._room_of(rows, x), eps)

    def _room_of(self, rows: Rows, x: Tensor) -> tuple[Tensor, Tensor]:
        """The room of every coordinate that a row touches; none in the padding."""
        down, up = self._room(x)
        return rows.pick(down), rows.pick(up)

    def radii(self, x: Tensor) -> tuple[Tensor, Tensor]:
        l1, l2 = super().radii(x)
        if self.p == 1:
            l1 = torch.minimum(l1, self._radius(x))
        return (l1, l2) if self.p == math.inf else (l1, torch.minimum(l2, self._radius(x)))

    def covers_part(self, other: Self) -> bool:
        """Of equal radius, the l1 ball lies in the l2 ball, and that in the linf ball."""
        if other.p > self.p:
            return False
        ends = [*(self.domain or ()), *(other.domain or ()), self.eps, other.eps]
        if any(isinstance(end, Tensor) for end in ends):
            return False
        return (self.domain is None or self.domain == other.domain) and bool(other.eps <= self.eps)

    @property
    def shared_budget(self) -> bool:  # type: ignore[override]
        return self.p != math.inf

    def refines_first_layer(self) -> bool:
        return self.p != math.inf

    def within_hull(self) -> bool:
        return self.refines_first_layer()  # minima over the ball cut by the hull are exact, so are dual norms

    # -- points --------------------------------------------------------------------------------

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        """Clip to the box hull, then shrink (l2) or soft-threshold (l1) the offset into the ball."""
        down, up = self._room(x)
        offset = torch.minimum(torch.maximum(point - x, down), up)
        if self.p == 2:
            radius = per_image(self._radius(x), x)
            length = per_image(offset.flatten(1).norm(dim=1), x)
            offset = offset * (radius / length.clamp(min=1e-12)).clamp(max=1)
        elif self.p == 1:
            offset = offset.sign() * (offset.abs() - per_image(self._l1_threshold(x, offset), x)).clamp(min=0)
        return self._into_domain(x + offset)

    def contains(self, x: Tensor, point: Tensor, tolerance: float = 1e-6) -> Tensor:
        """Whether the offset's norm is at most eps + ``tolerance`` and the point in the domain; (B,) bool."""
        inside = (point - x).flatten(1).norm(p=self.p, dim=1) <= self._radius(x) + tolerance
        if self.domain is None:
            return inside
        outside = (point < self.domain[0] - tolerance) | (point > self.domain[1] + tolerance)
        return inside & ~outside.flatten(1).any(1)

    def _into_domain(self, point: Tensor) -> Tensor:
        """Take away the last bit of rounding that may stick out of the domain."""
        if self.domain is None:
            return point
        lowest, highest = (torch.as_tensor(end, dtype=point.dtype, device=point.device) for end in self.domain)
        return point.clamp(lowest, highest)

    def _l1_threshold(self, x: Tensor, offset: Tensor) -> Tensor:
        """The shrinkage (B,) that brings each offset's l1 norm to at most eps (Duchi et al. 2008)."""
        radius = self._radius(x).unsqueeze(1)
        size = offset.abs().flatten(1)
        total = size.sum(1)
        if total.device.type == "cpu" and bool((total <= radius.squeeze(1)).all()):  # elsewhere it would wait
            return torch.zeros_like(total)
        sorted_size = size.sort(dim=1, descending=True).values
        count = torch.arange(1, size.shape[1] + 1, dtype=x.dtype, device=x.device)
        candidate = (sorted_size.cumsum(1) - radius) / count
        last = (sorted_size > candidate).sum(1, keepdim=True).clamp(min=1) - 1
        threshold = candidate.gather(1, last).squeeze(1).clamp(min=0)
        return torch.where(total > radius.squeeze(1), threshold, 0)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        radius = per_image(self._radius(x), x)
        if self.p == math.inf:
            down, up = self._room(x)
            share = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            return self._into_domain(x + down + share * (up - down))
        if self.p == 2:
            direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        else:
            exponential = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            sign = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) - 0.5
            direction = sign.sign() * -(exponential.clamp(min=1e-12).log())
        length = per_image(direction.flatten(1).norm(p=self.p, dim=1), x)
        share = torch.rand(x.shape[0], generator=generator, dtype=x.dtype, device=x.device)
        offset = direction / length * radius * per_image(share, x) ** (1 / x[0].numel())
        return self.project(x, x + offset)

    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        length = step * per_image(self._radius(x), x)
        if self.p == math.inf:
            direction = gradient.sign()
        elif self.p == 2:
            direction = gradient / per_image(gradient.flatten(1).norm(dim=1), x).clamp(min=1e-12)
        else:
            direction = self._l1_direction(variable, gradient)
        return self.project(x, variable + length * direction)

    def leap(self, x: Tensor, variable: Tensor, gradient: Tensor, share: float) -> Tensor:
        """l1: towards the point of the cut ball that lies furthest along ``gradient``, which few pixels make.

        A step of the conditional gradient (Frank and Wolfe 1956) over the whole set: the budget goes to the largest
        gradients, each pixel as far as the domain lets it. Steps of fixed sparsity do not see that room.
        """
        if self.p != 1:
            return super().leap(x, variable, gradient, share)
        budget = self._radius(x).unsqueeze(1) * (1 - 8 * torch.finfo(x.dtype).eps)  # what rounding may add
        down, up = self._room(x)
        furthest = l1_box_maximizer(gradient.flatten(1), down.flatten(1), up.flatten(1), budget)
        return self.project(x, variable + min(1.0, 2 * share) * (x + furthest.view_as(x) - variable))

    def _l1_direction(self, point: Tensor, gradient: Tensor) -> Tensor:
        """Unit l1 step over the largest gradients among the coordinates that can still move."""
        if self.domain is not None:
            stuck = ((point <= self.domain[0]) & (gradient < 0)) | ((point >= self.domain[1]) & (gradient > 0))
            gradient = gradient.masked_fill(stuck, 0)
        size = gradient.abs().flatten(1)
        count = max(1, int(_L1_STEP_SHARE * size.shape[1]))
        smallest = size.topk(count, dim=1).values[:, -1]
        chosen = (gradient.abs() >= per_image(smallest, gradient).clamp(min=1e-30)).to(gradient.dtype)
        total = per_image(chosen.flatten(1).sum(1), gradient).clamp(min=1)
        return gradient.sign() * chosen / total

    def scaled(self, factor: float) -> PerturbationLpBall:
        return PerturbationLpBall(self.p, self.eps * factor, self.domain)

    def select(self, x: Tensor, index: Tensor) -> PerturbationLpBall:
        ends = self.domain
        if ends is not None:
            low, high = (e[index] if isinstance(e, Tensor) and e.ndim == x.ndim and len(e) > 1 else e for e in ends)
            ends = low, high
        eps = self.eps[index] if isinstance(self.eps, Tensor) and self.eps.ndim == 1 else self.eps
        return PerturbationLpBall(self.p, eps, ends)

    def needs_attack(self, ratio: float) -> bool:
        return ratio < 1  # at 1 the region is the whole ball, wherever the attack ended

    def small_region(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationSet]:
        """linf: a box kept inside the hull (SABR). l1, l2: a ball of radius ratio * eps kept inside the ball.

        The l1 and l2 region is not cut with the domain: its first layer then costs one dual norm for
        the whole batch. It only ever grows by that, so the loss stays an upper bound.
        """
        if not 0 <= ratio <= 1:
            raise SpecError(f"ratio (lambda) must lie in [0, 1], got {ratio!r}")
        radius = self._radius(x) * ratio
        if self.p == math.inf:
            return box_within(*self.box(x), variable, per_image(radius, x))
        offset = variable - x
        length = per_image(offset.flatten(1).norm(p=self.p, dim=1), x)
        allowed = per_image(self._radius(x) - radius, x)
        centre = x + offset * (allowed / length.clamp(min=1e-12)).clamp(max=1)
        return centre, PerturbationLpBall(self.p, radius, None)

    def small_box(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationSet]:
        """A linf box of radius ratio * eps around ``variable``, moved towards ``x`` so that it stays inside the ball.

        Raises:
            SpecError: a negative ratio, or one for which the box does not fit: ratio * d^(1/p) > 1.
        """
        if self.p == math.inf:
            return self.small_region(x, variable, ratio)
        reach = ratio * x[0].numel() ** (1 / self.p)
        if not 0 <= reach <= 1:
            raise SpecError(
                f"a box of {ratio!r} times the radius of {self!r} does not fit into it; take a ratio (lambda) between "
                f"0 and {x[0].numel() ** (-1 / self.p):.3g}, or the ball (sabr)"
            )
        offset = variable - x
        length = per_image(offset.flatten(1).norm(p=self.p, dim=1), x)
        allowed = per_image(self._radius(x) * (1 - reach), x)
        centre = x + offset * (allowed / length.clamp(min=1e-12)).clamp(max=1)
        return centre, PerturbationLpBall(math.inf, self._radius(x) * ratio, self.domain)

    def __repr__(self) -> str:
        p = "inf" if self.p == math.inf else int(self.p)
        return f"PerturbationLpBall(norm={p}, eps={self.eps}, domain={shown_domain(self.domain)})"


def _is_interval(domain: Domain) -> bool:
    """Whether ``domain`` is a pair of numbers or tensors, the first nowhere above the second."""
    if not isinstance(domain, tuple | list) or len(domain) != 2:
        return False
    if not all(isinstance(end, int | float | Tensor) for end in domain):
        return False
    return bool(torch.as_tensor(domain[0] <= domain[1]).all())
