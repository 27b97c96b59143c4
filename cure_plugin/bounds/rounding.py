"""How far a bound that floating point computed may lie from the one that real numbers would give.

A sum of n products, in any order, errs by at most ``gamma_n = n u / (1 - n u)`` times the sum of the terms' absolute
values, u being half the distance from 1 to the next number (Higham, Accuracy and Stability of Numerical Algorithms,
2002, Lemma 3.1 and section 3.5). A bound of a net, by intervals or by rows pulled back, is a chain of such sums: it
errs by at most gamma_n times what the net puts out with every weight, bias and input replaced by its absolute value, n
being the number of terms along the chain. Neurons that are inactive over the whole set pass nothing on; what a first
linear layer passes on is what its absolute weights make of the clean input and of the set's radii (of its box, where
bounds are of the box).

In float64 that is what a proof has to clear. In float32 it would be far more than any error ever seen: there it is
``exp(LIKELY sqrt(n) u + n u^2 / (1 - u)) - 1``, which errors exceed with a probability below 2 n exp(-LIKELY^2 / 2),
one in ten thousand million, if single roundings are independent of one another and as often up as down (Higham and
Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019, Theorem 2.4). What lies between 0 and that is
bounded again in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.bounds.elementwise import constant, unscaled
from cure_plugin.bounds.margins import NodeBox
from cure_plugin.bounds.operators import is_elementwise, is_fixed, moves
from cure_plugin.sets import PerturbationSet

_STEPS = 16
"""Operations per entry of a node that are no sums over a layer's inputs: slopes, intercepts, normalisation."""

_CONSTANT = 4
"""The same for each number that the net computes of constants alone: one operation, by a library function at most."""

_HEURISTIC = 2.0**12
"""Units of rounding, relative to the largest value at any node, allowed for where the net has a node without a rule."""

_SAME_SIZE = (
    "BoundAbs",
    "BoundLeakyRelu",
    "BoundNeg",
)
_FORWARD = (
    "BoundAdd",
    "BoundAveragePool",
    "BoundConcat",
    "BoundConv",
    "BoundConvTranspose",
    "BoundDiv",
    "BoundFlatten",
    "BoundGather",
    "BoundGlobalAveragePool",
    "BoundLinear",
    "BoundMatMul",
    "BoundMaxPool",
    "BoundMul",
    "BoundPad",
    "BoundReduceMean",
    "BoundReduceSum",
    "BoundSlice",
    "BoundSqueeze",
    "BoundTranspose",
    "BoundUnsqueeze",
)
"""Of absolute values these compute absolute values of their terms."""


LIKELY = 8.0
"""lambda of the probabilistic analysis."""


def required_margins(
    bounded: BoundedModule, x: Tensor, y: Tensor, perturbation: PerturbationSet, boxes: dict[str, NodeBox]
) -> Tensor:
    """How large lower bounds of z_y - z_j must be to count as positive whatever rounding did, (B,).

    Args:
        bounded: auto_LiRPA's wrapper, in eval mode, after any bound of a batch was computed.
        x: (B, *input) in its dtype; y: (B,).
        boxes: known bounds of the inputs of ReLUs by name; of those that are missing nothing is known.
    """
    with torch.no_grad():
        lower, upper = perturbation.box(x)
        sizes = _sizes(bounded, x, torch.maximum(lower.abs(), upper.abs()), perturbation, boxes)
        if sizes is None:
            values = [getattr(node, "forward_value", None) for node in bounded.children()]
            numbers = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
            largest = max([1.0, *(float(value.abs().max()) for value in numbers if value.numel())])
            return x.new_full((len(x),), _HEURISTIC * _unit(x.dtype) * largest)
        return growth(terms_along(bounded, x), x.dtype) * (sizes.gather(1, y[:, None]).squeeze(1) + sizes.amax(1))


