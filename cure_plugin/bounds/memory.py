"""How much memory a bound method needs at worst, from the shapes of a BoundedModule's nodes alone."""

from __future__ import annotations

import math
from typing import Any

from auto_LiRPA import BoundedModule

from cure_plugin.sets.rows import pair

_COPIES = {"CROWN": 14, "coupled": 16, "alpha-CROWN": 8}
"""Copies of the rows, measured on small nets whose neurons are all unstable, what malloc wastes included."""

_NO_ROWS = ("BoundParams", "BoundBuffers", "BoundConstant")


def bytes_per_image(bounded: BoundedModule, method: str, itemsize: int) -> int:
    """Upper estimate of what ``method`` allocates per image, where every neuron is unstable; 0 for box methods.

    CROWN holds the rows of one layer over another at a time, coupling those of one layer over all before
    it (for gradients), alpha-CROWN all of them.

    Args:
        itemsize: bytes of a number.
    """
    rows = _rows(bounded)
    largest = {
        "CROWN": max(max(products) for products in rows),
        "coupled": max(sum(products) for products in rows),
        "alpha-CROWN": sum(sum(products) for products in rows),
    }
    return _COPIES.get(method, 0) * largest.get(method, 0) * itemsize


def _rows(bounded: BoundedModule) -> list[list[int]]:
    """For every node that is bounded backward: the number of coefficients over each node below it."""
    found = []
    for start in [*(relu.inputs[0] for relu in bounded.relus), bounded.final_node()]:
        columns: dict[str, int] = {}
        _walk(start, (1, 1) if len(start.output_shape) == 4 else None, columns)
        found.append([math.prod(start.output_shape[1:]) * count for count in columns.values()])
    return found


def _walk(node: Any, window: tuple[int, int] | None, columns: dict[str, int]) -> None:
    """Coefficients of one row over ``node`` and all below: a ``window`` per channel, or everything for None."""
    if type(node).__name__ in _NO_ROWS:
        return
    shape = node.output_shape[1:]
    count = math.prod(shape)
    if window is not None and len(shape) == 3:
        count = min(count, shape[0] * window[0] * window[1])
    columns[node.name] = max(count, columns.get(node.name, 0))
    below = _below(node, window)
    for parent in node.inputs:
        _walk(parent, below, columns)


def _below(node: Any, window: tuple[int, int] | None) -> tuple[int, int] | None:
    """The window that reaches the inputs of ``node``."""
    kind = type(node).__name__
    if window is None or kind in ("BoundLinear", "BoundMatMul", "BoundFlatten", "BoundReshape"):
        return None
    if kind != "BoundConv":
        return window
    kernel, strides, dilations = node.inputs[1].output_shape[2:], pair(node.stride), pair(node.dilation)
    sides = zip(window, kernel, strides, dilations, strict=True)
    height, width = ((size - 1) * stride + (side - 1) * dilation + 1 for size, side, stride, dilation in sides)
    return height, width
