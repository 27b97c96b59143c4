"""Minimum of a linear function over an lp ball cut with a box: exact for l1 and linf, exact by duality for l2.

Every function takes coefficients ``a`` of shape (..., K) and, per coordinate, how far the input may
move down (``low`` <= 0) and up (``high`` >= 0), broadcastable to ``a``; it returns shape (...).
The value 0 (no movement) is always allowed, so every minimum is <= 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 23
"""Coefficients worked on at a time: bounds the memory of the temporaries (32 MB each in float32)."""

_TINY = 1e-30

_FEW = 64
"""Coordinates that :func:`l1_box_maximizer` tries to spend the budget on first."""


def box_minimum(a: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Minimum of ``a . d`` over ``low <= d <= high``."""
    return torch.minimum(a * low, a * high).sum(-1)


def l1_box_minimum(a: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    """Minimum of ``a . d`` over ``low <= d <= high`` and ``sum |d| <= eps`` (a fractional knapsack).

    The budget goes to the coordinates with the largest ``|a|`` first, each up to its box end.

    Args:
        eps: budget, shape (..., 1) broadcastable to ``a``.
    """
    order = a.abs().argsort(dim=-1, descending=True)
    room = torch.where(a > 0, -low, high)
    shape = torch.broadcast_shapes(room.shape, order.shape)
    order = order.expand(shape)
    room = room.expand(shape).gather(-1, order)
    gain = a.abs().expand(shape).gather(-1, order)
    spent_before = room.cumsum(-1) - room
    used = torch.minimum(room, (eps - spent_before).clamp(min=0))
    return -(gain * used).sum(-1)


def l1_box_maximizer(a: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    """The ``d`` of ``low <= d <= high`` and ``sum |d| <= eps`` whose ``a . d`` is largest, shape (..., K).

    Args:
        a: coefficients (..., K); low, high: of the same shape; eps: budget, shape (..., 1).
    """
    rooms = torch.where(a > 0, high, -low)
    count = min(_FEW, a.shape[-1])
    while True:  # a small budget is spent long before the last coordinate: sorting them all would cost the most
        order = a.abs().topk(count, dim=-1).indices
        room = rooms.gather(-1, order)
        if count == a.shape[-1] or bool((room.sum(-1, keepdim=True) >= eps).all()):
            break
        count = min(8 * count, a.shape[-1])
    used = torch.minimum(room, (eps - (room.cumsum(-1) - room)).clamp(min=0))
    return a.sign() * torch.zeros_like(a).scatter(-1, order, used)


def l2_box_minimum(a: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    """Minimum of ``a . d`` over ``low <= d <= high`` and ``||d||_2 <= eps``.

    Lagrangian dual with one multiplier m: for every m >= 0 the value
    ``sum_k min_{low <= d <= high} (a_k d + m d^2 / 2) - m eps^2 / 2`` is a valid lower bound, so the
    result is sound whatever the search finds. The search starts at the uncut ball's multiplier
    ``||a|| / eps`` and solves for the multiplier of the current set of saturated coordinates; the set
    only grows, so it ends at the optimum after finitely many steps.

    Args:
        eps: radius, shape (..., 1) broadcastable to ``a``.
    """
    with torch.no_grad():
        room = torch.where(a > 0, -low, high)
        budget = (eps * eps).expand(*room.shape[:-1], 1).squeeze(-1)
        square, room_square = a * a, room * room
        multiplier = (square.sum(-1) / budget.clamp(min=_TINY)).sqrt()
        saturated_count = torch.zeros_like(budget)
        waits = a.device.type != "cpu"  # then two rounds too many cost less than to ask after each
        for round_ in range(a.shape[-1]):
            saturated = a.abs() >= room * multiplier.unsqueeze(-1)
            count = saturated.sum(-1).to(budget.dtype)
            if (not waits or round_ % 4 == 3) and bool((count <= saturated_count).all()):
                break
            saturated_count = count
            left = budget - torch.where(saturated, room_square, 0).sum(-1)
            free = torch.where(saturated, 0, square).sum(-1)
            update = (free / left.clamp(min=_TINY)).sqrt()
            multiplier = torch.where(left > 0, torch.minimum(update, multiplier), multiplier)
        multiplier = multiplier.clamp(min=_TINY)
    step = torch.minimum(torch.maximum(-a / multiplier.unsqueeze(-1), low), high)
    step = step.detach()
    inner = a * step + 0.5 * multiplier.unsqueeze(-1) * step * step
    return inner.sum(-1) - 0.5 * multiplier * budget


def in_chunks(minimum: Callable[..., Tensor], a: Tensor, *others: Tensor) -> Tensor:
    """Evaluate ``minimum(a, *others)`` piece by piece along one of the result's first two axes.

    Args:
        minimum: one of the functions above.
        a: coefficients (..., K), at least three axes.
        others: its other arguments, with as many axes as ``a`` and broadcastable to it.
    """
    shape = torch.broadcast_shapes(a.shape, *(t.shape for t in others))
    elements = shape.numel()
    if elements <= _CHUNK_ELEMENTS:
        return minimum(a, *others)
    axis = 0 if shape[0] >= shape[1] else 1
    width = max(1, shape[axis] * _CHUNK_ELEMENTS // elements)
    parts = []
    for start in range(0, shape[axis], width):
        stop = min(start + width, shape[axis])
        pieces = (t if t.shape[axis] == 1 else t.narrow(axis, start, stop - start) for t in (a, *others))
        parts.append(minimum(*pieces))
    return torch.cat(parts, dim=axis)
