"""Sound relaxations of parametrised image transformations: exact warp, interval hull, linear planes, text form.

Conventions of every function here:

- Images are (B, C, H, W), floating point. Pixel (row i, column j) has the centred coordinates
  ``x = j - (W-1)/2`` (right) and ``y = (H-1)/2 - i`` (up).
- An output pixel is the bilinear interpolation of the input at the point that the inverse transformation
  maps the pixel's (x, y) to. All pixels outside the image are 0.
- Names, as in DeepG and CGT, with the unit of the parameter: ``R`` rotation about the centre, degrees,
  counter-clockwise; ``T`` translation, two parameters, pixels right and up; ``Sc`` scaling by
  1 + s/100; ``Sh`` horizontal shear x' = x + y * m/100; ``C`` contrast, pixel * (1 + c/100);
  ``B`` brightness, added to the pixel.
- A composition is a sequence of names, the first applied first. The image is interpolated once, at the
  composed inverse point; then contrast and brightness act in their listed order, on padding too,
  without clipping (they commute with interpolation, and padding comes before them).
- Parameters are (B, D), one column per parameter in listed order; ``T`` has two columns.

Coordinates are computed in float64 whatever the image's type. The bounds hold for the real-valued
transformation; :func:`transform` in float32 adds its own rounding (about 1e-6 of the largest pixel).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cure_plugin.errors import SpecError

Pieces = int | Sequence[int]
"""Equal sub-intervals per spatial parameter: one number for all, or one per spatial parameter."""

_COLUMNS = {"R": ("R",), "T": ("Tx", "Ty"), "Sc": ("Sc",), "Sh": ("Sh",), "C": ("C",), "B": ("B",)}
"""Name -> its parameters."""

_VALUE_NAMES = ("C", "B")
"""The names that act on pixel values; the others act on coordinates."""

_LOWEST_SCALE = -99.9
"""Percent. At -100 the image shrinks to a point and the inverse does not exist."""

_COORDINATE_SLACK = 1e-6
"""Outward widening of source coordinates, in pixels per 1 + |coordinate|; float64 errs by some 1e-14."""

_ANGLE_SLACK = 1e-9
"""Radians by which an extremum may lie outside an angle interval and still count as inside."""

_CHUNK_ELEMENTS = 1 << 24
"""Sub-box pixels that :func:`linear_planes` keeps at a time: bounds its memory (256 MB for both hull ends)."""

_LEAST_WIDTH = 1e-6
"""Width of a parameter range, relative to 1 + |its ends|, below which a slope would only fit rounding."""

_SLOPE_SHARES = (0.0, 0.5, 1.0)
"""Shares of the least-squares slope that :func:`linear_planes` tries; powers of two or 0, so products are exact."""

_ALLOWED = "names R, T, Sc, Sh, C, B, as in 'R(10)', 'R(5,10)' or 'Sc(1) T(2,2) B(0.01)'"


# -- names and parameters ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One elementary transformation and the column of its first parameter."""

    name: str
    column: int


def parameter_names(names: Sequence[str]) -> tuple[str, ...]:
    """The parameters of a composition in column order.

    Raises:
        SpecError: no name, or an unknown one.

    >>> parameter_names(("R", "T"))
    ('R', 'Tx', 'Ty')
    """
    unknown = [name for name in names if not isinstance(name, str) or name not in _COLUMNS]
    if unknown or not names:
        raise SpecError(f"transformation {tuple(names)!r}: give at least one of {', '.join(_COLUMNS)}")
    return tuple(column for name in names for column in _COLUMNS[name])


def _steps(names: Sequence[str]) -> list[_Step]:
    """The steps of a composition in listed order."""
    widths = [len(_COLUMNS[name]) for name in names]
    return [_Step(name, sum(widths[:position])) for position, name in enumerate(names)]


def _check(image: Tensor, names: Sequence[str], *parameters: Tensor) -> None:
    """Refuse parameters that do not fit the image and the names, or make no transformation."""
    columns = parameter_names(names)
    if image.ndim != 4 or not image.is_floating_point():
        raise SpecError(f"image must be (B, C, H, W) and floating point, got {tuple(image.shape)} {image.dtype}")
    shape = (image.shape[0], len(columns))
    scales = [index for index, column in enumerate(columns) if column == "Sc"]
    for value in parameters:
        if tuple(value.shape) != shape:
            raise SpecError(f"parameters of {' '.join(names)} must be {shape}, (B, D), got {tuple(value.shape)}")
        if not bool(torch.isfinite(value).all()):
            raise SpecError(f"parameters of {' '.join(names)} must be finite")
        if bool((value[:, scales] < _LOWEST_SCALE).any()):
            raise SpecError(f"scaling Sc must be at least {_LOWEST_SCALE} percent, got {value[:, scales].min():g}")