def node_sizes(
    bounded: BoundedModule, x: Tensor, perturbation: PerturbationSet, boxes: dict[str, NodeBox]
) -> dict[str, Tensor] | None:
    """What every node of the net of absolute values puts out over the set, by name, (B, *shape).

    A bound of a node, computed by intervals or rows, errs by at most :func:`growth` of :func:`terms_along` times that.
    None where some node has no rule. Arguments as of :func:`required_margins`.
    """
    with torch.no_grad():
        lower, upper = perturbation.box(x)
        both = _all_sizes(bounded, x, torch.maximum(lower.abs(), upper.abs()), perturbation, boxes)
    return None if both is None else {name: size[: len(x)] for name, size in both.items() if _is_size(size)}


def widened(
    bounded: BoundedModule, x: Tensor, perturbation: PerturbationSet, boxes: dict[str, NodeBox]
) -> dict[str, NodeBox]:
    """``boxes`` of nodes, by name, made to hold whatever rounding did; none where some node has no rule.

    Arguments as of :func:`required_margins`.
    """
    sizes = node_sizes(bounded, x, perturbation, boxes)
    if sizes is None:
        return {}
    factor = growth(terms_along(bounded, x) + _STEPS, x.dtype)  # the widening itself is rounded too
    return {name: (low - factor * sizes[name], high + factor * sizes[name]) for name, (low, high) in boxes.items()}


def _is_size(size: Any) -> bool:
    return isinstance(size, Tensor) and size.ndim > 0


