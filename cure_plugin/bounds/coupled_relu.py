"""The norm-coupled ReLU relaxation, and the hook that puts it into auto_LiRPA's backward pass.

CROWN bounds every neuron of a layer over its own interval, as if each could spend the whole l2 budget.
Here the budget stays shared: for pre-activations z with l <= z <= u and ||z - z0||_2 <= rho, any slopes g
and any multiplier m >= 0,

    A relu(z) >= g z + h,   h = sum_i min over [l_i, u_i] of (A_i relu(z) - g_i z + m/2 (z - z0_i)^2) - m/2 rho^2

(Lagrangian duality; the l2 case is SDP-CROWN's, Chiu et al. 2025, arXiv 2506.06665). Each inner minimum is
over two clipped parabolas, in closed form. m = 0 is CROWN's own intercept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from auto_LiRPA.bound_ops import BoundRelu
from auto_LiRPA.patches import Patches
from torch import Tensor

from cure_plugin.sets.rows import rows_of_patches

Box = tuple[Tensor, Tensor]

_SEARCH_STEPS = 6
"""Fixed-point steps to the first multiplier; later calls take one step each from the last one."""

_LEAST = 1e-12


def coupled_offset(
    a: Tensor, slope: Tensor, multiplier: Tensor, box: Box, clean: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """The offset h above, and how far its minimiser lies from ``clean``.

    Args:
        a, slope: (..., N) rows A and slopes g.
        multiplier: (...), >= 0; any value is valid.
        box, clean: (lower, upper) and z0, broadcastable to (..., N). radius: broadcastable to (...).

    Returns:
        (h (...), ||z* - z0||_2 (...)); gradients flow into ``a`` and ``slope``.
    """
    lower, upper = box
    m = multiplier.unsqueeze(-1)
    divisor = m.clamp(min=_LEAST)
    with torch.no_grad():
        active = clean - (a - slope) / divisor
        active = torch.minimum(torch.maximum(active, lower.clamp(min=0)), upper.clamp(min=0))
        inactive = clean + slope / divisor
        inactive = torch.minimum(torch.maximum(inactive, lower.clamp(max=0)), upper.clamp(max=0))
        at_active = (a - slope) * active + m / 2 * (active - clean).square()
        at_inactive = -slope * inactive + m / 2 * (inactive - clean).square()
        # a piece that the interval does not reach is no candidate
        choose = (at_active <= at_inactive) & (upper > 0) | (lower >= 0)
        point = torch.where(choose, active, inactive)
        distance = (point - clean).square().sum(-1)
        through = torch.where(choose, point, 0)
    value = (a * through - slope * point).sum(-1)
    return value + multiplier / 2 * (distance - radius.square()), distance.sqrt()


@dataclass
class Coupling:
    """What the hook needs while one backward pass runs, and what it learns.

    Attributes:
        start: name of the node that the rows start at; passes from other nodes are left to auto_LiRPA.
        clean: values at the clean input of every ReLU's input, by its name, (B, *shape).
        radius: l2 radius there, (B,).
        slopes: shares in [0, 1] of A on unstable neurons, by (name, side); made at the first pass with the
            slope that the ReLU has at the clean value, ready to be optimised.
        multipliers: one per row, by (name, side); found at the first pass, moved at each.
    """

    start: str
    clean: dict[str, Tensor]
    radius: dict[str, Tensor]
    slopes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    multipliers: dict[tuple[str, int], Tensor] = field(default_factory=dict)


_active: list[Coupling] = []


@contextmanager
def coupled(coupling: Coupling) -> Iterator[None]:
    """Let ReLUs use ``coupling`` in bounds that start at its node, while the context lasts."""
    _active.append(coupling)
    try:
        yield
    finally:
        _active.pop()


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
        lambda values: values.view(rows.shape),
    )


def relax(name: str, rows: Tensor | Patches, box: Box, coupling: Coupling, side: int) -> tuple[Any, Tensor]:
    """(next rows, bias) of a bound from below (side -1) or above (1) with ``rows`` over the ReLU fed by ``name``."""
    layout = _layout(rows)
    a = -side * layout.coefficients
    lower, upper, clean = (layout.pick(value) for value in (*box, coupling.clean[name]))
    radius = layout.per_sample(coupling.radius[name])
    key = name, side
    if key not in coupling.slopes:
        coupling.slopes[key] = (clean > 0).to(a).expand_as(a).clone().requires_grad_()
    # padding has bounds 0 and 0: its rows end here
    slope = a * torch.where(upper <= 0, 0.0, torch.where(lower >= 0, 1.0, coupling.slopes[key].clamp(0, 1)))
    if key not in coupling.multipliers:
        coupling.multipliers[key] = _search(a.detach(), slope.detach(), (lower, upper), clean, radius)
    multiplier = coupling.multipliers[key]
    offset, distance = coupled_offset(a, slope, multiplier, (lower, upper), clean, radius)
    # At the best multiplier the minimiser lies on the ball's surface; alone, its distance falls like 1 / m.
    coupling.multipliers[key] = (multiplier * (distance / radius.clamp(min=_LEAST)).clamp(0.2, 5)).detach()
    return layout.restore(-side * slope), -side * offset


def _search(a: Tensor, slope: Tensor, box: Box, clean: Tensor, radius: Tensor) -> Tensor:
    """A multiplier per row near the best, by fixed-point steps; next to 0 where CROWN's own intercept is better."""
    multiplier = torch.full_like(a[..., 0], _LEAST)
    best, at = coupled_offset(a, slope, multiplier, box, clean, radius)[0], multiplier
    multiplier = a.norm(dim=-1) / radius.clamp(min=_LEAST)
    for _ in range(_SEARCH_STEPS):
        offset, distance = coupled_offset(a, slope, multiplier, box, clean, radius)
        better = offset > best
        best, at = torch.where(better, offset, best), torch.where(better, multiplier, at)
        multiplier = multiplier * (distance / radius.clamp(min=_LEAST)).clamp(0.05, 20)
    return at


def install() -> None:
    """Wrap ``BoundRelu.bound_backward`` once; without an active coupling it does what it did."""
    original = BoundRelu.bound_backward
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def bound_backward(self: Any, last_lA: Any, last_uA: Any, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        coupling = _active[-1] if _active else None
        start = kwargs.get("start_node")
        if coupling is None or start is None or start.name != coupling.start or getattr(self, "leaky_alpha", 0) != 0:
            return original(self, last_lA, last_uA, x, *args, **kwargs)
        results = [
            (None, 0) if rows is None else relax(self.inputs[0].name, rows, (x.lower, x.upper), coupling, side)
            for rows, side in ((last_lA, -1), (last_uA, 1))
        ]
        (lower_rows, lower_bias), (upper_rows, upper_bias) = results
        return [(lower_rows, upper_rows)], lower_bias, upper_bias

    BoundRelu.bound_backward = bound_backward
