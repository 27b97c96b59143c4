"""How much memory a bound method needs at worst, from the shapes of a BoundedModule's nodes alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from auto_LiRPA import BoundedModule

from cure_plugin.bounds.operators import is_elementwise, moves, optimisable
from cure_plugin.sets.rows import pair

_CROWN_COPIES, _COUPLED_COPIES, _ALPHA_COPIES = 14, 16, 8
"""Copies of the rows, measured on small nets whose neurons are all unstable, what malloc wastes included."""

_ALPHA_COPIES_OF_MAPS = 20
"""The same for alpha-CROWN of nets with convolutions: 8 to 12 where strides shrink maps, up to 30 where none do."""

_ELEMENTWISE = ("BoundRelu", "BoundBatchNormalization", "BoundAdd", "BoundSub", "BoundMul", "BoundDiv", "BoundNeg")

Window = tuple[int, int] | None
"""Height and width that one row of coefficients reaches in every channel; None: all of it."""


def default_memory(device: torch.device) -> float:
    """GiB that a bound computation on ``device`` may take: 2, and half of what is free on a GPU."""
    return torch.cuda.mem_get_info(device)[0] / 2**31 if device.type == "cuda" else 2.0


def crown_bytes(bounded: BoundedModule, itemsize: int) -> int:
    """Upper estimate of what CROWN allocates per image where every neuron is unstable.

    It holds the rows of one layer over another at a time.

    Args:
        itemsize: bytes of a number.
    """
    return _CROWN_COPIES * max(max(products) for products in _rows(bounded).values()) * itemsize


def crown_rows(bounded: BoundedModule, itemsize: int, limit: int) -> dict[str, int]:
    """How many neurons of every node that is bounded backward CROWN can bound at a time within ``limit`` bytes."""
    sizes = {node.name: math.prod(node.output_shape[1:]) for node in bounded.children()}
    widest = {name: max(products) // sizes[name] for name, products in _rows(bounded).items()}
    return {name: max(1, limit // (_CROWN_COPIES * count * itemsize)) for name, count in widest.items()}


def coupled_bytes(bounded: BoundedModule, itemsize: int) -> dict[str, int]:
    """The same for coupled bounds of each node, by name: they hold its rows over all nodes before, for gradients."""
    return {name: _COUPLED_COPIES * sum(products) * itemsize for name, products in _rows(bounded).items()}


def alpha_crown_bytes(bounded: BoundedModule, itemsize: int) -> int:
    """The same for alpha-CROWN, which holds all rows; CROWN's where that takes its place."""
    if not optimisable(bounded):
        return crown_bytes(bounded, itemsize)
    maps = any(type(node).__name__ == "BoundConv" for node in bounded.children())
    return (_ALPHA_COPIES_OF_MAPS if maps else _ALPHA_COPIES) * coefficients(bounded) * itemsize


def coefficients(bounded: BoundedModule) -> int:
    """Coefficients of CROWN's rows per image, where every neuron is unstable."""
    return sum(sum(products) for products in _rows(bounded).values())


def _rows(bounded: BoundedModule) -> dict[str, list[int]]:
    """For every node that is bounded backward, by name: the number of coefficients over each node below it."""
    found = {}
    for start in _starts(bounded):
        windows = len(start.output_shape) == 4 and bounded.bound_opts.get("conv_mode") != "matrix"
        columns = _columns(start, (1, 1) if windows else None)
        found[start.name] = [math.prod(start.output_shape[1:]) * count for count in columns.values()]
    return found


def _starts(bounded: BoundedModule) -> list[Any]:
    """Nodes that are bounded backward: what relaxations ask for, where intervals do not answer, and the logits."""
    asked = {
        node.inputs[number].name: node.inputs[number]
        for node in bounded.children()
        for number in getattr(node, "requires_input_bounds", [])
        if moves(node.inputs[number])
    }
    return [*(one for one in asked.values() if not _has_intervals(one)), bounded.final_node()]


def _has_intervals(node: Any) -> bool:
    """The input, what a ReLU makes of bounds already known, and a layer next to the input."""
    if type(node).__name__ in ("BoundConv", "BoundLinear"):
        return type(node.inputs[0]).__name__ == "BoundInput"
    return type(node).__name__ in ("BoundInput", "BoundRelu")


def _columns(start: Any, window: Window) -> dict[str, int]:
    """Coefficients of one row of ``start`` over it and every node below, by name."""
    columns: dict[str, int] = {}
    seen: set[tuple[str, Window]] = set()
    pending = [(start, window)]
    while pending:
        node, window = pending.pop()
        if (node.name, window) in seen or not moves(node):
            continue
        seen.add((node.name, window))
        shape = node.output_shape[1:]
        count = math.prod(shape)
        if window is not None and len(shape) == 3:
            count = min(count, shape[0] * window[0] * window[1])
        if not is_elementwise(node):  # its rows are those above, scaled
            columns[node.name] = max(count, columns.get(node.name, 0))
        pending += [(parent, _below(node, window)) for parent in node.inputs]
    return columns


def _below(node: Any, window: Window) -> Window:
    """The window that reaches the inputs of ``node``; None: everything."""
    kind = type(node).__name__
    if window is None or kind in _ELEMENTWISE:
        return window
    if kind != "BoundConv":
        return None
    kernel, strides, dilations = node.inputs[1].output_shape[2:], pair(node.stride), pair(node.dilation)
    sides = zip(window, kernel, strides, dilations, strict=True)
    height, width = ((size - 1) * stride + (side - 1) * dilation + 1 for size, side, stride, dilation in sides)
    return height, width
