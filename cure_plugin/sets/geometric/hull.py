"""The interval hull: bounds per pixel on the image, over a box of parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cure_plugin.sets.geometric.parameters import Step, checked_box, steps_of
from cure_plugin.sets.geometric.pieces import Pieces, piece_counts, sub_boxes
from cure_plugin.sets.geometric.sources import source_boxes
from cure_plugin.sets.geometric.transforms import padded_cell, per_pixel


@torch.no_grad()
def interval_hull(
    image: Tensor, names: Sequence[str], lower: Tensor, upper: Tensor, pieces: Pieces
) -> tuple[Tensor, Tensor]:
    """Bounds per pixel on the transformed image over a box of parameters.

    The spatial parameters are cut into sub-boxes; per sub-box and pixel the source point is boxed and the
    interpolant's range over that box is exact, so the only loss is the box around the curve of source
    points, which vanishes with more pieces.

    Args:
        image: (B, C, H, W).
        lower, upper: the box, (B, D) each.
        pieces: sub-intervals per spatial parameter; the cost grows with their product.

    Returns:
        (low, high), each (B, C, H, W), rounded outward to the image's type.

    Raises:
        SpecError: as :func:`transform`; an empty box, or pieces that are < 1 or do not fit.
    """
    start, stop, spatial, _ = checked_box(image, names, lower, upper)
    counts = piece_counts(pieces, spatial)
    least = most = None
    for low, high in spatial_hulls(image, names, start, stop, spatial, counts):
        least = low if least is None else torch.minimum(least, low)
        most = high if most is None else torch.maximum(most, high)
    assert least is not None and most is not None
    least, most = value_range(steps_of(names), least, most, start, stop)
    return rounded(least, image.dtype, -math.inf), rounded(most, image.dtype, math.inf)


def spatial_hulls(
    image: Tensor, names: Sequence[str], lower: Tensor, upper: Tensor, spatial: list[int], counts: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(low, high) before contrast and brightness, in float64, for each sub-box in the order of sub_boxes."""
    if not spatial:
        yield image.to(torch.float64), image.to(torch.float64)
        return
    interpolant = _Interpolant(image)
    for low, high in sub_boxes(lower, upper, spatial, counts):
        yield interpolant.bounds(*source_boxes(steps_of(names), low, high, interpolant.height, interpolant.width))


class _Interpolant:
    """The bilinear interpolant of a zero-padded batch as one polynomial per cell, in float64."""

    def __init__(self, image: Tensor) -> None:
        self.height, self.width = int(image.shape[2]), int(image.shape[3])
        p = torch.nn.functional.pad(image.to(torch.float64), (1, 1, 1, 1))
        here, right, down, both = p[..., :-1, :-1], p[..., :-1, 1:], p[..., 1:, :-1], p[..., 1:, 1:]
        polynomial = torch.stack([here, right - here, down - here, both - right - down + here], -1)
        # (B * cells, C, 4): one row per cell, so that a look-up reads one stretch of memory.
        self.table = polynomial.permute(0, 2, 3, 1, 4).flatten(0, 2).contiguous()
        cells = (self.height + 1) * (self.width + 1)
        self.first = torch.arange(image.shape[0], device=image.device).view(-1, 1, 1) * cells

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Exact (low, high), each (B, C, H, W), over boxes of centred coordinates (B, 2, H, W).

        On a rectangle inside one cell a bilinear function is extremal at a corner, so the corners of the
        pieces that the pixel grid cuts a box into are enough.
        """
        columns = self._breakpoints(low[:, 0] + (self.width + 1) / 2, high[:, 0] + (self.width + 1) / 2, self.width)
        rows = self._breakpoints((self.height + 1) / 2 - high[:, 1], (self.height + 1) / 2 - low[:, 1], self.height)
        least = most = None
        for (row, down), (column, right) in itertools.product(rows, columns):
            constant, across, along, twist = self.table[self.first + row * (self.width + 1) + column].unbind(-1)
            right, down = right.unsqueeze(-1), down.unsqueeze(-1)
            value = constant + right * across + down * (along + right * twist)
            least = value if least is None else torch.minimum(least, value)
            most = value if most is None else torch.maximum(most, value)
        assert least is not None and most is not None
        # auto_LiRPA reshapes bounds with view()
        return least.permute(0, 3, 1, 2).contiguous(), most.permute(0, 3, 1, 2).contiguous()

    def _breakpoints(self, low: Tensor, high: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Both ends of the intervals and all integers between; short intervals repeat their end."""
        low, high = low.clamp(0, size + 1), high.clamp(0, size + 1)
        floor = low.floor()
        count = int((high.ceil() - floor).max())
        points = [low, *(torch.minimum(floor + index, high) for index in range(1, count + 1))]
        return [padded_cell(point, size) for point in points]


def value_range(steps: list[Step], low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Contrast and brightness, in order, on intervals of pixels; exact, as each parameter occurs once."""
    for step in steps:
        start, stop = per_pixel(lower[:, step.column]), per_pixel(upper[:, step.column])
        if step.name == "C":
            ends = [end * (1 + factor / 100) for end in (low, high) for factor in (start, stop)]
            low = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
            high = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
        elif step.name == "B":
            low, high = low + start, high + stop
    return low, high


def rounded(value: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """``value`` in another type, rounded towards -inf or inf."""
    result = value.to(dtype)
    wrong = result > value if towards < 0 else result < value
    return torch.where(wrong, torch.nextafter(result, torch.full_like(result, towards)), result)
