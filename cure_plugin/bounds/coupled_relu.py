"""The norm-coupled ReLU relaxation, and what puts it into auto_LiRPA's backward pass.

CROWN bounds every neuron of a layer over its own interval, as if each could spend the whole l2 budget.
Here the budget stays shared: for pre-activations z with l <= z <= u and ||z - z0||_2 <= rho, any slopes g
and any multiplier m >= 0,

    A relu(z) >= g z + h,   h = sum_i min over [l_i, u_i] of (A_i relu(z) - g_i z + m/2 (z - z0_i)^2) - m/2 rho^2

(Lagrangian duality; the l2 case is SDP-CROWN's, Chiu et al. 2025, arXiv 2506.06665). Each inner minimum is
over two clipped parabolas, in closed form. m = 0 is CROWN's own intercept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from auto_LiRPA.patches import Patches
from torch import Tensor

from cure_plugin.bounds.margins import NodeBox
from cure_plugin.sets.rows import rows_of_patches

_SEARCH_STEPS = 6
"""Fixed-point steps to the first multiplier; later calls take one step each from the last one."""

_LEAST, _LARGEST = 1e-12, 1e9
"""Multipliers stay between these, so that products with them stay finite."""

_CACHED_ELEMENTS = 1 << 16
"""Elements worked on at a time."""


def coupled_offset(
    a: Tensor, slope: Tensor, multiplier: Tensor, box: NodeBox, clean: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """The offset h above, and how far its minimiser lies from ``clean``.

    Args:
        a, slope: (S, ..., N) rows A and slopes g.
        multiplier: (S, ...), >= 0; any value is valid.
        box, clean: (lower, upper) and z0, broadcastable to (S, ..., N). radius: broadcastable to (S, ...).

    Returns:
        (h (S, ...), ||z* - z0||_2 (S, ...)); gradients flow into ``a`` and ``slope``.
    """
    shape = torch.broadcast_shapes(a.shape, slope.shape, clean.shape)
    lower, upper, clean = (value.expand(1, *shape[1:]) if value.ndim < len(shape) else value for value in (*box, clean))
    inner, distance = _InnerMinimum.apply(
        a.expand(shape), slope.expand(shape), multiplier.detach(), lower, upper, clean
    )
    return inner - multiplier / 2 * radius.square(), distance.sqrt()


class _InnerMinimum(torch.autograd.Function):
    """The sum in h without the radius' term, and ||z* - z0||_2^2: (...) each, from rows (S, ..., N).

    Row by row in pieces that fit a processor's cache; backward needs the minimisers only (Danskin).
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, slope: Tensor, multiplier: Tensor, lower: Tensor, upper: Tensor, clean: Tensor
    ) -> tuple[Tensor, Tensor]:
        through, point = torch.empty_like(a), torch.empty_like(a)
        value, distance = a.new_empty(a.shape[:-1]), a.new_empty(a.shape[:-1])
        step = max(1, _CACHED_ELEMENTS // max(1, a[0].numel()))
        for start in range(0, a.shape[0], step):
            rows = slice(start, start + step)
            given = [t if t.shape[0] == 1 else t[rows] for t in (a, slope, multiplier, lower, upper, clean)]
            _minimise(given, [t[rows] for t in (through, point, value, distance)])
        ctx.save_for_backward(through, point)
        ctx.mark_non_differentiable(distance)
        return value, distance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        through, point = ctx.saved_tensors
        outer = gradient.unsqueeze(-1)
        return outer * through, -outer * point, None, None, None, None


def _minimise(given: list[Tensor], filled: list[Tensor]) -> None:
    """From rows, slopes, multipliers, bounds and clean values: relu(z*), z*, the minimum and (z* - clean)^2 summed.

    A piece that the interval does not reach counts as its end at 0, which can only lower the minimum.
    """
    a, slope, multiplier, lower, upper, clean = given
    through, point, value, distance = filled
    m = multiplier.unsqueeze(-1)
    divisor = m.clamp(min=_LEAST)
    descent = a - slope
    active = torch.clamp(clean - descent / divisor, lower.clamp(min=0), upper.clamp(min=0))
    inactive = torch.clamp(clean + slope / divisor, lower.clamp(max=0), upper.clamp(max=0))
    at_active = descent.mul_(active).addcmul_(m, (active - clean).square_(), value=0.5)
    at_inactive = ((inactive - clean).square_().mul_(m)).mul_(0.5).addcmul_(slope, inactive, value=-1)
    choose = torch.le(at_active, at_inactive, out=torch.empty_like(a))
    torch.sum(torch.minimum(at_active, at_inactive), -1, out=value)
    torch.mul(active, choose, out=through)
    torch.lerp(inactive, active, choose, out=point)
    torch.sum((point - clean).square_(), -1, out=distance)


@dataclass
class Coupling:
    """What the hook needs while one backward pass runs, and what it learns.

    Attributes:
        start: the node that the rows start at; passes from other nodes are left to auto_LiRPA.
        clean: values at the clean input of every ReLU's input, by its name, (B, *shape).
        radius: l2 radius there, (B,).
        slopes: shares in [0, 1] of A on unstable neurons, by (name, side); made at the first pass with the
            slope that the ReLU has at the clean value, ready to be optimised.
        multipliers: one per row, by (name, side); found at the first pass, moved at each.
    """

    start: Any
    clean: dict[str, Tensor]
    radius: dict[str, Tensor]
    slopes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    multipliers: dict[tuple[str, int], Tensor] = field(default_factory=dict)


_active: ContextVar[Coupling | None] = ContextVar("coupling", default=None)


@contextmanager
def coupled(coupling: Coupling) -> Iterator[None]:
    """Let ReLUs use ``coupling`` in bounds that start at its node, while the context lasts."""
    token = _active.set(coupling)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass(frozen=True)
class _Layout:
    """How a ReLU's neurons meet the rows that auto_LiRPA hands it: (S, B, *shape) or ``Patches``."""

    coefficients: Tensor
    pick: Callable[[Tensor], Tensor]
    per_sample: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor | Patches]


