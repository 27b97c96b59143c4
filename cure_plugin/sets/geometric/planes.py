"""Linear planes: bounds per pixel on the image that are affine in the parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cure_plugin.sets.geometric.hull import rounded, spatial_hulls, value_range
from cure_plugin.sets.geometric.parameters import Step, checked_box, steps_of
from cure_plugin.sets.geometric.pieces import Pieces, piece_counts, sub_boxes

_CHUNK_ELEMENTS = 1 << 24
"""Sub-box pixels that :func:`linear_planes` keeps at a time: bounds its memory (256 MB for both hull ends)."""

_LEAST_WIDTH = 1e-6
"""Width of a parameter range, relative to 1 + |its ends|, below which a slope would only fit rounding."""

_SLOPE_SHARES = (0.0, 0.5, 1.0)
"""Shares of the least-squares slope that :func:`linear_planes` tries; powers of two or 0, so products are exact."""


@torch.no_grad()
def linear_planes(
    image: Tensor, names: Sequence[str], lower: Tensor, upper: Tensor, pieces: Pieces
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear bounds per pixel on the transformed image over a box of parameters.

    For every p in the box, with centre = (lower + upper) / 2 in the type of ``lower``:
    ``lower_offset + sum_d lower_slope_d (p_d - centre_d) <= transform(image, names, p)``, and the upper
    plane likewise. The slopes fit the hulls of the sub-boxes at their midpoints by least squares (0 for a
    parameter with one piece); the offset is then moved by the worst residual over all sub-boxes. Where a
    flatter plane comes closer, it is taken, so no plane is looser on average than the hull of as many pieces.
    Contrast and brightness need no pieces: pixel values are affine in each of them, so the residual is
    extremal at the ends of their ranges.

    Args:
        image: (B, C, H, W).
        lower, upper: the box, (B, D) each.
        pieces: sub-intervals per spatial parameter; the cost grows with their product.

    Returns:
        (lower_slope (B, D, C, H, W), lower_offset (B, C, H, W), upper_slope, upper_offset).

    Raises:
        SpecError: as :func:`interval_hull`.
    """
    start, stop, spatial, values = checked_box(image, names, lower, upper)
    counts = piece_counts(pieces, spatial)
    centre = ((lower + upper) / 2).detach().to(start)
    width = max(1, _CHUNK_ELEMENTS // (math.prod(counts) * image[0].numel()))
    parts = []
    for first in range(0, image.shape[0], width):
        rows = slice(first, first + width)
        box = start[rows], stop[rows]
        hulls = list(spatial_hulls(image[rows], names, *box, spatial, counts))
        cells = list(sub_boxes(*box, spatial, counts))
        bounds = []
        for sign in (-1, 1):
            grid = _Grid(steps_of(names), cells, hulls, _vertices(*box, values), centre[rows], spatial, values, sign)
            slope = grid.slope().to(image.dtype)  # rounded first: the offset then belongs to the rounded slope
            share, offset = grid.best_offset(slope.to(torch.float64))
            bounds += [slope * share.unsqueeze(1).to(image.dtype), rounded(offset, image.dtype, sign * math.inf)]
        parts.append(bounds)
    lower_slope, lower_offset, upper_slope, upper_offset = (torch.cat(part) for part in zip(*parts, strict=True))
    return lower_slope, lower_offset, upper_slope, upper_offset


def _vertices(lower: Tensor, upper: Tensor, columns: list[int]) -> list[Tensor]:
    """The corners (B, D) of the box in ``columns``; the other columns keep ``lower``."""
    corners = []
    for ends in itertools.product((lower, upper), repeat=len(columns)):
        corner = lower.clone()
        for column, end in zip(columns, ends, strict=True):
            corner[:, column] = end[:, column]
        corners.append(corner)
    return corners


@dataclass(frozen=True)
class _Grid:
    """The hulls of all sub-boxes at all ends of contrast and brightness, seen from below (sign -1) or above (1)."""

    steps: list[Step]
    cells: list[tuple[Tensor, Tensor]]
    hulls: list[tuple[Tensor, Tensor]]
    vertices: list[Tensor]
    centre: Tensor
    spatial: list[int]
    values: list[int]
    sign: int

    def _points(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(offset of a midpoint from the centre (B, D), half-widths (B, D), bound on the pixels there)."""
        for (low, high), hull in zip(self.cells, self.hulls, strict=True):
            for vertex in self.vertices:
                middle, half = (low + high) / 2, (high - low) / 2
                middle[:, self.values] = vertex[:, self.values]
                half[:, self.values] = 0
                ends = value_range(self.steps, *hull, vertex, vertex)
                yield middle - self.centre, half, ends[0 if self.sign < 0 else 1]

    def slope(self) -> Tensor:
        """Least-squares slopes (B, D, C, H, W); on a full grid the parameters are orthogonal."""
        pixels = self.hulls[0][0]
        moment = pixels.new_zeros(pixels.shape[0], self.centre.shape[1], *pixels.shape[1:])
        spread = torch.zeros_like(self.centre)
        lowest, highest = self.cells[0][0], self.cells[-1][1]
        # The bounds are stated about a centre in the caller's type; only the float64 one has zero mean.
        correction = self.centre - (lowest + highest) / 2
        for from_centre, _, bound in self._points():
            offset = from_centre + correction
            moment += offset[:, :, None, None, None] * bound.unsqueeze(1)
            spread += offset.square()
        # A parameter with one piece or hardly any width leaves only rounding in the sums: its slope is 0.
        extent = highest - lowest
        usable = (spread > 1e-3 * extent.square()) & (extent > _LEAST_WIDTH * (1 + highest.abs() + lowest.abs()))
        share = torch.where(usable, 1 / torch.where(usable, spread, 1), 0)
        return moment * share[:, :, None, None, None]

    def best_offset(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """(share, offset), (B, C, H, W) each: the plane ``share * slope`` past every hull in all its sub-box.

        The share is the one of _SLOPE_SHARES whose plane is closest at the centre, that is on average.
        """
        steepness = slope.abs()
        worst: list[Tensor] = []
        for offset, half, bound in self._points():
            # A plane leaves a box at a corner: its value at the midpoint and its reach to the corners.
            plane = torch.einsum("bd,bdchw->bchw", offset, slope)
            shift = plane - self.sign * torch.einsum("bd,bdchw->bchw", half, steepness)
            residuals = [bound - share * shift for share in _SLOPE_SHARES]
            worst = [self._further(*pair) for pair in zip(worst, residuals, strict=True)] if worst else residuals
        offsets = torch.stack(worst)
        best = offsets.max(0) if self.sign < 0 else offsets.min(0)
        return slope.new_tensor(_SLOPE_SHARES)[best.indices], best.values

    def _further(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.minimum(one, other) if self.sign < 0 else torch.maximum(one, other)
