"""A BoundedModule as affine maps between ReLUs: z_k = sum over j < k of W_kj y_j + b_k, y_j = relu(z_j), y_0 the input.

The matrices are read off the graph's own nodes, in float64, row by row as gradients, so that a convolution's entries
are its weights and not what rounding leaves of differences. Nets with any other nodes are refused, and stay with
auto_LiRPA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.bounds.elementwise import constant
from cure_plugin.bounds.linear_nodes import is_linear
from cure_plugin.bounds.norms import matrix_norm
from cure_plugin.bounds.operators import moves
from cure_plugin.bounds.rounding import ordered
from cure_plugin.errors import SpecError

LARGEST = 60_000_000
"""Entries that all matrices of a net may have together: half a GiB in float64."""

_NORM_SIDE = 4096
"""Rows or columns up to which a matrix's norm is computed: seconds, once a net."""

_CHUNK = 1 << 22
"""Entries of gradients worked on at a time."""


@dataclass(frozen=True)
class AffineNet:
    """See above; layer K + 1 are the logits.

    Attributes:
        names: of the nodes that the ReLUs 1 to K take. weights: for each layer 1 to K + 1, its matrices (n_k, n_j) by
            source j. biases: (n_k,) of each. All in float64.
    """

    names: tuple[str, ...]
    weights: tuple[Mapping[int, Tensor], ...]
    biases: tuple[Tensor, ...]

    def forward(self, x: Tensor) -> list[Tensor]:
        """z_1 to z_{K+1} at inputs (B, n_0) in float64, each (B, n_k)."""
        outputs, values = [x], []
        for weights, bias in zip(self.weights, self.biases, strict=True):
            values.append(sum((outputs[j] @ weight.T for j, weight in weights.items()), bias))
            outputs.append(values[-1].clamp(min=0))
        return values

    @cached_property
    def norms(self) -> tuple[Mapping[int, float], ...]:
        """Spectral norms of the matrices, never below the true ones; coarse ones of the largest."""

        def norm(matrix: Tensor) -> float:
            return matrix_norm(matrix) if min(matrix.shape) <= _NORM_SIDE else float(matrix.norm()) * (1 + 1e-9)

        return tuple({j: norm(weight) for j, weight in weights.items()} for weights in self.weights)


def affine_net(bounded: BoundedModule) -> AffineNet:
    """The net of ``bounded``, which has evaluated some input.

    Raises:
        SpecError: a node that is neither linear nor a ReLU, or matrices that would take more than :data:`LARGEST`.
    """
    order = [node for node in ordered(bounded.final_node()) if type(node).__name__ == "BoundRelu" and moves(node)]
    sources = {_input(bounded).name: 0, **{relu.name: k for k, relu in enumerate(order, 1)}}
    targets = [*(relu.inputs[0] for relu in order), bounded.final_node()]
    used = [_sources(target, sources) for target in targets]
    sizes = [math.prod(node.output_shape[1:]) for node in (_input(bounded), *order)]
    entries = sum(_entries(target) * sizes[j] for target, below in zip(targets, used, strict=True) for j in below)
    if entries > LARGEST:
        raise SpecError(f"the net's layers as matrices take {entries:,} entries, over {LARGEST:,}")
    shapes = [tuple(node.output_shape[1:]) for node in (_input(bounded), *order)]
    layers = [_layer(target, below, sources, shapes) for target, below in zip(targets, used, strict=True)]
    return AffineNet(
        tuple(relu.inputs[0].name for relu in order),
        tuple(weights for weights, _ in layers),
        tuple(bias for _, bias in layers),
    )


def _entries(node: Any) -> int:
    return math.prod(node.output_shape[1:])


def _input(bounded: BoundedModule) -> Any:
    return next(node for node in bounded.children() if type(node).__name__ == "BoundInput")


def _sources(target: Any, sources: Mapping[str, int]) -> list[int]:
    """What ``target`` is an affine function of.

    Raises:
        SpecError: it is none.
    """
    found, pending, seen = set(), [target], set()
    while pending:
        node = pending.pop()
        if node.name in sources:
            found.add(sources[node.name])
        elif node.name not in seen:
            seen.add(node.name)
            kind = type(node).__name__
            if not is_linear(node):
                raise SpecError(f"node {node.name} ({kind.removeprefix('Bound')}) is neither linear nor a ReLU")
            pending += [part for part in node.inputs if moves(part)]
    return sorted(found)


def _layer(
    target: Any, below: list[int], sources: Mapping[str, int], shapes: list[tuple[int, ...]]
) -> tuple[dict[int, Tensor], Tensor]:
    """(matrices by source, bias) of ``target``."""
    rows = _entries(target)
    step = max(1, _CHUNK // max(1, max((math.prod(shapes[j]) for j in below), default=1)))
    pieces: dict[int, list[Tensor]] = {j: [] for j in below}
    bias = torch.zeros(rows, dtype=torch.float64)
    for start in range(0, rows, step):
        index = torch.arange(start, min(rows, start + step))
        with torch.enable_grad():
            origins = {j: torch.zeros(len(index), *shapes[j], dtype=torch.float64, requires_grad=True) for j in below}
            value = _value(target, sources, origins).reshape(len(index), rows)
            chosen = value.gather(1, index[:, None]).sum()
            gradients = torch.autograd.grad(chosen, list(origins.values()), allow_unused=True)
        bias[index] = value.detach()[0, index]
        for j, gradient in zip(below, gradients, strict=True):
            flat = torch.zeros(len(index), math.prod(shapes[j])).double() if gradient is None else gradient.flatten(1)
            pieces[j].append(flat)
    return {j: torch.cat(parts) for j, parts in pieces.items()}, bias


def _value(node: Any, sources: Mapping[str, int], origins: Mapping[int, Tensor]) -> Tensor:
    """``node`` in float64, of what the sources are."""
    known: dict[str, Any] = {}

    def value(one: Any) -> Any:
        if one.name not in known:
            if one.name in sources:
                known[one.name] = origins[sources[one.name]]
            elif not moves(one):
                fixed = constant(one)
                wide = isinstance(fixed, Tensor) and fixed.is_floating_point()
                known[one.name] = fixed.detach().double() if wide else fixed
            else:
                known[one.name] = _forward(one, [value(part) for part in one.inputs])
        return known[one.name]

    return value(node)


def _forward(node: Any, given: list[Any]) -> Tensor:
    if type(node).__name__ != "BoundBatchNormalization":
        return node.forward(*given)
    data, weight, bias, mean, variance = given  # auto_LiRPA's own may be in training mode
    shape = (1, -1, *[1] * (data.ndim - 2))
    scale = weight / (variance + node.eps).sqrt()
    return data * scale.view(shape) + (bias - mean * scale).view(shape)
