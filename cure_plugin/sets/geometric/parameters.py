"""The names of transformations, their parameters checked, and their text form."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cure_plugin.errors import SpecError

_COLUMNS = {"R": ("R",), "T": ("Tx", "Ty"), "Sc": ("Sc",), "Sh": ("Sh",), "C": ("C",), "B": ("B",)}
"""Name -> its parameters."""

_VALUE_NAMES = ("C", "B")
"""The names that act on pixel values; the others act on coordinates."""

_LOWEST_SCALE = -99.9
"""Percent. At -100 the image shrinks to a point and the inverse does not exist."""

_ALLOWED = "names R, T, Sc, Sh, C, B, as in 'R(10)', 'R(5,10)' or 'Sc(1) T(2,2) B(0.01)'"

_TERM = re.compile(r"\s*([A-Za-z]+)\s*\(([^()]*)\)\s*")


@dataclass(frozen=True)
class Step:
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


def steps_of(names: Sequence[str]) -> list[Step]:
    """The steps of a composition in listed order."""
    widths = [len(_COLUMNS[name]) for name in names]
    return [Step(name, sum(widths[:position])) for position, name in enumerate(names)]


def check_shapes(image: Tensor, names: Sequence[str], *parameters: Tensor) -> None:
    """Refuse parameters that do not fit the image and the names."""
    columns = parameter_names(names)
    if image.ndim != 4 or not image.is_floating_point():
        raise SpecError(f"image must be (B, C, H, W) and floating point, got {tuple(image.shape)} {image.dtype}")
    shape = (image.shape[0], len(columns))
    for value in parameters:
        if tuple(value.shape) != shape:
            raise SpecError(f"parameters of {' '.join(names)} must be {shape}, (B, D), got {tuple(value.shape)}")


def check_parameters(image: Tensor, names: Sequence[str], *parameters: Tensor) -> None:
    """Refuse parameters that do not fit the image and the names, or make no transformation."""
    check_shapes(image, names, *parameters)
    scales = [index for index, column in enumerate(parameter_names(names)) if column == "Sc"]
    for value in parameters:
        if not bool(torch.isfinite(value).all()):
            raise SpecError(f"parameters of {' '.join(names)} must be finite")
        if bool((value[:, scales] < _LOWEST_SCALE).any()):
            raise SpecError(f"scaling Sc must be at least {_LOWEST_SCALE} percent, got {value[:, scales].min():g}")


def checked_box(
    image: Tensor, names: Sequence[str], lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """(lower, upper) in float64, and the columns of the spatial and of the pixel-value parameters."""
    check_parameters(image, names, lower, upper)
    if bool((lower > upper).any()):
        raise SpecError(f"parameter box of {' '.join(names)} is empty: a lower bound exceeds its upper bound")
    spatial = [index for index, column in enumerate(parameter_names(names)) if column not in _VALUE_NAMES]
    values = [index for index, column in enumerate(parameter_names(names)) if column in _VALUE_NAMES]
    start, stop = (end.detach().to(dtype=torch.float64, device=image.device) for end in (lower, upper))
    return start, stop, spatial, values


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
