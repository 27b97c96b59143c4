"""Numbers checked where they are given: what is refused is named, with its value and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from cure_plugin.errors import SpecError


def check_number(name: str, value: Any, highest: float = math.inf, zero: bool = True) -> None:
    """Refuse all but finite numbers of at least 0.

    Args:
        name: what to call it in the message.
        highest: the largest that is allowed.
        zero: whether 0 is allowed.

    Raises:
        SpecError: NaN, infinite, outside that range, or no number.
    """
    if isinstance(value, Real):
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
