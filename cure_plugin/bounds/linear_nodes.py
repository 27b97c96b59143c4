"""Linear nodes bounded as what they are: rows pulled back through the node's own forward pass, intervals pushed.

auto_LiRPA writes the transpose of every linear operator out by hand, for the attributes its authors had in mind; others
raise exceptions or give bounds that do not hold. In matrix mode the transpose is had for certain, as the gradient of
the forward pass, which is compared with the net itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.bounds.elementwise import constant
from cure_plugin.bounds.operators import is_elementwise, moves

_RISING = (
    "BoundAdd",
    "BoundAveragePool",
    "BoundConcat",
    "BoundGather",
    "BoundGlobalAveragePool",
    "BoundPad",
    "BoundReduceMean",
    "BoundReduceSum",
    "BoundSlice",
    "BoundSqueeze",
    "BoundTranspose",
    "BoundUnsqueeze",
)
"""Every output rises with every input: the ends of an interval go to the ends."""

_SCALING = ("BoundDiv", "BoundMul")
"""Every output is one input times a constant."""

_BY_WEIGHTS = ("BoundConv", "BoundConvTranspose")
"""auto_LiRPA's own intervals hold (by the weights' absolute values)."""


_PLAIN = ("BoundBatchNormalization", "BoundFlatten", "BoundLinear", "BoundNeg", "BoundReshape")
"""Linear in their first input."""


def is_linear(node: Any) -> bool:
    """Whether ``node`` is known to be affine in what depends on the input."""
    kind = type(node).__name__
    if kind in _PLAIN:
        return moves(node.inputs[0]) and not any(map(moves, node.inputs[1:]))
    return kind in (*_RISING, *_SCALING, *_BY_WEIGHTS, "BoundSub") and _is_linear(kind, node)


def mend_views(bounded: BoundedModule) -> None:
    """Let views take batches of any size, whatever size the net was read with; in either mode."""
    for node in bounded.modules():
        if type(node).__name__ == "BoundReshape" and moves(node):
            node.forward = functools.partial(_reshaped, tuple(node.output_shape[1:]))


def mend_linear_nodes(bounded: BoundedModule) -> None:
    """Let the linear nodes of ``bounded`` (in matrix mode) be bounded by their own forward pass."""
    for node in bounded.modules():
        kind = type(node).__name__
        if kind == "BoundAveragePool":
            node.ceil_mode = bool(node.attr.get("ceil_mode", 0))
            node.count_include_pad = bool(node.attr.get("count_include_pad", 0))
        if kind not in (*_RISING, *_SCALING, *_BY_WEIGHTS, "BoundSub") or not _is_linear(kind, node):
            continue
        if is_elementwise(node):  # bounds/elementwise.py
            continue
        node.bound_backward = functools.partial(_backward, node)
        node.requires_input_bounds = []
        if kind not in _BY_WEIGHTS:
            node.interval_propagate = functools.partial(_interval, node)


def _is_linear(kind: str, node: Any) -> bool:
    """Whether ``node`` is linear in what depends on the input."""
    moving = [moves(part) for part in node.inputs]
    if kind in ("BoundAdd", "BoundSub", "BoundConcat"):
        return any(moving)
    return moving[0] and not any(moving[1:]) if kind != "BoundMul" else sum(moving) == 1


def _reshaped(shape: tuple[int, ...], x: Tensor, *_: Any) -> Tensor:
    """Each sample in another shape, however many there are: tracing takes the batch's size for a constant."""
    return x.reshape(x.shape[0], *shape)


def _backward(node: Any, last_lower: Any, last_upper: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
    """auto_LiRPA's hook: rows over the node as rows over its inputs, and what its constants add to the bounds."""
    lower, lower_bias = _pulled_back(node, last_lower)
    upper, upper_bias = _pulled_back(node, last_upper)
    return list(zip(lower, upper, strict=True)), lower_bias, upper_bias


def _pulled_back(node: Any, rows: Tensor | None) -> tuple[list[Tensor | None], Any]:
    """(coefficients (S, B, *input) of every input, bias (S, B)) of rows (S, B, *output)."""
    if rows is None:
        return [None] * len(node.inputs), 0
    flat = rows.reshape(-1, *rows.shape[2:])
    constants = [None if moves(part) else _constant(part, flat) for part in node.inputs]
    tensors = [one for one in (rows, *constants) if isinstance(one, Tensor)]
    differentiable = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    with torch.enable_grad():
        origins = [
            flat.new_zeros(len(flat), *part.output_shape[1:], requires_grad=True) if moves(part) else None
            for part in node.inputs
        ]
        given = [one if origin is None else origin for origin, one in zip(origins, constants, strict=True)]
        value = node.forward(*given)
        wanted = [origin for origin in origins if origin is not None]
        found = iter(torch.autograd.grad(value, wanted, flat, create_graph=differentiable))
    value = value if differentiable else value.detach()
    pulled = [None if origin is None else next(found).unflatten(0, rows.shape[:2]) for origin in origins]
    return pulled, (value * flat).flatten(1).sum(1).view(rows.shape[:2])


def _constant(part: Any, like: Tensor) -> Any:
    value = constant(part)
    return value.to(like) if isinstance(value, Tensor) and value.is_floating_point() else value


def _interval(node: Any, *given: Any) -> tuple[Tensor, Tensor]:
    """auto_LiRPA's hook: the exact interval of a node whose outputs rise, fall or are scaled entry by entry."""
    lows, highs = [one[0] for one in given], [one[1] for one in given]
    kind = type(node).__name__
    if kind == "BoundSub":
        return node.forward(lows[0], highs[1]), node.forward(highs[0], lows[1])
    one, other = node.forward(*lows), node.forward(*highs)
    return (torch.minimum(one, other), torch.maximum(one, other)) if kind in _SCALING else (one, other)
