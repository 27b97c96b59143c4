"""How far the values at a node can move in all: l1 and l2 radii through a BoundedModule's graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cure_plugin.bounds.elementwise import constant, unscaled
from cure_plugin.bounds.margins import NodeBox
from cure_plugin.bounds.norms import column_norms, convolution_norm, matrix_norm
from cure_plugin.bounds.operators import is_elementwise, moves
from cure_plugin.sets.rows import Pair, pair

Norms = tuple[float, float, float]
"""Spectral norm, largest column l1 norm, largest column l2 norm."""

STEEPEST: dict[str, Callable[[Any], float]] = {
    "BoundRelu": lambda node: 1.0,
    "BoundLeakyRelu": lambda node: max(1.0, abs(float(getattr(node, "leaky_alpha", node.alpha)))),  # 0.7.1, 0.3
    "BoundTanh": lambda node: 1.0,
    "BoundSigmoid": lambda node: 0.25,
}
"""Steepest slopes of activations."""

_ROUNDED_UP = 1 + 1e-6
"""Relative widening of norms computed in the net's own precision."""


@dataclass(frozen=True)
class Radius:
    """Upper bounds of ||v - v(clean)|| over the set, per sample; infinite where unknown.

    Attributes:
        l1, l2: (B,) each.
    """

    l1: Tensor
    l2: Tensor

    def plus(self, other: Radius) -> Radius:
        return Radius(self.l1 + other.l1, self.l2 + other.l2)


