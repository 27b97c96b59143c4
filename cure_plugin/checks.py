"""Numbers checked where they are given: what is refused is named, with its value and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from cure_plugin.errors import SpecError


def is_number(value: Any) -> bool:
    """Whether ``value`` is one real number, of Python or NumPy."""
    return isinstance(value, Real)


def check_number(name: str, value: Any, highest: float = math.inf, zero: bool = True) -> None:
    """Refuse all but finite numbers of at least 0.

    Args:
        name: what to call it in the message.
        highest: the largest that is allowed.
        zero: whether 0 is allowed.

    Raises:
        SpecError: NaN, infinite, outside that range, or no number.
    """
    if is_number(value):
        number = float(value)
        if math.isfinite(number) and 0 <= number <= highest and (zero or number > 0):
            return
    allowed = f"be finite and {'>=' if zero else '>'} 0"
    if highest < math.inf:
        allowed = f"lie in {'[' if zero else '('}0, {highest:g}]"
    raise SpecError(f"{name} must {allowed}, got {value!r}")


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Refuse all but whole numbers of at least ``least``.

    Raises:
        SpecError: NaN, infinite, not whole, or below.
    """
    if not isinstance(value, Integral) or value < least:
        raise SpecError(f"{name} must be at least {least} and whole, got {value!r}")


def _shown(value: Any) -> str:
    """``value`` in a line that is not long."""
    return " ".join(repr(value).split())[:80]


def check_type(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Refuse what is no ``kind``.

    Args:
        wanted: what it should be, in words.

    Raises:
        SpecError: something else.
    """
    if not isinstance(value, kind):
        raise SpecError(f"{name} must be {wanted}, got {_shown(value)}")


def check_shape(name: str, value: Any) -> tuple[int, ...]:
    """``value`` as a shape without the batch axis.

    Raises:
        SpecError: no whole numbers of at least 1, such as (1, 28, 28).
    """
    sizes = tuple(value) if isinstance(value, tuple | list) else ()
    if not sizes or not all(isinstance(size, Integral) and int(size) >= 1 for size in sizes):
        raise SpecError(f"{name} must be whole numbers without the batch axis, as (1, 28, 28), got {_shown(value)}")
    return tuple(map(int, sizes))


def as_numbers(name: str, value: Any, **kind: Any) -> Tensor:
    """``value`` as a tensor.

    Args:
        kind: of ``torch.as_tensor``.

    Raises:
        SpecError: no numbers.
    """
    try:
        return torch.as_tensor(value, **kind)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"{name} must be numbers or a tensor of them, got {_shown(value)}") from error