def _layout(rows: Tensor | Patches) -> _Layout:
    if isinstance(rows, Patches):
        view = rows_of_patches(rows)
        return _Layout(
            view.coefficients,
            view.pick,
            lambda value: view.per_sample(value).squeeze(-1),
            lambda values: rows.create_similar(values.view(rows.patches.shape)),
        )
    return _Layout(
        rows.flatten(2),
        lambda value: value.flatten(1).unsqueeze(0),
        lambda value: value.unsqueeze(0),
        lambda values: values.reshape(rows.shape).contiguous(),  # auto_LiRPA reshapes rows with view()
    )


def relax(name: str, rows: Tensor | Patches, box: NodeBox, coupling: Coupling, side: int) -> tuple[Any, Tensor]:
    """(next rows, bias) of a bound from below (side -1) or above (1) with ``rows`` over the ReLU fed by ``name``."""
    layout = _layout(rows)
    a = -side * layout.coefficients
    lower, upper, clean = (layout.pick(value) for value in (*box, coupling.clean[name]))
    # a box that rounding has moved off the clean value would leave the multiplier nothing to hold on to
    lower, upper = torch.minimum(lower, clean), torch.maximum(upper, clean)
    radius = layout.per_sample(coupling.radius[name])
    key = name, side
    if key not in coupling.slopes:
        coupling.slopes[key] = (clean > 0).to(a).expand_as(a).clone().requires_grad_()
    # padding has bounds 0 and 0: it counts as inactive, so that its rows end here
    active, unstable = ((lower >= 0) & (upper > 0)).to(a), ((lower < 0) & (upper > 0)).to(a)
    slope = a * torch.addcmul(active, coupling.slopes[key], unstable)
    if key not in coupling.multipliers:
        coupling.multipliers[key] = _search(a.detach(), slope.detach(), (lower, upper), clean, radius)
    multiplier = coupling.multipliers[key]
    offset, distance = coupled_offset(a, slope, multiplier, (lower, upper), clean, radius)
    # At the best multiplier the minimiser lies on the ball's surface; alone, its distance falls like 1 / m.
    factor = (distance / radius.clamp(min=_LEAST)).clamp(0.2, 5)
    coupling.multipliers[key] = (multiplier * factor).clamp(_LEAST, _LARGEST).detach()
    return layout.restore(-side * slope), -side * offset


def _search(a: Tensor, slope: Tensor, box: NodeBox, clean: Tensor, radius: Tensor) -> Tensor:
    """A multiplier per row near the best, by fixed-point steps; next to 0 where CROWN's own intercept is better."""
    multiplier = torch.full_like(a[..., 0], _LEAST)
    best, at = coupled_offset(a, slope, multiplier, box, clean, radius)[0], multiplier
    multiplier = (a.norm(dim=-1) / radius.clamp(min=_LEAST)).clamp(max=_LARGEST)
    for _ in range(_SEARCH_STEPS):
        offset, distance = coupled_offset(a, slope, multiplier, box, clean, radius)
        better = offset > best
        best, at = torch.where(better, offset, best), torch.where(better, multiplier, at)
        multiplier = (multiplier * (distance / radius.clamp(min=_LEAST)).clamp(0.05, 20)).clamp(max=_LARGEST)
    return at


def with_coupling(original: Callable[..., Any]) -> Callable[..., Any]:
    """``BoundRelu.bound_backward`` that lets the active coupling answer; without one it does what it did."""

    def bound_backward(self: Any, last_lA: Any, last_uA: Any, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        coupling = _active.get()
        if coupling is None or kwargs.get("start_node") is not coupling.start or getattr(self, "leaky_alpha", 0) != 0:
            return original(self, last_lA, last_uA, x, *args, **kwargs)
        results = [
            (None, 0) if rows is None else relax(self.inputs[0].name, rows, (x.lower, x.upper), coupling, side)
            for rows, side in ((last_lA, -1), (last_uA, 1))
        ]
        (lower_rows, lower_bias), (upper_rows, upper_bias) = results
        return [(lower_rows, upper_rows)], lower_bias, upper_bias

    return bound_backward