class GraphRadii:
    """Radii of every node that linear layers, normalisation, sums and ReLUs separate from the input.

    The norms of a layer are computed once and again when its weights have changed.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[list[Tensor], Norms]] = {}

    def at(self, node: Any, start: Radius, boxes: dict[str, NodeBox], clean: dict[str, Tensor]) -> Radius:
        """Radius at ``node``.

        Args:
            start: radius of the input. boxes: bounds (lower, upper) of ReLU inputs by name. clean: values there.
        """
        known: dict[str, Radius] = {}

        def radius(one: Any) -> Radius:
            if is_elementwise(one):
                below, scale = unscaled(one, start.l2.double())
                factor = float(scale.abs().max()) * _ROUNDED_UP
                known[one.name] = Radius(_scaled(radius(below).l1, factor), _scaled(radius(below).l2, factor))
            elif one.name not in known:
                base = _normalised(one) or one
                below = [radius(parent) for parent in base.inputs if moves(parent)]
                known[one.name] = self._through(one, base, below, start, boxes, clean)
            return known[one.name]

        return radius(node)

    def _through(
        self,
        node: Any,
        base: Any,
        below: list[Radius],
        start: Radius,
        boxes: dict[str, NodeBox],
        clean: dict[str, Tensor],
    ) -> Radius:
        """Radius behind ``node`` from those of the moving inputs of ``base``: the node, or what it normalises."""
        kind, sources = type(node).__name__, [parent for parent in base.inputs if moves(parent)]
        if kind == "BoundInput":
            return start
        unknown = torch.full_like(start.l2, torch.inf)
        if not sources:
            return Radius(torch.zeros_like(unknown), torch.zeros_like(unknown))
        if kind in ("BoundAdd", "BoundSub"):
            # a smaller summand is copied, which lengthens what moves in it
            same = all(_entries(parent) == _entries(node) for parent in sources)
            return functools.reduce(Radius.plus, below) if same else Radius(unknown, unknown)
        if len(below) == 1 and sources[0] is base.inputs[0]:
            if kind in ("BoundFlatten", "BoundReshape", "BoundUnsqueeze", "BoundSqueeze"):
                return below[0]
            if kind == "BoundRelu":
                return self._through_relu(node, below[0], boxes, clean)
            if kind in STEEPEST:
                factor = STEEPEST[kind](node) * _ROUNDED_UP
                return Radius(_scaled(below[0].l1, factor), _scaled(below[0].l2, factor))
            norms = self._layer_norms(node)
            if norms is not None:
                spectral, column_l1, column_l2 = norms
                by_l2, by_l1 = _scaled(below[0].l2, spectral), _scaled(below[0].l1, column_l2)
                return Radius(_scaled(below[0].l1, column_l1), torch.minimum(by_l2, by_l1))
        return Radius(unknown, unknown)

    def apart(self, node: Any, start: Radius) -> Tensor:
        """How far z_j - z_y can move at ``node`` of the logits, (B, C, C): its rows' distances times the radius below.

        The layers' norms alone count, which training can aim at (Tsuzuku et al. 2018; Leino et al. 2021).
        """
        matrix = _linear_weight(node) if type(node).__name__ == "BoundLinear" else None
        if matrix is None or not moves(node.inputs[0]):
            return torch.full((len(start.l2), *[int(node.output_shape[-1])] * 2), torch.inf).to(start.l2)
        below = self.at(node.inputs[0], start, {}, {})
        rows = matrix[:, None] - matrix[None]
        by_l2, by_l1 = (
            _scaled(radius.double()[:, None, None], norm * _ROUNDED_UP)
            for radius, norm in ((below.l2, rows.norm(dim=2)), (below.l1, rows.abs().amax(2)))
        )
        return torch.minimum(by_l2, by_l1)

    def reach(self, node: Any, start: Radius, boxes: dict[str, NodeBox], clean: dict[str, Tensor]) -> Tensor:
        """How far each single value at a linear ``node`` can move: its row's dual norm times the radius below.

        Returns:
            Broadcastable to (B, *shape); infinite where the kind of node is unknown.
        """
        kind = type(node).__name__
        sources = [parent for parent in node.inputs if moves(parent)]
        if is_elementwise(node):
            below, scale = unscaled(node, start.l2.double())
            return _scaled(self.reach(below, start, boxes, clean), (scale.abs() * _ROUNDED_UP).to(start.l2))
        if kind in ("BoundAdd", "BoundSub"):
            return functools.reduce(torch.add, [self.reach(parent, start, boxes, clean) for parent in sources])
        shape = (-1, *[1] * (len(node.output_shape) - 1))
        if len(sources) == 1 and kind == "BoundBatchNormalization":
            scale = _normalisation_scale(node).to(start.l2)
            return _scaled(self.reach(sources[0], start, boxes, clean), scale.view(1, -1, *shape[2:]))
        if len(sources) != 1 or sources[0] is not node.inputs[0] or kind not in ("BoundConv", "BoundLinear"):
            return torch.full_like(start.l2, torch.inf).view(shape)
        weight = _constants(node)[0] if kind == "BoundConv" else _linear_weight(node)
        if weight is None or (kind == "BoundLinear" and len(node.output_shape) != 2):
            return torch.full_like(start.l2, torch.inf).view(shape)
        rows = weight.flatten(1).to(start.l2)
        below = self.at(sources[0], start, boxes, clean)
        by_l2 = _scaled(below.l2.unsqueeze(1), rows.norm(dim=1))
        by_l1 = _scaled(below.l1.unsqueeze(1), rows.abs().amax(1))
        return torch.minimum(by_l2, by_l1).view(len(start.l2), -1, *shape[2:]) * _ROUNDED_UP

    def _through_relu(self, node: Any, below: Radius, boxes: dict[str, NodeBox], clean: dict[str, Tensor]) -> Radius:
        """A ReLU moves no value further than its input, and none outside the ReLU of its bounds."""
        name = node.inputs[0].name
        if name not in boxes:
            return below
        lower, upper = (end.clamp(min=0).flatten(1) for end in boxes[name])
        value = clean[name].clamp(min=0).flatten(1)
        reach = torch.maximum(value - lower, upper - value)
        return Radius(torch.minimum(below.l1, reach.sum(1)), torch.minimum(below.l2, reach.norm(dim=1)))

    def _layer_norms(self, node: Any) -> Norms | None:
        """Norms of a linear node, kept until its constants change; None where unknown."""
        base = _normalised(node)
        constants = [*_constants(node), torch.tensor(node.inputs[0].output_shape[1:])]
        constants += _constants(base) if base else []
        known = self._known.get(node.name)
        if known is None or not all(_same(*pair) for pair in zip(known[0], constants, strict=True)):
            norms = _norms_of(node)
            if norms is None:
                return None
            known = self._known[node.name] = [constant.detach().clone() for constant in constants], norms
        return known[1]


def _entries(node: Any) -> int:
    """Entries per sample of what a node computes."""
    return math.prod(node.output_shape[1:])


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _scaled(radius: Tensor, factor: Tensor | float) -> Tensor:
    """``radius * factor``; an unknown (infinite) radius stays unknown even times 0."""
    return torch.nan_to_num(radius * factor, nan=torch.inf, posinf=torch.inf)


def _constants(node: Any) -> list[Tensor]:
    return [constant(parent) for parent in node.inputs[1:]]


def _linear_weight(node: Any) -> Tensor | None:
    """The matrix (outputs, inputs) of a fully connected node, float64; None where it is no plain one."""
    weight = _constants(node)[0]
    if node.transA or weight.ndim != 2:
        return None
    factor = float(getattr(node, "alpha_linear", getattr(node, "alpha", 1.0)))
    return (weight if node.transB else weight.T).detach().double() * factor


def _normalisation_scale(node: Any) -> Tensor:
    """What batch normalisation multiplies each channel's distances by, float64, rounded outward."""
    weight, _, _, variance = (constant.detach().double() for constant in _constants(node)[:4])
    return (weight / (variance + node.eps).sqrt()).abs() * _ROUNDED_UP


