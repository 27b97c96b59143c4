"""Average pooling bounded as what it is, a linear layer.

auto_LiRPA 0.3 bounds overlapping and padded windows wrongly and fails on images that are not square; no version sees
that padding may be left out of the mean.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor


def mend_average_pools(bounded: BoundedModule) -> None:
    """Let every average pooling of ``bounded`` (in matrix mode) average as its layer does, forwards and backwards."""
    for node in bounded.modules():
        if type(node).__name__ == "BoundAveragePool":
            node.ceil_mode = bool(node.attr.get("ceil_mode", 0))
            node.count_include_pad = bool(node.attr.get("count_include_pad", 0))
            node.bound_backward = functools.partial(_backward, node)


def _backward(
    node: Any, last_lower: Tensor | None, last_upper: Tensor | None, x: Any, **_: Any
) -> tuple[Any, int, int]:
    return [(_pulled_back(node, last_lower), _pulled_back(node, last_upper))], 0, 0


def _pulled_back(node: Any, rows: Tensor | None) -> Tensor | None:
    """Coefficients (S, B, *output) of the pooled pixels as those of the input's, by the layer's own gradient."""
    if rows is None:
        return None
    flat = rows.reshape(-1, *rows.shape[2:])
    with torch.enable_grad():
        origin = flat.new_zeros(len(flat), *node.input_shape[1:], requires_grad=True)
        (pulled,) = torch.autograd.grad(node.forward(origin), origin, flat, create_graph=flat.requires_grad)
    return pulled.view(*rows.shape[:2], *pulled.shape[1:])