def growth(terms: int, dtype: torch.dtype) -> float:
    """Factor of the terms' absolute values by which a chain of sums of so many ``terms`` may err; see above."""
    unit = _unit(dtype)
    if dtype == torch.float64:
        return terms * unit / (1 - terms * unit) if terms * unit < 1 else math.inf
    return math.expm1(LIKELY * math.sqrt(terms) * unit + terms * unit**2 / (1 - unit))


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def terms_along(bounded: BoundedModule, x: Tensor) -> int:
    """Terms along a chain of sums forth (intervals, values) and back (rows), and over the input."""
    terms = x[0].numel()
    for node in bounded.children():
        if not moves(node):
            terms += _CONSTANT if node.inputs and is_fixed(node) else 0
            continue
        terms += _STEPS
        for part in () if is_elementwise(node) else node.inputs[1:2]:
            weight = None if moves(part) else constant(part)
            if isinstance(weight, Tensor) and weight.ndim >= 2:
                terms += sum(weight.numel() // size for size in weight.shape[:2])
        if type(node).__name__ in ("BoundAveragePool", "BoundGlobalAveragePool", "BoundReduceMean", "BoundReduceSum"):
            terms += math.prod(node.inputs[0].output_shape[1:])
    return terms


def _sizes(
    bounded: BoundedModule, x: Tensor, largest: Tensor, perturbation: PerturbationSet, boxes: dict[str, NodeBox]
) -> Tensor | None:
    """What the net of absolute values puts out over the set, (B, C); None where a node has no rule.

    Args:
        largest: absolute values of the set's box, (B, *input).
    """
    both = _all_sizes(bounded, x, largest, perturbation, boxes)
    return None if both is None else both[bounded.final_node().name][: len(x)]


def _all_sizes(
    bounded: BoundedModule, x: Tensor, largest: Tensor, perturbation: PerturbationSet, boxes: dict[str, NodeBox]
) -> dict[str, Any] | None:
    """The same of every node, over the set and at the clean input, (2 B, *shape)."""
    both: dict[str, Any] = {}  # (2 B, *shape): over the set, and at the clean input
    radii: dict[str, _Radii] = {}
    for node in ordered(bounded.final_node()):
        kind = type(node).__name__
        parts = [both[part.name] for part in node.inputs]
        if kind == "BoundInput":
            both[node.name] = torch.cat([largest, x.abs()])
            if perturbation.within_hull():
                radii[node.name] = _Radii(*perturbation.radii(x))
        elif not moves(node):
            value = constant(node)
            both[node.name] = value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value
        elif kind == "BoundRelu":
            box = boxes.get(node.inputs[0].name)
            both[node.name] = parts[0] if box is None else parts[0] * (torch.cat([box[1], box[1]]) > 0)
        elif kind in _SAME_SIZE:
            both[node.name] = parts[0]
        elif kind in ("BoundSigmoid", "BoundTanh"):
            both[node.name] = parts[0] + 1
        elif kind == "BoundSub":
            both[node.name] = parts[0] + parts[1]
        elif kind == "BoundBatchNormalization":
            data, weight, bias, mean, variance = parts
            shape = (1, -1, *[1] * (data.ndim - 2))
            scale = weight / (variance + node.eps).sqrt()
            both[node.name] = (data + mean.view(shape)) * scale.view(shape) + bias.view(shape)
        elif kind == "BoundReshape":
            both[node.name] = node.forward(parts[0])
        elif kind not in _FORWARD or (kind == "BoundDiv" and moves(node.inputs[1])) or any(p is None for p in parts):
            return None
        else:
            both[node.name] = node.forward(*parts).abs()
        _follow(node, parts, radii, both)
    return both


@dataclass(frozen=True)
class _Radii:
    """How far a node that is the input times constants, plus constants, moves over the set: norms, (B,) each."""

    l1: Tensor
    l2: Tensor

    def times(self, factor: Tensor) -> _Radii:
        return _Radii(self.l1 * factor, self.l2 * factor)

    def reach(self, rows: Tensor) -> Tensor:
        """How far sums with weights of the absolute values ``rows`` (N, K) move at most, (B, N)."""
        return torch.minimum(self.l1[:, None] * rows.amax(1), self.l2[:, None] * rows.norm(dim=1))


def _follow(node: Any, parts: list[Any], radii: dict[str, _Radii], both: dict[str, Any]) -> None:
    """Pass ``radii`` on through a node that scales the input, or use them for the sizes of a first linear layer."""
    moving = [part for part in node.inputs if moves(part)]
    if len(moving) != 1 or moving[0].name not in radii:
        return
    kind, source = type(node).__name__, radii[moving[0].name]
    if is_elementwise(node):
        start, scale = unscaled(node, both[node.name])
        radii[node.name] = radii[start.name].times(scale.abs().amax())
    elif moving[0] is not node.inputs[0]:
        return
    elif kind in ("BoundFlatten", "BoundReshape"):
        if parts[0][0].numel() == both[node.name][0].numel():
            radii[node.name] = source
    elif kind == "BoundBatchNormalization":
        radii[node.name] = source.times((parts[1] / (parts[4] + node.eps).sqrt()).amax())
    elif kind == "BoundConv" or (kind == "BoundLinear" and node.transB and _factor(node) == 1.0):
        rows = parts[1].flatten(1)
        if parts[1].shape[:2].numel() == rows.numel() and _is_diagonal(rows):
            radii[node.name] = source.times(rows.amax())
            return
        whole, clean = both[node.name].chunk(2)
        moved = clean + source.reach(rows).view(len(clean), -1, *[1] * (clean.ndim - 2))
        both[node.name] = torch.cat([torch.minimum(whole, moved), clean])


def _factor(node: Any) -> float:
    """Of a linear node's product; the name differs by version."""
    return float(getattr(node, "alpha_linear", getattr(node, "alpha", 1.0)))


def _is_diagonal(matrix: Tensor) -> bool:
    return matrix.shape[0] == matrix.shape[1] and bool((matrix == matrix.diagonal().diag()).all())


def ordered(final: Any) -> list[Any]:
    """``final`` and all nodes below it, inputs first."""
    found: list[Any] = []
    seen: set[str] = set()
    pending = [(final, False)]
    while pending:
        node, ready = pending.pop()
        if ready:
            found.append(node)
        elif node.name not in seen:
            seen.add(node.name)
            pending += [(node, True), *((part, False) for part in node.inputs)]
    return found