def _normalised(node: Any) -> Any:
    """The convolution or matrix that a batch normalisation follows: one linear layer with it; None elsewhere."""
    inner = node.inputs[0] if type(node).__name__ == "BoundBatchNormalization" else None
    if type(inner).__name__ == "BoundConv" and _constants(inner)[0].ndim == 4:
        return inner
    return inner if type(inner).__name__ == "BoundLinear" and _linear_weight(inner) is not None else None


def _convolution_norms(weight: Tensor, geometry: list[Pair], node: Any) -> Norms:
    """Of ungrouped ``weight``; geometry: stride, padding, dilation. ``node``: whose input it runs over."""
    stride, padding, dilation = geometry
    size = pair(node.inputs[0].output_shape[2:])
    return (convolution_norm(weight, stride, padding, dilation, size), *column_norms(weight, stride, dilation))


def _norms_of(node: Any) -> Norms | None:
    base = _normalised(node)
    scale: Tensor | None = None
    if base is not None:
        node, scale = base, _normalisation_scale(node)
    kind = type(node).__name__
    if kind == "BoundConv":
        weight = _constants(node)[0]
        if weight.ndim != 4:
            return None
        weight = weight.detach().double()
        if scale is not None:
            weight = weight * scale.view(-1, 1, 1, 1)
        geometry = [pair(value) for value in (node.stride, node.padding, node.dilation)]
        # each group has channels of its own
        groups = [_convolution_norms(part, geometry, node) for part in weight.chunk(node.groups)]
        spectral, column_l1, column_l2 = (max(norms) for norms in zip(*groups, strict=True))
        return spectral, column_l1, column_l2
    if kind == "BoundAveragePool":
        kernel, stride, padding = (pair(value) for value in (node.kernel_size, node.stride, node.padding))
        if len(node.output_shape) != 4 or padding != (0, 0) or node.ceil_mode:
            return None
        return _convolution_norms(torch.full((1, 1, *kernel), 1 / math.prod(kernel)), [stride, padding, (1, 1)], node)
    if kind == "BoundLinear":
        matrix = _linear_weight(node)
        if matrix is None:
            return None
        if scale is not None:
            matrix = matrix * scale.view(-1, 1)
        return matrix_norm(matrix), float(matrix.abs().sum(0).max()), float(matrix.norm(dim=0).max())
    if kind == "BoundBatchNormalization":
        largest = float(_normalisation_scale(node).max())
        return largest, largest, largest
    return None
