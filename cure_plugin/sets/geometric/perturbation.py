"""The set itself: rotations, translations, scalings, shears, contrast, brightness and their compositions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cure_plugin.checks import as_numbers, check_type
from cure_plugin.errors import SpecError
from cure_plugin.sets.base import PerturbationSet, open_interval
from cure_plugin.sets.geometric.hull import interval_hull
from cure_plugin.sets.geometric.parameters import parameter_names, parse_transformation
from cure_plugin.sets.geometric.planes import linear_planes
from cure_plugin.sets.geometric.transforms import transformed
from cure_plugin.sets.rows import Rows, dot

if TYPE_CHECKING:
    from typing_extensions import Self

_HULL_PIECES = {0: 1, 1: 4, 2: 2}
_PLANE_PIECES = {0: 1, 1: 20, 2: 6}
"""Sub-intervals per spatial parameter, by the number of spatial parameters (more than two: 2 and 4)."""

_MOTION: dict[str, Callable[[float], float]] = {
    "R": lambda radius: math.radians(1) * radius,
    "Tx": lambda radius: 1.0,
    "Ty": lambda radius: 1.0,
    "Sc": lambda radius: radius / 100,
    "Sh": lambda radius: radius / 100,
    "C": lambda radius: 0.0,
    "B": lambda radius: 0.0,
}
"""How far, in pixels, a unit of each parameter moves the pixels at the image's edge."""

_PARTITION_MOTION = 1.2
"""Pixels that the cells of :meth:`PerturbationGeometric.partition` may move a pixel at the edge, in all."""

_PARTITION_CELLS = 4096
"""Cells that it makes at most; larger ones then."""

_WIDE = 3
"""Cells along one parameter up to which CROWN proves some images at once; of those beyond it proved none."""

_NEWTON_STARTS, _NEWTON_STEPS = 8, 15

_SEARCH_POINTS = 257
"""Parameter vectors that :meth:`PerturbationGeometric.project` starts its search from."""

_TOGETHER = 2**15
"""Values that images transformed at a time have in that search, unless the batch has more; what a cache holds."""


