"""What tests of branch and bound share: searches that keep what they proved, and exact minima of small nets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall
from cure_plugin.bounds.module import bounded_module
from cure_plugin.relaxation.affine import AffineNet, affine_net
from cure_plugin.relaxation.dual import Domain, Duals
from cure_plugin.relaxation.recheck import certified
from cure_plugin.relaxation.root import Root
from cure_plugin.relaxation.search import Limits, Search


@dataclass(frozen=True)
class Leaf:
    """A subdomain that was proved.

    Attributes:
        row: of which margin. signs: of its splits, (N,). duals: one row, what the proof rests on.
    """

    row: int
    signs: Tensor
    duals: Duals

    def reach(self, values: Tensor) -> Tensor:
        """How far inside points lie, of their ``values`` (P, N) at unstable neurons, (P,); infinite without splits."""
        split = self.signs.nonzero().flatten()
        if len(split) == 0:
            return values.new_full((len(values),), math.inf)
        return (values[:, split] * self.signs[split]).amin(1)


class Recording(Search):
    """Keeps the subdomains that were proved; looks for no counterexamples."""

    def __init__(self, start: Root, limits: Limits) -> None:
        super().__init__(start, limits, lambda *_: False)
        self.leaves: list[Leaf] = []

    def _settle(self, classes: Tensor, signs: Tensor, value: Tensor, duals: Duals) -> Tensor:
        left = super()._settle(classes, signs, value, duals)
        done = torch.ones(len(classes), dtype=torch.bool)
        done[left] = False
        for index in done.nonzero():
            self.leaves.append(Leaf(int(classes[index]), signs[index[0]].clone(), duals.select(index)))
        return left

    def bound(self, leaf: Leaf) -> float:
        """Its bound again, by itself and in float64, less what rounding can have added."""
        start, row = self.start, torch.tensor([leaf.row])
        rows, sizes, duals = start.margins.select(row), start.sizes[row], leaf.duals.to(torch.float64)
        domain = Domain(leaf.signs[None].double())
        return float(certified(start.exact, rows, sizes, duals, domain, start.coupled, start.terms))


def unstable_values(start: Root, points: Tensor) -> Tensor:
    """What the unstable neurons take at points (P, *input), (P, N)."""
    values = start.exact.net.forward(points.flatten(1).double())
    pairs = zip(values, start.exact.layers, strict=False)
    return torch.cat([values[-1][:, :0], *(z[:, layer.kept[: layer.unstable]] for z, layer in pairs)], 1)


def smallest_margin(net: nn.Module, x: Tensor, y: int, ball: PerturbationLpBall) -> float:
    """The exact minimum over an linf or l1 ball, by a linear programme per class and activation pattern that occurs."""
    bounded = bounded_module(net, tuple(x.shape[1:]), self_check=False)
    bounded(x)
    polytope = _Polytope.around(x, ball)
    margins = (
        polytope.minimum(row[y] - row[j], bias[y] - bias[j], rows, ends)
        for row, bias, rows, ends in _pieces(affine_net(bounded), polytope)
        for j in range(len(bias))
        if j != y
    )
    return min(margins)


@dataclass(frozen=True)
class _Polytope:
    """All x + p - n with 0 <= p <= high, 0 <= n <= -low and, where there is a budget, sum (p + n) <= budget."""

    x: np.ndarray
    room: np.ndarray
    budget: float

    @staticmethod
    def around(x: Tensor, ball: PerturbationLpBall) -> _Polytope:
        wide = x.double()
        low, high = ((end - wide).flatten().numpy() for end in ball.box(wide))
        return _Polytope(wide.flatten().numpy(), np.concatenate([high, -low]), ball.eps if ball.p == 1 else math.inf)

    def minimum(self, row: np.ndarray, bias: float, rows: np.ndarray, ends: np.ndarray) -> float:
        """Of ``row . input + bias`` where ``rows @ input <= ends``; infinite where that is nowhere."""
        split = np.concatenate([rows, -rows], axis=1)
        limits = ends - rows @ self.x
        if self.budget < math.inf:
            split, limits = np.concatenate([split, np.ones((1, len(self.room)))]), np.append(limits, self.budget)
        bounds = np.stack([np.zeros_like(self.room), self.room], 1)
        found = linprog(np.concatenate([row, -row]), split, limits, bounds=bounds)
        assert found.status in (0, 2), found.message
        return found.fun + row @ self.x + bias if found.status == 0 else math.inf


def _pieces(net: AffineNet, polytope: _Polytope) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(matrix, bias of the logits, rows, ends) of each activation pattern that occurs: where ``rows @ input <= ends``.

    Neurons are decided one after the other, and what is empty by then is left out with all that it would hold.
    """
    count = len(polytope.x)
    nothing = np.zeros(count)
    matrices = [{j: weight.numpy() for j, weight in weights.items()} for weights in net.weights]
    biases = [bias.numpy() for bias in net.biases]

    def inputs_of(k: int, outputs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        matrix = sum(weight @ outputs[j][0] for j, weight in matrices[k].items())
        return matrix, sum(weight @ outputs[j][1] for j, weight in matrices[k].items()) + biases[k]

    pending = [([(np.eye(count), nothing)], np.zeros((0, count)), np.zeros(0), np.zeros(0))]
    while pending:
        outputs, rows, ends, on = pending.pop()
        matrix, bias = inputs_of(len(outputs) - 1, outputs)
        if len(outputs) == len(biases):
            yield matrix, bias, rows, ends
        elif len(on) == len(bias):
            pending.append(([*outputs, (on[:, None] * matrix, on * bias)], rows, ends, np.zeros(0)))
        else:
            for active in (0.0, 1.0):
                sign = 1 - 2 * active
                more = np.concatenate([rows, sign * matrix[len(on), None]])
                up_to = np.append(ends, -sign * bias[len(on)])
                if polytope.minimum(nothing, 0.0, more, up_to) < math.inf:
                    pending.append((outputs, more, up_to, np.append(on, active)))
