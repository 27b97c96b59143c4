"""Where the source points of the pixels lie, over a box of parameters.

A source coordinate is affine in each of 1/(1 + s/100), the shear, the shifts and one (cos, sin) pair
while the others are fixed. So its range over a box of parameters is attained at a vertex of all but one
rotation, and over the angle of that one rotation it is a sinusoid, whose range has a closed form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cure_plugin.sets.geometric.parameters import Step
from cure_plugin.sets.geometric.transforms import per_pixel, pixel_coordinates

_COORDINATE_SLACK = 1e-6
"""Outward widening of source coordinates, in pixels per 1 + |coordinate|; float64 errs by some 1e-14."""

_ANGLE_SLACK = 1e-9
"""Radians by which an extremum may lie outside an angle interval and still count as inside."""

_Form = Tensor
"""(B, 2, 3, 3): per source coordinate (x, y), the coefficients of (cos t, sin t, 1), each affine in (x, y, 1)."""


def source_boxes(steps: list[Step], lower: Tensor, upper: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(low, high) of the source x and y of every output pixel, each (B, 2, H, W), widened outward."""
    rotations = [step for step in steps if step.name == "R"]
    rotation = rotations[-1] if rotations else None
    x, y = pixel_coordinates(height, width, lower.device)
    basis = torch.stack([x.expand(height, width), y.expand(height, width), torch.ones_like(x + y)])
    low = torch.full((lower.shape[0], 2, height, width), math.inf, dtype=lower.dtype, device=lower.device)
    high = -low
    for form in _source_forms(steps, rotation, lower, upper):
        cosine, sine, constant = torch.einsum("bukc,chw->kbuhw", form, basis)
        if rotation is None:
            start = stop = constant
        else:
            angles = _radians(lower[:, rotation.column], upper[:, rotation.column])
            start, stop = sinusoid_range(cosine, sine, *(per_pixel(angle) for angle in angles))
            start, stop = start + constant, stop + constant
        low, high = torch.minimum(low, start), torch.maximum(high, stop)
    return low - _COORDINATE_SLACK * (1 + low.abs()), high + _COORDINATE_SLACK * (1 + high.abs())


def _source_forms(steps: list[Step], rotation: Step | None, lower: Tensor, upper: Tensor) -> Iterator[_Form]:
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
    return lambda form: form * per_pixel(inverse)


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
