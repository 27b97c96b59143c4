"""Operators that slide windows over maps, and padding: converters for :mod:`cure_plugin.export.onnx_operators`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cure_plugin.export.onnx_builder import Node, Refused, Value
from cure_plugin.export.onnx_layers import Reduce, Take


@dataclass(frozen=True)
class _Window:
    """Geometry of a node, a number per spatial axis; pads are resolved."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def even(self) -> bool:
        """Whether both sides are padded alike."""
        return self.begin == self.end


def _maps(node: Node) -> Value:
    """The node's input, a batch of one sample (1, C, ...)."""
    value = node.moving(0)
    if len(value.shape) < 3 or not value.batched:
        raise Refused(f"takes one sample's maps (1, C, ...), got shape {value.shape}")
    return value


def _window(node: Node, value: Value, kernel: tuple[int, ...]) -> _Window:
    axes, sizes = len(kernel), value.shape[2:]
    if axes != len(sizes) or axes not in _CONVOLUTIONS:
        raise Refused(f"has a window {kernel} for an input of shape {value.shape}")
    strides, dilations = (tuple(map(int, node.attributes.get(name, [1] * axes))) for name in ("strides", "dilations"))
    pads = tuple(map(int, node.attributes.get("pads", [0] * 2 * axes)))
    if (len(strides), len(dilations), len(pads)) != (axes, axes, 2 * axes) or min(*strides, *dilations, *kernel) < 1:
        raise Refused(f"has strides {strides}, dilations {dilations} and pads {pads} for a window {kernel}")
    kind = node.attributes.get("auto_pad", b"NOTSET").decode()
    if kind == "VALID":
        pads = (0,) * 2 * axes
    elif kind in ("SAME_UPPER", "SAME_LOWER"):
        needed = [
            max((-(-size // step) - 1) * step + (side - 1) * wide + 1 - size, 0)
            for size, step, side, wide in zip(sizes, strides, kernel, dilations, strict=True)
        ]
        halves = tuple(total // 2 for total in needed), tuple(-(-total // 2) for total in needed)
        pads = (*halves[0], *halves[1]) if kind == "SAME_UPPER" else (*halves[1], *halves[0])
    elif kind != "NOTSET":
        raise Refused(f"has auto_pad {kind}")
    if min(pads) < 0:
        raise Refused(f"has pads {pads}")
    return _Window(kernel, strides, dilations, pads[:axes], pads[axes:])


_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAXIMA: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEANS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_PADS: dict[int, Any] = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}


def _padded(node: Node, value: Value, begin: tuple[int, ...], end: tuple[int, ...], constant: float = 0.0) -> Value:
    """``value`` with entries added (or, below 0, taken away) at both ends of its last axes."""
    if not any((*begin, *end)):
        return value
    if sum(map(max, begin, end)) > _MOST_PADDING:
        raise Refused(f"pads by {begin} and {end}")
    pairs = [amount for ends in zip(reversed(begin), reversed(end), strict=True) for amount in ends]
    return node.record(_PADS[len(begin)](tuple(pairs), constant), value)


_MOST_PADDING = 10_000
"""Entries: more is no net's, and may be no computer's."""


def _conv(node: Node) -> Value:
    value, weight = _maps(node), node.weight(1)
    window, groups = _window(node, value, tuple(weight.shape[2:])), int(node.attributes.get("group", 1))
    if groups < 1 or weight.shape[0] % groups or weight.shape[1] * groups != value.shape[1]:
        raise Refused(f"has weights of shape {tuple(weight.shape)} in {groups} groups for shape {value.shape}")
    bias = None if node.given(2) is None else node.weight(2)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise Refused(f"has unusable weights: a bias of shape {tuple(bias.shape)} for {weight.shape[0]} channels")
    if not window.even:
        value = _padded(node, value, window.begin, window.end)
    layer = nn.utils.skip_init(
        _CONVOLUTIONS[len(window.kernel)],
        weight.shape[1] * groups,
        weight.shape[0],
        window.kernel,
        window.strides,
        window.begin if window.even else 0,
        window.dilations,
        groups,
        bias=bias is not None,
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return node.record(layer, value)


def _conv_transposed(node: Node) -> Value:
    value, weight = _maps(node), node.weight(1)
    window, groups = _window(node, value, tuple(weight.shape[2:])), int(node.attributes.get("group", 1))
    if not window.even or "output_shape" in node.attributes or node.attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise Refused("has pads that differ between sides, or an output shape instead of pads")
    layer = nn.utils.skip_init(
        _TRANSPOSED[len(window.kernel)],
        weight.shape[0],
        weight.shape[1] * groups,
        window.kernel,
        window.strides,
        window.begin,
        tuple(map(int, node.attributes.get("output_padding", [0] * len(window.kernel)))),
        groups,
        bias=node.given(2) is not None,
        dilation=window.dilations,
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if node.given(2) is not None:
            layer.bias.copy_(node.weight(2))
    return node.record(layer, value)


def _max_pool(node: Node) -> Value:
    value = _maps(node)
    window = _window(node, value, tuple(map(int, node.attributes["kernel_shape"])))
    ceil, begin = bool(node.attributes.get("ceil_mode", 0)), window.begin
    if not window.even:
        if ceil or max(window.dilations) > 1 or any(map(operator.ge, map(max, begin, window.end), window.kernel)):
            raise Refused("has pads that differ between sides, with dilations, ceil_mode or pads beyond a window")
        # entries at the edge once more are in every window that reaches past it: they change no maximum
        for axis, (size, before, after) in enumerate(zip(value.shape[2:], begin, window.end, strict=True), 2):
            value = node.record(Take(axis, torch.arange(-before, size + after).clamp(0, size - 1)), value)
        begin = (0,) * len(begin)
    layer = _MAXIMA[len(window.kernel)]
    return node.record(layer(window.kernel, window.strides, begin, window.dilations, ceil_mode=ceil), value)


def _average_pool(node: Node) -> Value:
    value = _maps(node)
    window = _window(node, value, tuple(map(int, node.attributes["kernel_shape"])))
    ceil, counts = bool(node.attributes.get("ceil_mode", 0)), bool(node.attributes.get("count_include_pad", 0))
    if max(window.dilations) > 1:
        raise Refused(f"has dilations {window.dilations}")
    if not window.even and (ceil or not counts):
        raise Refused("has pads that differ between sides, and no count_include_pad to count them")
    begin = window.begin
    if not window.even:
        value, begin = _padded(node, value, window.begin, window.end), (0,) * len(begin)
    return node.record(_MEANS[len(window.kernel)](window.kernel, window.strides, begin, ceil, counts), value)


def _global_average(node: Node) -> Value:
    value = _maps(node)
    if len(value.shape) == 4:
        return node.record(nn.AdaptiveAvgPool2d(1), value)
    return node.record(Reduce(range(2, len(value.shape)), True), value)


def _global_max(node: Node) -> Value:
    value = _maps(node)
    if len(value.shape) - 2 not in _MAXIMA:
        raise Refused(f"takes maps of up to three axes, got shape {value.shape}")
    return node.record(_MAXIMA[len(value.shape) - 2](value.shape[2:]), value)


def _pad(node: Node) -> Value:
    value, mode = node.moving(0), node.attributes.get("mode", b"constant").decode()
    amounts, chosen = node.integers("pads", 1) or [], node.integers("axes", 3)
    rank = len(value.shape)
    axes = list(range(rank)) if chosen is None else [axis % rank for axis in chosen]
    if mode != "constant" or len(amounts) != 2 * len(axes):
        raise Refused(f"pads by {amounts} in mode {mode}; only constants are read")
    constant = node.constant(2)
    fill = float(node.attributes.get("value", 0.0) if constant is None else node.numbers(constant).reshape(()))
    ends = {axis: (amounts[place], amounts[place + len(axes)]) for place, axis in enumerate(axes)}
    padded = [axis for axis in axes if any(ends[axis])]
    if not padded:
        return value
    first = min(padded)
    node.dim(value, first)
    if rank - first not in _PADS:
        raise Refused(f"pads {rank - first} axes; up to three are read")
    begin, end = (tuple(ends.get(axis, (0, 0))[side] for axis in range(first, rank)) for side in (0, 1))
    return _padded(node, value, begin, end, fill)


CONVERTERS: dict[str, Callable[[Node], Value]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transposed,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "Pad": _pad,
}