class PerturbationGeometric(PerturbationSet):
    """All transformed images whose parameters lie in a box (conventions: :mod:`cure_plugin.sets.geometric`).

    Two relaxations are intersected: the exact interpolation hull as a box of pixels, and linear planes in
    the parameters. ``concretize`` minimises the planes over the parameter box, so that CROWN sees one to
    four dimensions instead of every pixel.

    Args:
        names: elementary transformations in the order they are applied, e.g. ("R", "Sh").
        lower, upper: ends of each parameter's range in its unit (degrees, pixels, percent, added value):
            one number per parameter, or tensors (B, D) with a box per sample.
        domain: (lowest, highest) value of a clean pixel, so that a normalised image, of which 0 is not black, is
            refused; None takes any. Transformed images are not cut to it.

    Raises:
        SpecError: unknown names, a wrong number of parameters, a reversed or non-finite range, an empty domain.

    >>> PerturbationGeometric.parse("R(10)")
    PerturbationGeometric(('R',), [-10.0], [10.0])
    """

    split_methods = ("CROWN",)

    def __init__(
        self,
        names: Sequence[str],
        lower: Sequence[float] | Tensor,
        upper: Sequence[float] | Tensor,
        domain: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        check_type("names", names, (list, tuple), "a list of transformations, as ['R', 'Sh']")
        self.names = tuple(names)
        self.lower = as_numbers("lower", lower, dtype=torch.float64)
        self.upper = as_numbers("upper", upper, dtype=torch.float64)
        self.parameters = parameter_names(self.names)
        count = len(self.parameters)
        if self.lower.shape != self.upper.shape or self.lower.ndim not in (1, 2) or self.lower.shape[-1] != count:
            raise SpecError(
                f"{' '.join(self.names)} takes {count} parameters, got ranges of shape "
                f"{tuple(self.lower.shape)} and {tuple(self.upper.shape)}"
            )
        if not bool((torch.isfinite(self.lower) & torch.isfinite(self.upper) & (self.lower <= self.upper)).all()):
            raise SpecError(f"parameter ranges must be finite with lower <= upper, got {lower!r} and {upper!r}")
        self.name = "".join(self.names)
        self.planes = True
        self.domain = None if domain is None else open_interval(domain)
        self._cache: tuple[tuple[Tensor, Tensor, Tensor, bool], tuple[Tensor, ...]] | None = None

    @classmethod
    def parse(cls, text: str) -> PerturbationGeometric:
        """The set that DeepG / CGT text describes: ``R(10)``, ``R(2) Sh(2)``, ``T(2,2)``, ``R(5,10)``.

        Raises:
            SpecError: malformed text.
        """
        perturbation = cls(*parse_transformation(text))
        perturbation.name = "".join(text.split())
        return perturbation

    def check(self, x: Tensor) -> None:
        super().check(x)
        if x.ndim != 4:
            raise SpecError(f"a geometric set transforms images (B, C, H, W), got shape {tuple(x.shape)}")
        self._ranges(x)

    def _ranges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (B, D) like ``x``."""
        if self.lower.ndim == 2 and self.lower.shape[0] != x.shape[0]:
            raise SpecError(f"the set has {self.lower.shape[0]} parameter boxes but x has {x.shape[0]} samples")
        shape = (x.shape[0], len(self.parameters))
        return tuple(end.to(device=x.device, dtype=x.dtype).expand(shape) for end in (self.lower, self.upper))  # type: ignore[return-value]

    def _relaxed(self, x: Tensor) -> tuple[Tensor, ...]:
        """Hull (low, high) and planes (slopes and offsets) around ``x``, kept for the last images asked for."""
        if self._cache is None or not self._relaxes(*self._cache[0], x):
            self.check(x)
            # float64 ends: rounded to float32 they could lie inside the range that was asked for
            lower, upper = self._ranges(x.double())
            spatial = sum(name not in ("C", "B") for name in self.parameters)
            with torch.inference_mode(False), torch.no_grad():  # kept for later, which may be no inference
                hull = interval_hull(x, self.names, lower, upper, _HULL_PIECES.get(spatial, 2))
                pieces = _PLANE_PIECES.get(spatial, 4)
                planes = linear_planes(x, self.names, lower, upper, pieces) if self.planes else ()
            # copies: images and ranges may be overwritten in place
            of = (x.detach().clone(), self.lower.clone(), self.upper.clone(), self.planes)
            self._cache = (of, (*hull, *planes))
        return self._cache[1]

    def _relaxes(self, images: Tensor, lower: Tensor, upper: Tensor, planes: bool, x: Tensor) -> bool:
        """Whether what was computed for these is what ``x`` and the present ranges ask for."""
        alike = images.shape == x.shape and images.dtype == x.dtype and images.device == x.device
        ranges = torch.equal(lower, self.lower) and torch.equal(upper, self.upper)
        return alike and planes == self.planes and ranges and torch.equal(images, x)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high, *_ = self._relaxed(x)
        return low, high

    def deviation(self, x: Tensor, rows: Rows) -> Tensor:
        """The better of two lower bounds: over the hull's box, and over the planes' parameter box."""
        low, high, *planes = self._relaxed(x)
        positive = replace(rows, coefficients=rows.coefficients.clamp(min=0))
        negative = replace(rows, coefficients=rows.coefficients.clamp(max=0))
        over_box = dot(positive, low - x) + dot(negative, high - x)
        if not self.planes:
            return over_box
        lower_slope, lower_offset, upper_slope, upper_offset = planes
        over_planes = dot(positive, lower_offset - x) + dot(negative, upper_offset - x)
        lower, upper = self._ranges(x)
        # outward: the planes' centre is (lower + upper) / 2 up to rounding
        radius = (upper - lower) / 2 * (1 + 1e-6) + 1e-7 * (upper.abs() + lower.abs()) * (upper > lower)
        for d in range(len(self.parameters)):
            slope = dot(positive, lower_slope[:, d]) + dot(negative, upper_slope[:, d])
            over_planes = over_planes - slope.abs() * rows.per_sample(radius[:, d]).squeeze(-1)
        return torch.maximum(over_box, over_planes)

    def refines_first_layer(self) -> bool:
        return self.planes

    # -- points --------------------------------------------------------------------------------

    def decode(self, x: Tensor, variable: Tensor) -> Tensor:
        return transformed(x, self.names, variable)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Parameters (B, D), uniform in the box."""
        lower, upper = self._ranges(x)
        share = torch.rand(lower.shape, generator=generator, dtype=x.dtype, device=x.device)
        return lower + share * (upper - lower)

    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        lower, upper = self._ranges(x)
        moved = variable + step * (upper - lower) / 2 * gradient.sign()
        return torch.minimum(torch.maximum(moved, lower), upper)

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        """The transformed image nearest to ``point`` that a search finds: a grid, then Gauss-Newton steps."""
        exact, point = x.double(), point.double()
        starts = self._grid(*self._ranges(exact))
        everyone = torch.arange(len(x), device=x.device)
        with torch.no_grad():
            order = self._distances(exact, point, starts).argsort(dim=0)[:_NEWTON_STARTS]
            some = _in_parts(x, starts[order, everyone])
            ends = torch.cat([self._descend(exact, point, part) for part in some])
            nearest = self._nearest(exact, point, ends)
        return self.decode(exact, nearest).to(x.dtype)

    def _descend(self, x: Tensor, point: Tensor, starts: Tensor) -> Tensor:
        """Damped Gauss-Newton steps inside the box from parameters (N, B, D) each."""
        lower, upper = self._ranges(x)
        count = len(starts)
        x, point = x.repeat(count, 1, 1, 1), point.repeat(count, 1, 1, 1)
        lower, upper = lower.repeat(count, 1), upper.repeat(count, 1)
        width = (upper - lower).clamp(min=1e-12)
        shares = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.04], dtype=x.dtype, device=x.device)
        best = starts.flatten(0, 1)
        for _ in range(_NEWTON_STEPS):
            candidates = best + shares[:, None, None] * self._newton_step(x, point, best, width)
            moved = self._nearest(x, point, torch.minimum(torch.maximum(candidates, lower), upper))
            if torch.equal(moved, best):
                break
            best = moved
        return best.view_as(starts)

    def _newton_step(self, x: Tensor, point: Tensor, variable: Tensor, width: Tensor) -> Tensor:
        """Least-squares step (B, D) towards ``point``, with derivatives by central differences."""
        shifts = 1e-6 * torch.diag_embed(width).transpose(0, 1)
        images = self._images(x, torch.cat([variable + shifts, variable - shifts, variable[None]]))
        ahead, behind, (here,) = images.split([len(shifts), len(shifts), 1])
        jacobian = ((ahead - behind) / 2e-6).flatten(2).movedim(0, 2)
        residual = (point - here).flatten(1).unsqueeze(2)
        normal = jacobian.mT @ jacobian + 1e-12 * torch.eye(variable.shape[1], dtype=x.dtype, device=x.device)
        return torch.linalg.solve(normal, jacobian.mT @ residual).squeeze(2) * width

    def _grid(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Parameter vectors (N, B, D) that cover the box: a line for one parameter, else a Sobol sequence."""
        if lower.shape[1] == 1:
            shares = torch.linspace(0, 1, _SEARCH_POINTS)[:, None]
        else:
            shares = torch.quasirandom.SobolEngine(lower.shape[1]).draw(_SEARCH_POINTS)
        return lower + shares.to(lower)[:, None, :] * (upper - lower)

    def _nearest(self, x: Tensor, point: Tensor, candidates: Tensor) -> Tensor:
        """Per sample, the candidate (N, B, D) whose image is nearest to ``point``; (B, D)."""
        chosen = self._distances(x, point, candidates).argmin(0)
        return candidates[chosen, torch.arange(len(x), device=x.device)]

    def _distances(self, x: Tensor, point: Tensor, candidates: Tensor) -> Tensor:
        """Squared distances (N, B) between ``point`` and the candidates' (N, B, D) images."""
        some = _in_parts(x, candidates)
        return torch.cat([(self._images(x, part) - point).square().flatten(2).sum(2) for part in some])

    def _images(self, x: Tensor, candidates: Tensor) -> Tensor:
        """(N, B, C, H, W) at parameters (N, B, D)."""
        images = self.decode(x.repeat(len(candidates), 1, 1, 1), candidates.flatten(0, 1))
        return images.view(len(candidates), *x.shape)

    # -- smaller and larger sets ---------------------------------------------------------------

    def scaled(self, factor: float) -> PerturbationGeometric:
        """Ranges ``factor`` times as wide, about 0 where they hold 0, else about their middle."""
        middle = torch.where((self.lower <= 0) & (self.upper >= 0), 0.0, (self.lower + self.upper) / 2)
        return self._with(middle + (self.lower - middle) * factor, middle + (self.upper - middle) * factor)

    def _with(self, lower: Tensor, upper: Tensor) -> PerturbationGeometric:
        other = PerturbationGeometric(self.names, lower, upper, self.domain)
        other.name = self.name
        return other

    def covers_part(self, other: Self) -> bool:
        if other.names != self.names or self.lower.ndim != 1 or other.lower.ndim != 1:
            return False
        return bool((self.lower <= other.lower).all() and (other.upper <= self.upper).all())

    def split(self, x: Tensor) -> tuple[PerturbationSet, ...]:
        """The range that moves the pixels most, halved.

        Raises:
            SpecError: a box per sample; split the sets of a batch one by one.
        """
        self._require_one_box()
        if not bool((self.upper > self.lower).any()):
            return ()
        effect = self._effects(x)
        widest = int(effect.argmax()) if float(effect.max()) > 0 else int((self.upper - self.lower).argmax())
        middle = (self.lower + self.upper) / 2
        first_upper, second_lower = self.upper.clone(), self.lower.clone()
        first_upper[widest] = second_lower[widest] = middle[widest]
        return self._with(self.lower, first_upper), self._with(second_lower, self.upper)

    def _effects(self, x: Tensor) -> Tensor:
        """How far each parameter's range moves the pixels of the first image, the others held at their middle, (D,)."""
        count = len(self.parameters)
        middle = ((self.lower + self.upper) / 2).repeat(2, count, 1)
        middle[0].diagonal()[:], middle[1].diagonal()[:] = self.lower, self.upper
        with torch.no_grad():
            ends = self.decode(x[:1].double().expand(2 * count, *x.shape[1:]), middle.flatten(0, 1).to(x.device))
        low, high = ends.flatten(1).unflatten(0, (2, count))
        return (high - low).abs().mean(1).to(self.lower)

    def partition(self, x: Tensor) -> tuple[PerturbationSet, ...]:
        """A grid whose cells move no pixel by more than about one: larger ones are bounded too loosely.

        Raises:
            SpecError: as :meth:`split`.
        """
        counts = self._cells(x)
        ranges = zip(self.lower.tolist(), self.upper.tolist(), counts, strict=True)
        edges = [torch.linspace(low, high, count + 1, dtype=torch.float64).tolist() for low, high, count in ranges]
        cells = itertools.product(*(itertools.pairwise(ends) for ends in edges))
        return tuple(self._with(*torch.tensor(cell, dtype=torch.float64).unbind(1)) for cell in cells)

    def is_wide(self, x: Tensor) -> bool:
        return self.lower.ndim == 1 and max(self._cells(x)) > _WIDE

    def _cells(self, x: Tensor) -> list[int]:
        """How many cells of the partition lie along each parameter."""
        self._require_one_box()
        radius = (max(x.shape[2:]) - 1) / 2
        width = self.upper - self.lower
        motion = torch.tensor([_MOTION[name](radius) for name in self.parameters], dtype=torch.float64) * width
        counts = (motion * int((motion > 0).sum()) / _PARTITION_MOTION).ceil().clamp(min=1).long().tolist()
        while math.prod(counts) > _PARTITION_CELLS:
            largest = counts.index(max(counts))
            counts[largest] = (counts[largest] + 1) // 2
        return counts

    def _require_one_box(self) -> None:
        if self.lower.ndim != 1:
            raise SpecError("a geometric set with a box per sample cannot be split; split the sets one by one")

    def select(self, x: Tensor, index: Tensor) -> PerturbationGeometric:
        if self.lower.ndim == 1:
            return self
        chosen = index.to(self.lower.device)
        return self._with(self.lower[chosen], self.upper[chosen])

    def stack(self, others: Sequence[PerturbationSet]) -> PerturbationSet:
        for other in others:
            if not isinstance(other, PerturbationGeometric) or other.names != self.names or other.lower.ndim != 1:
                raise SpecError("only geometric sets of the same names with one box each can be stacked")
        lowers, uppers = zip(*((o.lower, o.upper) for o in others), strict=True)
        return self._with(torch.stack(lowers), torch.stack(uppers))

    def small_region(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationSet]:
        """The clean image with a parameter box of relative size ``ratio`` around the attack's parameters.

        Its bounds are those of the pixels' hull alone: for small regions the planes gain next to nothing, at five
        times the work.
        """
        if not 0 <= ratio <= 1:
            raise SpecError(f"ratio (lambda) must lie in [0, 1], got {ratio!r}")
        lower, upper = self._ranges(x)
        reach = ratio * (upper - lower) / 2
        centre = torch.minimum(torch.maximum(variable, lower + reach), upper - reach)
        ends = torch.maximum(centre - reach, lower), torch.minimum(centre + reach, upper)
        region = self._with(ends[0].double(), ends[1].double())
        region.planes = False
        return x, region

    def needs_attack(self, ratio: float) -> bool:
        return ratio < 1

    def __repr__(self) -> str:
        if self.lower.ndim == 2:
            return f"PerturbationGeometric({self.names}, {self.lower.shape[0]} boxes)"
        return f"PerturbationGeometric({self.names}, {self.lower.tolist()}, {self.upper.tolist()})"


def _in_parts(x: Tensor, candidates: Tensor) -> tuple[Tensor, ...]:
    """Parameters (N, B, D) in parts whose images of ``x`` are made at once."""
    return candidates.split(max(1, _TOGETHER // max(1, x.numel())))
