"""Max pooling bounded window by window, in matrix mode, for any window, stride, padding and image.

From below by the entry with the largest lower bound; from above by that entry where no other can exceed it, else by the
largest upper bound. auto_LiRPA 0.3 fails on windows that overlap, are padded, or leave a rest.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from auto_LiRPA import BoundedModule
from torch import Tensor


def mend_max_pools(bounded: BoundedModule) -> None:
    """Let every max pooling of ``bounded`` (in matrix mode) be bounded as above."""
    for node in bounded.modules():
        if type(node).__name__ == "BoundMaxPool":
            node.forward = functools.partial(_forward, node)
            node.interval_propagate = functools.partial(_interval, node)
            node.bound_backward = functools.partial(_backward, node)


def _settings(node: Any) -> dict[str, Any]:
    pads = [int(amount) for amount in node.attr.get("pads", [0, 0, 0, 0])]
    half = len(pads) // 2
    if pads[:half] != pads[half:]:
        raise NotImplementedError("max pooling with pads that differ between sides; pad with nn.ConstantPad2d before")
    return {
        "kernel_size": [int(size) for size in node.attr["kernel_shape"]],
        "stride": [int(step) for step in node.attr["strides"]],
        "padding": pads[:half],
        "dilation": [int(step) for step in node.attr.get("dilations", [1] * half)],
        "ceil_mode": bool(node.attr.get("ceil_mode", 0)),
    }


def _pool(node: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(largest entries, where they stand in each flattened map)."""
    settings = _settings(node)
    function: Any = F.max_pool1d if len(settings["stride"]) == 1 else F.max_pool2d
    return function(x, return_indices=True, **settings)


def _forward(node: Any, x: Tensor) -> Tensor:
    return _pool(node, x)[0]


def _interval(node: Any, *given: Any) -> tuple[Tensor, Tensor]:
    return _pool(node, given[0][0])[0], _pool(node, given[0][1])[0]


def _backward(node: Any, last_lower: Any, last_upper: Any, x: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
    lower, upper = x.lower, x.upper
    places = _pool(node, lower)[1]
    highest, where = _pool(node, upper)
    # one entry for certain: its lower bound is the largest, and no other entry's upper bound lies above it
    certain = (where == places) & (
        _second(node, upper, places) <= lower.flatten(2).gather(2, places.flatten(2)).view_as(places)
    )
    constant = torch.where(certain, torch.zeros_like(highest), highest)

    def side(rows: Tensor | None, sign: int) -> tuple[Tensor | None, Any]:
        if rows is None:
            return None, 0
        # rows times the pooled value: picked entries where the row wants them, the highest value where it does not
        picks = torch.where(certain, rows, (sign * rows).clamp(min=0) * sign)
        rest = torch.where(certain, torch.zeros_like(rows), rows - picks)
        spread = picks.new_zeros(*rows.shape[:3], lower[0, 0].numel())
        spread = spread.scatter_add(3, places.flatten(2).expand(*rows.shape[:3], -1), picks.flatten(3))
        return spread.view(*rows.shape[:2], *lower.shape[1:]), (rest * constant).flatten(2).sum(2)

    from_below, from_above = side(last_lower, 1), side(last_upper, -1)
    return [(from_below[0], from_above[0])], from_below[1], from_above[1]


def _second(node: Any, upper: Tensor, places: Tensor) -> Tensor:
    """Upper bound of every window's entries but the one at ``places``: exact where no window shares its entry, else
    infinite."""
    flat = upper.flatten(2)
    chosen = torch.zeros_like(flat).scatter_add(
        2, places.flatten(2), torch.ones_like(places, dtype=flat.dtype).flatten(2)
    )
    without = torch.where(chosen > 0, torch.full_like(flat, torch.finfo(flat.dtype).min), flat).view_as(upper)
    others, _ = _pool(node, without)
    # an entry that several windows chose may be another's second: then nothing is certain of windows that hold it
    return others if bool((chosen <= 1).all()) and not _overlap(node) else torch.full_like(others, torch.inf)


def _overlap(node: Any) -> bool:
    settings = _settings(node)
    reach = zip(settings["kernel_size"], settings["dilation"], settings["stride"], strict=True)
    return any((kernel - 1) * dilation + 1 > stride for kernel, dilation, stride in reach)
