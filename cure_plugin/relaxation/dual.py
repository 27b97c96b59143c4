"""The dual of a net's minimum over a set: a lower bound for any slopes and multipliers, and its gradient by hand.

For rows A over the outputs of a ReLU layer whose unstable inputs z lie in a box [l, u] and in a ball
||z - z0||_2 <= rho, any coefficients g and any multiplier m >= 0 give

    A relu(z) >= g z + h,   h = sum_i min over [l_i, u_i] of (A_i relu(z) - g_i z + m/2 (z - z0_i)^2) - m/2 rho^2

in closed form (:mod:`cure_plugin.bounds.coupled_relu`; m = 0 where no ball is known). Here g = s A - b: s are slopes,
b multipliers of splits, free where a neuron is split (beta-CROWN: Wang et al. 2021) and 0 elsewhere. What g leaves goes
to the layers below, at last to the input set. Going up again with the minimisers gives the gradient by every s and b
(Danskin), as backpropagation would, and a point of the input set, which is a candidate for a counterexample.

Comparisons are written as numbers into tensors of the rows' dtype: converting them, or ``torch.where``, takes ten to
forty times as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cure_plugin.relaxation.corners import concave_part, mean_outputs, moved, smallest
from cure_plugin.relaxation.reduced import Layer, ReducedNet, Rows

_LEAST = 1e-9


@dataclass
class Duals:
    """One per row, over the unstable neurons N of all layers, in the order of the layers.

    Attributes:
        slopes, splits: (R, N). multipliers: of the balls, (R, K). budget: of the input set, (R,).
    """

    slopes: Tensor
    splits: Tensor
    multipliers: Tensor
    budget: Tensor

    def select(self, index: Tensor) -> Duals:
        return Duals(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def put(self, index: Tensor, other: Duals) -> None:
        """Take the rows ``index`` from ``other``."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[index] = getattr(other, name)

    def to(self, dtype: torch.dtype) -> Duals:
        return Duals(*(getattr(self, name).to(dtype) for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: list[Duals]) -> Duals:
        return Duals(*(torch.cat([getattr(part, name) for part in parts]) for name in Duals.__dataclass_fields__))


@dataclass
class Domain:
    """Where splits have left each row: 1 active, -1 inactive, 0 either, (R, N) of the rows' dtype."""

    signs: Tensor
    _ends: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _chords: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def ends(self, layer: Layer, part: slice) -> tuple[Tensor, Tensor]:
        """(lower, upper) of a layer's unstable neurons, (R, u)."""
        key = part.start, part.stop
        if key not in self._ends:
            signs = self.signs[:, part]
            self._ends[key] = layer.lower * (1 - signs.clamp(min=0)), layer.upper * (1 + signs.clamp(max=0))
        return self._ends[key]

    def chord(self, layer: Layer, part: slice) -> Tensor:
        """Slopes of the chords there, (R, u); a split neuron's own slope."""
        key = part.start, part.stop
        if key not in self._chords:
            signs = self.signs[:, part]
            self._chords[key] = layer.chord * (1 - signs.abs()) + signs.clamp(min=0)
        return self._chords[key]


@dataclass
class Found:
    """Of each row (R): its bound, and what the next step needs.

    Attributes:
        value: (R,). slopes, splits: gradients, (R, N). multipliers, budget: better ones. point: d of the input (R, n).
        layers: as they were passed.
    """

    value: Tensor
    slopes: Tensor
    splits: Tensor
    multipliers: Tensor
    budget: Tensor
    point: Tensor
    layers: list[Passed]

    def over_all(self, name: str) -> Tensor:
        """An attribute of all layers' unstable neurons, (R, N)."""
        parts = [getattr(passed, name) for passed in self.layers]
        return torch.cat(parts, 1) if parts else self.value.new_zeros(len(self.value), 0)


@dataclass
class Passed:
    """What the way down leaves of a layer's unstable neurons for the way up, and both of them for splits.

    Attributes:
        a: coefficients of what the neurons put out, (R, u). g: what is passed on, by ``slope``. h: intercepts.
        point: the minimisers. output: what they put out.
        free: where slopes are free. concave: coefficients that are bounded together with the input.
        reached: inputs at the minimisers of the layers below.
    """

    a: Tensor
    slope: Tensor
    g: Tensor
    h: Tensor
    point: Tensor
    output: Tensor
    free: Tensor | None
    concave: Tensor | None = None
    reached: Tensor | None = None


class Dual:
    """The dual of the layers that a :class:`ReducedNet` has.

    Args:
        net: in the dtype to work in.
        coupled: whether to use the balls around the layers' clean inputs.
    """

    def __init__(self, net: ReducedNet, coupled: bool) -> None:
        self.net, self.coupled = net, coupled
        self.parts = net.parts()
        self.lower, self.upper, self.clean = (
            torch.cat([net.start.x[:0], *(getattr(layer, name) for layer in net.layers)])
            for name in ("lower", "upper", "clean")
        )

    def start(self, rows: Rows) -> Duals:
        """Duals to start from: the slopes that the ReLUs have at the clean input, or CROWN's."""
        like, count = rows.bias, len(rows)
        active = self.clean > 0 if self.coupled else self.upper > -self.lower
        slopes = active.to(like).expand(count, -1).clone()
        size = sum((weight.square().sum(1) for weight in rows.weights.values()), like.new_zeros(count)).sqrt()
        radii = like.new_tensor([max(layer.radius, _LEAST) for layer in self.net.layers])
        multipliers = (size[:, None] / radii).clamp(min=_LEAST)
        if self.joint:
            multipliers[:, 0] = _LEAST  # its ball is not used
        first = rows.weights.get(0)
        first = size[:, None] if first is None else first
        return Duals(slopes, torch.zeros_like(slopes), multipliers, self.net.start.first_multiplier(first))

    def evaluate(self, rows: Rows, duals: Duals, domain: Domain | None) -> Found:
        """Bounds of ``rows`` and their gradients."""
        return self._up(*self._down(rows, duals, domain))

    def value(self, rows: Rows, duals: Duals, domain: Domain | None) -> Tensor:
        """Bounds of ``rows`` alone."""
        return self._down(rows, duals, domain)[1]

    @property
    def joint(self) -> bool:
        """Whether the first layer is bounded together with the input."""
        return bool(self.net.layers) and self.net.layers[0].jump > 0

    def _down(
        self, rows: Rows, duals: Duals, domain: Domain | None
    ) -> tuple[list[Passed], Tensor, Tensor, Tensor, Tensor]:
        """(layers as passed, bounds, better multipliers of the balls, of the budget, point of the input).

        Of a net whose first layer is bounded together with the input, the point is given by the corners' shares.
        """
        count, value = len(rows), rows.bias.clone()
        over: dict[int, Tensor] = dict(rows.weights)
        multipliers = duals.multipliers.clone()
        down: list[Passed] = []
        for k in range(len(self.net.layers), 0, -1):
            layer = self.net.layers[k - 1]
            a = over.pop(k, None)
            if a is None:
                a = value.new_zeros(count, len(layer.bias))
            passed, offset = self._through(layer, k - 1, a[:, : layer.unstable], duals, domain, multipliers)
            down.append(passed)
            g = torch.cat([passed.g, a[:, layer.unstable :]], 1)
            value += offset + g @ layer.bias
            for j, product in layer.products.items():
                over[j] = product.down(g) if j not in over else over[j] + product.down(g)
        first = over.get(0)
        if first is None:
            first = value.new_zeros(count, len(self.net.start.x))
        value += first @ self.net.start.x
        down.reverse()
        if down and down[0].concave is not None:
            layer, concave = self.net.layers[0], down[0].concave
            least, shares, _ = smallest(layer, self.net.start, concave, first)
            value += concave @ layer.clean.clamp(min=0)
            return down, value + least, multipliers, duals.budget, shares
        least, point, budget = self.net.start.minimum(first, duals.budget)
        return down, value + least, multipliers, budget, point

    def _through(
        self, layer: Layer, k: int, a: Tensor, duals: Duals, domain: Domain | None, multipliers: Tensor
    ) -> tuple[Passed, Tensor]:
        """(rows over a layer's inputs and what they leave, offsets (R,)); moves the layer's ``multipliers``."""
        part = self.parts[k]
        lower, upper = (layer.lower, layer.upper) if domain is None else domain.ends(layer, part)
        slope, free = duals.slopes[:, part], None
        concave = None
        if layer.jump:
            concave = concave_part(a, None if domain is None else domain.signs[:, part])
            a = a - concave
        coupled = self.coupled and concave is None
        if not coupled:  # where a row is negative the chord is best, whatever else
            chord = layer.chord if domain is None else domain.chord(layer, part)
            free = torch.ge(a, 0, out=torch.empty_like(a))
            slope = torch.lerp(chord.expand_as(a), slope, free)
        g = torch.mul(slope, a).sub_(duals.splits[:, part])
        rest = a - g
        if not coupled:
            at_upper, at_lower = rest.mul_(upper).clamp_(max=0), torch.mul(g, lower).neg_().clamp_(max=0)
            h = torch.minimum(at_upper, at_lower)
            low = torch.lt(at_lower, at_upper, out=torch.empty_like(a))
            output = torch.lt(at_upper, 0, out=torch.empty_like(a)).mul_(1 - low).mul_(upper)
            return Passed(a, slope, g, h, torch.addcmul(output, lower, low), output, free, concave), h.sum(1)
        m = duals.multipliers[:, k : k + 1]
        active = torch.minimum((layer.clean - rest / m).clamp(min=0), upper)
        inactive = torch.maximum((layer.clean + g / m).clamp(max=0), lower)
        at_active = torch.addcmul(rest * active, (active - layer.clean).square(), m, value=0.5)
        at_inactive = torch.addcmul(-g * inactive, (inactive - layer.clean).square(), m, value=0.5)
        h = torch.minimum(at_active, at_inactive)
        choose = torch.le(at_active, at_inactive, out=torch.empty_like(a))
        point = torch.lerp(inactive, active, choose)
        distance = (point - layer.clean).square().sum(1)
        radius = max(layer.radius, _LEAST)
        floor = 1e-5 * a.abs().amax(1) / radius + _LEAST if a.shape[1] else _LEAST
        moved = multipliers[:, k] * (distance.sqrt() / radius).clamp(0.2, 5)
        multipliers[:, k] = torch.maximum(moved, torch.as_tensor(floor).to(moved))
        offset = h.sum(1) - m.squeeze(1) / 2 * layer.radius**2
        return Passed(a, slope, g, h, point, active * choose, free), offset

    def _up(self, down: list[Passed], value: Tensor, multipliers: Tensor, budget: Tensor, point: Tensor) -> Found:
        exact: Tensor | None = None
        if down and down[0].concave is not None:
            exact, point = mean_outputs(self.net.layers[0], point), moved(self.net.layers[0], point)
        outputs: list[Tensor] = [self.net.start.x + point]
        by_slope, by_split = [], []
        for layer, passed in zip(self.net.layers, down, strict=True):
            z = sum((product.up(outputs[j]) for j, product in layer.products.items()), layer.bias)
            if z.ndim == 1:
                z = z.expand(len(value), -1)
            before = z[:, : layer.unstable]
            rest = before - passed.point
            gradient = passed.a * rest
            by_slope.append(gradient if passed.free is None else gradient * passed.free)
            by_split.append(-rest)
            passed.reached = before
            after = torch.addcmul(passed.output, passed.slope, rest)
            if passed.concave is not None and exact is not None:
                passed.h = passed.h - passed.a.clamp(min=0) * (exact - after)  # what splits can gain
                after = torch.where(passed.concave < 0, exact, after)
            outputs.append(torch.cat([after, z[:, layer.unstable :]], 1))
        empty = value.new_zeros(len(value), 0)
        slopes, splits = (torch.cat(parts, 1) if down else empty for parts in (by_slope, by_split))
        return Found(value, slopes, splits, multipliers, budget, point, down)
