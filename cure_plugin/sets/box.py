"""Boxes given by their ends: VNNLIB's inputs, ACAS Xu's, small regions around attacks, domains of lp balls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cure_plugin.checks import check_number
from cure_plugin.errors import SpecError
from cure_plugin.inputs import all_finite
from cure_plugin.sets.base import DOMAIN_TOLERANCE, PerturbationSet
from cure_plugin.sets.linear_minimum import box_minimum, in_chunks
from cure_plugin.sets.rows import Rows

if TYPE_CHECKING:
    from typing_extensions import Self


class PerturbationBox(PerturbationSet):
    """All x' with lower <= x' <= upper, whichever point of the box ``x`` is.

    Ends that ``x``'s dtype cannot hold are rounded outwards.

    Args:
        lower, upper: numbers, or tensors that broadcast to inputs (B, *input).

    Raises:
        SpecError: no numbers or tensors, NaN or infinite ends, an end below the other.

    >>> PerturbationBox(0.2, 0.7)
    PerturbationBox(0.2, 0.7)
    """

    name = "box"

    def __init__(self, lower: float | Tensor, upper: float | Tensor) -> None:
        super().__init__()
        self.lower, self.upper = _end("lower", lower), _end("upper", upper)
        try:
            crossed = bool((self.lower > self.upper).any())
        except RuntimeError as error:
            shapes = f"{tuple(self.lower.shape)} and {tuple(self.upper.shape)}"
            raise SpecError(f"lower and upper must broadcast to each other, got shapes {shapes}") from error
        if crossed:
            raise SpecError(f"lower must lie nowhere above upper, got {_shown(self.lower)} and {_shown(self.upper)}")
        self._share = 1.0

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The box like ``x``, scaled about ``x``."""
        lower, upper = (_outward(end, x, sign) for end, sign in ((self.lower, -1.0), (self.upper, 1.0)))
        if self._share != 1:
            lower, upper = x + self._share * (lower - x), x + self._share * (upper - x)
        return torch.minimum(lower, x), torch.maximum(upper, x)

    def check(self, x: Tensor) -> None:
        super().check(x)
        try:
            outside = torch.maximum(self.lower.to(x) - x, x - self.upper.to(x))
        except RuntimeError as error:
            ends = f"{tuple(self.lower.shape)} and {tuple(self.upper.shape)}"
            raise SpecError(f"a box with ends of shapes {ends} does not fit inputs {tuple(x.shape)}") from error
        if outside.shape != x.shape:
            raise SpecError(f"a box with ends of shape {tuple(outside.shape)} does not fit inputs {tuple(x.shape)}")
        if not bool(outside.amax() <= DOMAIN_TOLERANCE):
            reach = outside.amax().item()
            raise SpecError(f"x lies outside the box by up to {reach:.4g}; give a point of it, as its middle")

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.check(x)
        return self._ends(x)

    def _room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._ends(x)
        return lower - x, upper - x

    def deviation(self, x: Tensor, rows: Rows) -> Tensor:
        down, up = self._room(x)
        return in_chunks(box_minimum, rows.coefficients, rows.pick(down), rows.pick(up))

    def refines_first_layer(self) -> bool:
        return False

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        return point.clamp(*self._ends(x))

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        lower, upper = self._ends(x)
        share = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return (lower + share * (upper - lower)).clamp(lower, upper)

    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        """``step`` is relative to half the box's widths."""
        lower, upper = self._ends(x)
        return (variable + step * (upper - lower) / 2 * gradient.sign()).clamp(lower, upper)

    def scaled(self, factor: float) -> PerturbationBox:
        """The box shrunk or grown about ``x``."""
        check_number("factor of a box", factor)
        other = PerturbationBox(self.lower, self.upper)
        other._share = self._share * factor
        return other

    def small_region(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationBox]:
        """A box with sides ``ratio`` times as long around the attack, kept inside."""
        if not 0 <= ratio <= 1:
            raise SpecError(f"ratio (lambda) must lie in [0, 1], got {ratio!r}")
        lower, upper = self._ends(x)
        return box_within(lower, upper, variable, ratio * (upper - lower) / 2)

    def needs_attack(self, ratio: float) -> bool:
        return ratio < 1

    def covers_part(self, other: Self) -> bool:
        if self._share != other._share or max(self.lower.ndim, self.upper.ndim, other.lower.ndim, other.upper.ndim):
            return False
        return bool(self.lower <= other.lower) and bool(other.upper <= self.upper)

    def select(self, x: Tensor, index: Tensor) -> PerturbationBox:
        other = PerturbationBox(
            *(end[index] if end.ndim == x.ndim and len(end) > 1 else end for end in (self.lower, self.upper))
        )
        other._share = self._share
        return other

    def __repr__(self) -> str:
        scale = "" if self._share == 1 else f", scaled by {self._share}"
        return f"PerturbationBox({_shown(self.lower)}, {_shown(self.upper)}{scale})"


def box_within(lower: Tensor, upper: Tensor, point: Tensor, reach: Tensor) -> tuple[Tensor, PerturbationBox]:
    """(centre, box) that reaches ``reach`` to all sides of a point as near to ``point`` as the ends allow."""
    room = torch.minimum(reach, (upper - lower) / 2)
    centre = torch.minimum(torch.maximum(point, lower + room), upper - room)
    return centre, PerturbationBox(torch.maximum(centre - reach, lower), torch.minimum(centre + reach, upper))


def _end(name: str, value: float | Tensor) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise SpecError(f"{name} must be a number or a tensor, got {value!r}")
    end = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    if not end.is_floating_point() or not all_finite(end):
        raise SpecError(f"{name} must hold finite floating-point numbers, got {_shown(end)}")
    return end


def _outward(end: Tensor, x: Tensor, sign: float) -> Tensor:
    """``end`` in the dtype of ``x``, at least as far down (``sign`` -1) or up (+1) as it was."""
    near = end.to(x)
    if torch.promote_types(end.dtype, x.dtype) != x.dtype:
        inside = sign * (near.to(end) - end) < 0
        near = torch.where(inside.to(near.device), torch.nextafter(near, near.new_full((), sign * torch.inf)), near)
    return near


def _shown(end: Tensor) -> str:
    return f"{end.item():g}" if end.ndim == 0 else f"tensor{tuple(end.shape)}"