def _checked_box(
    image: Tensor, names: Sequence[str], lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """(lower, upper) in float64, and the columns of the spatial and of the pixel-value parameters."""
    _check(image, names, lower, upper)
    if bool((lower > upper).any()):
        raise SpecError(f"parameter box of {' '.join(names)} is empty: a lower bound exceeds its upper bound")
    spatial = [index for index, column in enumerate(parameter_names(names)) if column not in _VALUE_NAMES]
    values = [index for index, column in enumerate(parameter_names(names)) if column in _VALUE_NAMES]
    start, stop = (end.detach().to(dtype=torch.float64, device=image.device) for end in (lower, upper))
    return start, stop, spatial, values


def _piece_counts(pieces: Pieces, spatial: list[int]) -> list[int]:
    """One number of sub-intervals per spatial parameter."""
    counts = [pieces] * len(spatial) if isinstance(pieces, int) else list(pieces)
    if len(counts) != len(spatial) or any(count < 1 for count in counts):
        raise SpecError(
            f"pieces must be >= 1, one number or one for each of {len(spatial)} spatial parameters: {pieces!r}"
        )
    return counts


def _sub_boxes(lower: Tensor, upper: Tensor, spatial: list[int], counts: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The cells (lower, upper), each (B, D), of the grid over the spatial parameters."""
    for cell in itertools.product(*(range(count) for count in counts)):
        low, high = lower.clone(), upper.clone()
        for column, index, count in zip(spatial, cell, counts, strict=True):
            # Both neighbours compute a shared edge by the same expression, so no gap opens between them.
            low[:, column] = _edge(lower[:, column], upper[:, column], index / count)
            high[:, column] = _edge(lower[:, column], upper[:, column], (index + 1) / count)
        yield low, high


def _edge(lower: Tensor, upper: Tensor, share: float) -> Tensor:
    """The point at ``share`` of the way; exactly ``lower`` at 0 and ``upper`` at 1, and never outside them."""
    return torch.minimum(torch.maximum(lower * (1 - share) + upper * share, lower), upper)


def _per_pixel(value: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return value.view(-1, 1, 1, 1)


# -- the transformation itself -----------------------------------------------------------------


def _pixel_coordinates(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centred (x, y) of the pixels, shapes (W,) and (H, 1), float64."""
    x = torch.arange(width, dtype=torch.float64, device=device) - (width - 1) / 2
    y = (height - 1) / 2 - torch.arange(height, dtype=torch.float64, device=device)
    return x, y.unsqueeze(1)


def _padded_cell(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(cell, position in the cell) of a coordinate in an axis of ``size`` pixels that a ring of zeros pads.

    The interpolant vanishes on and beyond the ring, so clamping to the ring does not change it.
    """
    inside = coordinate.clamp(0, size + 1)
    cell = inside.detach().floor().clamp(max=size)
    return cell.long(), inside - cell


def transform(image: Tensor, names: Sequence[str], parameters: Tensor) -> Tensor:
    """Apply a composition to a batch; differentiable in ``parameters`` and ``image``.

    Args:
        image: (B, C, H, W).
        names: the composition.
        parameters: (B, D).

    Returns:
        (B, C, H, W) in the image's type.

    Raises:
        SpecError: unknown names, shapes that do not fit, parameters that are not finite, Sc < -99.9.

    >>> transform(torch.tensor([[[[1.0, 2.0]]]]), ("T", "B"), torch.tensor([[1.0, 0.0, 0.5]]))
    tensor([[[[0.5000, 1.5000]]]])
    """
    _check(image, names, parameters)
    batch, channels, height, width = image.shape
    exact = parameters.to(dtype=torch.float64, device=image.device)
    x, y = _pixel_coordinates(height, width, image.device)
    x, y = x.expand(batch, height, width), y.expand(batch, height, width)
    for step in reversed(_steps(names)):
        x, y = _inverse_point(step, x, y, exact)
    column, right = _padded_cell(x + (width + 1) / 2, width)
    row, down = _padded_cell((height + 1) / 2 - y, height)
    pixels = torch.nn.functional.pad(image, (1, 1, 1, 1)).flatten(2)
    right, down = right.to(image.dtype).unsqueeze(1), down.to(image.dtype).unsqueeze(1)
    result = torch.zeros_like(image)
    for below, vertical in ((0, 1 - down), (1, down)):
        for beside, horizontal in ((0, 1 - right), (1, right)):
            index = (row + below) * (width + 2) + column + beside
            corner = pixels.gather(2, index.view(batch, 1, -1).expand(batch, channels, -1))
            result = result + vertical * horizontal * corner.view_as(image)
    for step in _steps(names):
        value = _per_pixel(exact[:, step.column]).to(image.dtype)
        if step.name == "C":
            result = result * (1 + value / 100)
        elif step.name == "B":
            result = result + value
    return result


def _inverse_point(step: _Step, x: Tensor, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Where the inverse of one step maps the points (x, y), each (B, H, W)."""
    value = parameters[:, step.column].view(-1, 1, 1)
    if step.name == "R":
        angle = value * (math.pi / 180)
        return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    if step.name == "T":
        return x - value, y - parameters[:, step.column + 1].view(-1, 1, 1)
    if step.name == "Sc":
        return x / (1 + value / 100), y / (1 + value / 100)
    if step.name == "Sh":
        return x - y * (value / 100), y
    return x, y


# -- range of the source coordinates -----------------------------------------------------------
#
# A source coordinate is affine in each of 1/(1 + s/100), the shear, the shifts and one (cos, sin) pair
# while the others are fixed. So its range over a box of parameters is attained at a vertex of all but one
# rotation, and over the angle of that one rotation it is a sinusoid, whose range has a closed form.

_Form = Tensor
"""(B, 2, 3, 3): per source coordinate (x, y), the coefficients of (cos t, sin t, 1), each affine in (x, y, 1)."""


def _source_forms(steps: list[_Step], rotation: _Step | None, lower: Tensor, upper: Tensor) -> Iterator[_Form]:
    """The source coordinates as forms in the angle t of ``rotation``, at every vertex of the other parameters."""
    choices: list[list[Callable[[_Form], _Form]]] = []
    for step in reversed(steps):
        low, high = lower[:, step.column], upper[:, step.column]
        if step is rotation:
            choices.append([_turn_open])
        elif step.name == "R":
            # Any further rotation: the box of its cosines and sines, which contains its arc.
            cosines = sinusoid_range(torch.ones_like(low), torch.zeros_like(low), *_radians(low, high))
            sines = sinusoid_range(torch.zeros_like(low), torch.ones_like(low), *_radians(low, high))
            choices.append([_turn(cosine, sine) for cosine in cosines for sine in sines])
        elif step.name == "T":
            ups = lower[:, step.column + 1], upper[:, step.column + 1]
            choices.append([_shift(right, up) for right in (low, high) for up in ups])
        elif step.name == "Sc":
            choices.append([_stretch(1 / (1 + value / 100)) for value in (low, high)])
        elif step.name == "Sh":
            choices.append([_shear(value / 100) for value in (low, high)])
    start = lower.new_zeros(lower.shape[0], 2, 3, 3)
    start[:, 0, 2, 0] = 1
    start[:, 1, 2, 1] = 1
    for vertex in itertools.product(*choices):
        form = start
        for move in vertex:
            form = move(form)
        yield form


def _turn_open(form: _Form) -> _Form:
    """Rotate back by the open angle t; no open angle may have come before."""
    x, y = form[:, 0, 2], form[:, 1, 2]
    none = torch.zeros_like(x)
    return torch.stack([torch.stack([x, y, none], 1), torch.stack([y, -x, none], 1)], 1)


def _turn(cosine: Tensor, sine: Tensor) -> Callable[[_Form], _Form]:
    c, s = cosine.view(-1, 1, 1), sine.view(-1, 1, 1)
    return lambda form: torch.stack([c * form[:, 0] + s * form[:, 1], c * form[:, 1] - s * form[:, 0]], 1)


def _shift(right: Tensor, up: Tensor) -> Callable[[_Form], _Form]:
    offset = right.new_zeros(right.shape[0], 2, 3, 3)
    offset[:, 0, 2, 2] = right
    offset[:, 1, 2, 2] = up
    return lambda form: form - offset


def _stretch(inverse: Tensor) -> Callable[[_Form], _Form]:
    return lambda form: form * _per_pixel(inverse)


def _shear(slope: Tensor) -> Callable[[_Form], _Form]:
    m = slope.view(-1, 1, 1)
    return lambda form: torch.stack([form[:, 0] - m * form[:, 1], form[:, 1]], 1)


def _radians(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return low * (math.pi / 180), high * (math.pi / 180)


def sinusoid_range(a: Tensor, b: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Exact range of ``a cos t + b sin t`` over ``start <= t <= stop`` (radians); all broadcastable."""
    first = a * start.cos() + b * start.sin()
    last = a * stop.cos() + b * stop.sin()
    size, peak = torch.hypot(a, b), torch.atan2(b, a)
    low = torch.where(_meets(peak + math.pi, start, stop), -size, torch.minimum(first, last))
    high = torch.where(_meets(peak, start, stop), size, torch.maximum(first, last))
    return low, high


def _meets(angle: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Whether ``angle``, up to full turns, lies in [start, stop], in case of doubt yes."""
    turn = 2 * math.pi
    turns = ((start - _ANGLE_SLACK - angle) / turn).ceil()
    return angle + turns * turn <= stop + _ANGLE_SLACK


def _source_boxes(steps: list[_Step], lower: Tensor, upper: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(low, high) of the source x and y of every output pixel, each (B, 2, H, W), widened outward."""
    rotations = [step for step in steps if step.name == "R"]
    rotation = rotations[-1] if rotations else None
    x, y = _pixel_coordinates(height, width, lower.device)
    basis = torch.stack([x.expand(height, width), y.expand(height, width), torch.ones_like(x + y)])
    low = torch.full((lower.shape[0], 2, height, width), math.inf, dtype=lower.dtype, device=lower.device)
    high = -low
    for form in _source_forms(steps, rotation, lower, upper):
        cosine, sine, constant = torch.einsum("bukc,chw->kbuhw", form, basis)
        if rotation is None:
            start = stop = constant
        else:
            angles = _radians(lower[:, rotation.column], upper[:, rotation.column])
            start, stop = sinusoid_range(cosine, sine, *(_per_pixel(angle) for angle in angles))
            start, stop = start + constant, stop + constant
        low, high = torch.minimum(low, start), torch.maximum(high, stop)
    return low - _COORDINATE_SLACK * (1 + low.abs()), high + _COORDINATE_SLACK * (1 + high.abs())


# -- range of the image ------------------------------------------------------------------------


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
        return [_padded_cell(point, size) for point in points]


def _value_range(steps: list[_Step], low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Contrast and brightness, in order, on intervals of pixels; exact, as each parameter occurs once."""
    for step in steps:
        start, stop = _per_pixel(lower[:, step.column]), _per_pixel(upper[:, step.column])
        if step.name == "C":
            ends = [end * (1 + factor / 100) for end in (low, high) for factor in (start, stop)]
            low = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
            high = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
        elif step.name == "B":
            low, high = low + start, high + stop
    return low, high


def _rounded(value: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """``value`` in another type, rounded towards -inf or inf."""
    result = value.to(dtype)
    wrong = result > value if towards < 0 else result < value
    return torch.where(wrong, torch.nextafter(result, torch.full_like(result, towards)), result)


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
    start, stop, spatial, _ = _checked_box(image, names, lower, upper)
    counts = _piece_counts(pieces, spatial)
    least = most = None
    for low, high in _spatial_hulls(image, names, start, stop, spatial, counts):
        least = low if least is None else torch.minimum(least, low)
        most = high if most is None else torch.maximum(most, high)
    assert least is not None and most is not None
    least, most = _value_range(_steps(names), least, most, start, stop)
    return _rounded(least, image.dtype, -math.inf), _rounded(most, image.dtype, math.inf)


def _spatial_hulls(
    image: Tensor, names: Sequence[str], lower: Tensor, upper: Tensor, spatial: list[int], counts: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(low, high) before contrast and brightness, in float64, for each sub-box in the order of _sub_boxes."""
    if not spatial:
        yield image.to(torch.float64), image.to(torch.float64)
        return
    interpolant = _Interpolant(image)
    for low, high in _sub_boxes(lower, upper, spatial, counts):
        yield interpolant.bounds(*_source_boxes(_steps(names), low, high, interpolant.height, interpolant.width))


# -- linear planes -----------------------------------------------------------------------------


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
    start, stop, spatial, values = _checked_box(image, names, lower, upper)
    counts = _piece_counts(pieces, spatial)
    centre = ((lower + upper) / 2).detach().to(start)
    width = max(1, _CHUNK_ELEMENTS // (math.prod(counts) * image[0].numel()))
    parts = []
    for first in range(0, image.shape[0], width):
        rows = slice(first, first + width)
        box = start[rows], stop[rows]
        hulls = list(_spatial_hulls(image[rows], names, *box, spatial, counts))
        cells = list(_sub_boxes(*box, spatial, counts))
        bounds = []
        for sign in (-1, 1):
            grid = _Grid(_steps(names), cells, hulls, _vertices(*box, values), centre[rows], spatial, values, sign)
            slope = grid.slope().to(image.dtype)  # rounded first: the offset then belongs to the rounded slope
            share, offset = grid.best_offset(slope.to(torch.float64))
            bounds += [slope * share.unsqueeze(1).to(image.dtype), _rounded(offset, image.dtype, sign * math.inf)]
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

    steps: list[_Step]
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
                ends = _value_range(self.steps, *hull, vertex, vertex)
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


# -- text --------------------------------------------------------------------------------------

_TERM = re.compile(r"\s*([A-Za-z]+)\s*\(([^()]*)\)\s*")


def parse_transformation(text: str) -> tuple[tuple[str, ...], list[float], list[float]]:
    """Names and parameter ranges from text: ``N(v)`` means [-v, v], ``N(a,b)`` means [a, b], ``T(v,w)`` both axes.

    Returns:
        (names, lower, upper), the bounds one per parameter.

    Raises:
        SpecError: empty or malformed text, an unknown name, a wrong number of values, a value that is no
            finite number, a negative half-width, a reversed range, Sc below -99.9.

    >>> parse_transformation("R(5,10) T(2,1)")
    (('R', 'T'), [5.0, -2.0, -1.0], [10.0, 2.0, 1.0])
    """
    names: list[str] = []
    lower: list[float] = []
    upper: list[float] = []
    position = 0
    while text[position:].strip():
        term = _TERM.match(text, position)
        if term is None:
            raise SpecError(f"transformation {text!r}: cannot read {text[position:].strip()!r}; allowed: {_ALLOWED}")
        name, body = term.groups()
        for low, high in _ranges(text, name, body):
            lower.append(low)
            upper.append(high)
        names.append(name)
        position = term.end()
    if not names:
        raise SpecError(f"transformation {text!r} is empty; allowed: {_ALLOWED}")
    return tuple(names), lower, upper


def _ranges(text: str, name: str, body: str) -> list[tuple[float, float]]:
    """One range per parameter of ``name(body)``."""
    if name not in _COLUMNS:
        raise SpecError(f"transformation {text!r}: unknown name {name!r}; allowed: {_ALLOWED}")
    try:
        numbers = [float(part) for part in body.split(",")]
    except ValueError as error:
        raise SpecError(f"transformation {text!r}: {name}({body}) needs numbers; allowed: {_ALLOWED}") from error
    if not all(math.isfinite(number) for number in numbers):
        raise SpecError(f"transformation {text!r}: {name}({body}) must be finite; allowed: {_ALLOWED}")
    wanted = (2,) if name == "T" else (1, 2)
    if len(numbers) not in wanted:
        form = "T(right,up), two half-widths" if name == "T" else f"{name}(half-width) or {name}(lowest,highest)"
        raise SpecError(f"transformation {text!r}: {name}({body}) must be {form}; allowed: {_ALLOWED}")
    if name != "T" and len(numbers) == 2:
        ranges = [(numbers[0], numbers[1])]
    else:
        ranges = [(0.0 - number, number) for number in numbers]
    if any(low > high for low, high in ranges):
        raise SpecError(
            f"transformation {text!r}: {name}({body}) is reversed; give a half-width >= 0, or lowest <= highest"
        )
    if name == "Sc" and ranges[0][0] < _LOWEST_SCALE:
        raise SpecError(f"transformation {text!r}: Sc must stay at or above {_LOWEST_SCALE} percent")
    return ranges
