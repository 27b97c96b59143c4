"""The transformation itself: an image warped exactly, at given parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cure_plugin.sets.geometric.parameters import Step, check_parameters, check_shapes, steps_of


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
    check_parameters(image, names, parameters)
    return transformed(image, names, parameters)


def transformed(image: Tensor, names: Sequence[str], parameters: Tensor) -> Tensor:
    """:func:`transform` by parameters that are known to make one: to read them would wait for the device."""
    check_shapes(image, names, parameters)
    batch, channels, height, width = image.shape
    exact = parameters.to(dtype=torch.float64, device=image.device)
    x, y = pixel_coordinates(height, width, image.device)
    x, y = x.expand(batch, height, width), y.expand(batch, height, width)
    for step in reversed(steps_of(names)):
        x, y = _inverse_point(step, x, y, exact)
    column, right = padded_cell(x + (width + 1) / 2, width)
    row, down = padded_cell((height + 1) / 2 - y, height)
    pixels = torch.nn.functional.pad(image, (1, 1, 1, 1)).flatten(2)
    right, down = right.to(image.dtype).unsqueeze(1), down.to(image.dtype).unsqueeze(1)
    result = torch.zeros_like(image)
    for below, vertical in ((0, 1 - down), (1, down)):
        for beside, horizontal in ((0, 1 - right), (1, right)):
            index = (row + below) * (width + 2) + column + beside
            corner = pixels.gather(2, index.view(batch, 1, -1).expand(batch, channels, -1))
            result = result + vertical * horizontal * corner.view_as(image)
    for step in steps_of(names):
        value = per_pixel(exact[:, step.column]).to(image.dtype)
        if step.name == "C":
            result = result * (1 + value / 100)
        elif step.name == "B":
            result = result + value
    return result


def _inverse_point(step: Step, x: Tensor, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
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


def pixel_coordinates(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centred (x, y) of the pixels, shapes (W,) and (H, 1), float64."""
    x = torch.arange(width, dtype=torch.float64, device=device) - (width - 1) / 2
    y = (height - 1) / 2 - torch.arange(height, dtype=torch.float64, device=device)
    return x, y.unsqueeze(1)


def padded_cell(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(cell, position in the cell) of a coordinate in an axis of ``size`` pixels that a ring of zeros pads.

    The interpolant vanishes on and beyond the ring, so clamping to the ring does not change it.
    """
    inside = coordinate.clamp(0, size + 1)
    cell = inside.detach().floor().clamp(max=size)
    return cell.long(), inside - cell


def per_pixel(value: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return value.view(-1, 1, 1, 1)
