"""Numbers as VNNLIB files want them: fixed point, always with a dot, rounded to the side that keeps a file sound."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext

import numpy as np

_DIGITS = Decimal(1).scaleb(-12)
"""Digits after the point."""

RESOLUTION = 1e-12
"""How far :func:`rounded_down` and :func:`rounded_up` may move a number."""


def rounded_down(value: float) -> str:
    """The largest number of twelve decimals that is not above ``value``."""
    return _text(value, ROUND_FLOOR)


def rounded_up(value: float) -> str:
    """The smallest number of twelve decimals that is not below ``value``."""
    return _text(value, ROUND_CEILING)


def _text(value: float, rounding: str) -> str:
    with localcontext(Context(prec=400)):
        text = format(Decimal(float(value)).quantize(_DIGITS, rounding=rounding), "f").rstrip("0")
    return text + "0" if text.endswith(".") else text


def float32_below(values: np.ndarray) -> np.ndarray:
    """The nearest float32 numbers that are not above ``values``, as float64."""
    return _float32(values, -np.inf)


def float32_above(values: np.ndarray) -> np.ndarray:
    """The nearest float32 numbers that are not below ``values``, as float64."""
    return _float32(values, np.inf)


def _float32(values: np.ndarray, towards: float) -> np.ndarray:
    exact = np.asarray(values, dtype=np.float64)
    rounded = exact.astype(np.float32)
    inside = rounded > exact if towards < 0 else rounded < exact
    return np.where(inside, np.nextafter(rounded, np.float32(towards)), rounded).astype(np.float64)
