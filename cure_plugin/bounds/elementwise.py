"""Nodes that scale and shift every entry by constants: ``(x - mean) / std`` written out, in any order and any place.

auto_LiRPA bounds these in matrix mode alone, so that one of them in front costs a net its rows of windows (patches).
Here rows are scaled as they come, and what constants add to a bound is read off them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from auto_LiRPA.patches import Patches
from torch import Tensor

from cure_plugin.bounds.operators import is_elementwise, is_fixed, moves
from cure_plugin.sets.rows import rows_of_patches


@dataclass(frozen=True)
class Affine:
    """What a node makes of its one input that moves, entry by entry.

    Attributes:
        scale: factor, of as many axes as the input, broadcastable to one sample (1, *shape); None: 1.
        shift: what is added, likewise; None: 0.
    """

    scale: Tensor | None
    shift: Tensor | None


def constant(part: Any) -> Any:
    """What a node that no input reaches holds now: computed again where auto_LiRPA (0.3) keeps none, or an old one."""
    known = getattr(part, "forward_value", None)
    if known is None and not is_fixed(part):
        return None  # made of a shape, of which views say themselves what they need
    return part.forward(*map(constant, part.inputs)) if known is None else known


def affine(node: Any, like: Tensor) -> Affine:
    """Scale and shift of a node that :func:`~cure_plugin.bounds.operators.is_elementwise`, as numbers like ``like``."""
    kind, axes = type(node).__name__, len(node.output_shape)
    minus = like.new_full((1,) * axes, -1)
    if kind == "BoundNeg":
        return Affine(minus, None)
    first = moves(node.inputs[0])
    value = constant(node.inputs[1 if first else 0]).to(like)
    value = value.reshape(*[1] * (axes - value.ndim), *value.shape)
    if kind == "BoundAdd":
        return Affine(None, value)
    if kind == "BoundSub":
        return Affine(None, -value) if first else Affine(minus, value)
    return Affine(value if kind == "BoundMul" else 1 / value, None)


def moving_input(node: Any) -> Any:
    """The one input of such a node that is no constant."""
    return next(part for part in node.inputs if moves(part))


def unscaled(node: Any, like: Tensor) -> tuple[Any, Tensor]:
    """(the first node below a chain of such nodes that is none, what the chain that ``node`` ends multiplies it by)."""
    scale = like.new_ones((1,) * len(node.output_shape))
    while is_elementwise(node):
        step = affine(node, like)
        scale = scale if step.scale is None else scale * step.scale
        node = moving_input(node)
    return node, scale


def mend_elementwise(bounded: BoundedModule) -> None:
    """Let these nodes of ``bounded`` be bounded as above, in either mode, and constants be read as they are."""
    for node in bounded.modules():
        if type(node).__name__ == "BoundBatchNormalization":
            _name_constants(node)
        elif getattr(node, "inputs", None) and is_fixed(node):
            node.interval_propagate = functools.partial(_point, node)
        elif is_elementwise(node):
            node.bound_backward = functools.partial(_backward, node)
            node.interval_propagate = functools.partial(_interval, node)
            node.requires_input_bounds = []
            if type(node).__name__ == "BoundDiv":
                node.forward = torch.div  # auto_LiRPA's own takes a quotient by a root for a layer normalisation
            if len(node.output_shape) != 4:
                node.mode = "matrix"  # else auto_LiRPA starts windows at what is no image


def _name_constants(node: Any) -> None:
    """0.3 looks for the weight and bias of a normalisation without any under a name that constants lack."""
    for part in node.inputs[1:3]:
        if type(part).__name__ == "BoundConstant" and not hasattr(part, "param"):
            part.param = part.value


def _backward(node: Any, last_lower: Any, last_upper: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
    """auto_LiRPA's hook: rows over the node as rows over its input, and what its constants add to the bounds."""
    lower, lower_bias = _pulled_back(node, last_lower)
    upper, upper_bias = _pulled_back(node, last_upper)
    return [(lower, upper) if moves(part) else (None, None) for part in node.inputs], lower_bias, upper_bias


def _pulled_back(node: Any, rows: Tensor | Patches | None) -> tuple[Tensor | Patches | None, Tensor | int]:
    """(rows over the input, bias) of dense rows (S, B, *shape) or windows; biases as auto_LiRPA adds them up."""
    if rows is None:
        return None, 0
    shape = node.output_shape[1:]
    if isinstance(rows, Patches):
        step, view = affine(node, rows.patches), rows_of_patches(rows)
        bias = 0 if step.shift is None else _sums(view.coefficients, view.pick(step.shift.expand(1, *shape)))
        if step.scale is None:
            return rows, bias
        factor = step.scale[0]  # of channels, or else of pixels
        if factor[0].numel() > 1:
            factor = view.pick(step.scale.expand(1, *shape)).unflatten(-1, rows.patches.shape[-3:])
        return rows.create_similar(rows.patches * factor), bias
    step = affine(node, rows)
    bias = 0 if step.shift is None else _sums(rows.flatten(2), step.shift.expand(1, *shape).flatten(1))
    return (rows if step.scale is None else rows * step.scale), bias


def _sums(coefficients: Tensor, values: Tensor) -> Tensor:
    """Of products along the last axis, without the products themselves in memory."""
    values = values.expand(*[1] * (coefficients.ndim - values.ndim), *values.shape)
    return torch.einsum("s...k,s...k->s...", coefficients, values)


def _point(node: Any, *given: Any) -> tuple[Tensor, Tensor]:
    """auto_LiRPA's hook: what is computed of constants alone, of which 0.3 squares products."""
    value = node.forward(*(ends[0] for ends in given))
    return value, value


def _interval(node: Any, *given: Any) -> tuple[Tensor, Tensor]:
    """auto_LiRPA's hook: every output rises or falls with its own entry alone."""
    one, other = node.forward(*(ends[0] for ends in given)), node.forward(*(ends[1] for ends in given))
    return torch.minimum(one, other), torch.maximum(one, other)
