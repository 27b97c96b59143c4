"""The table: every set x every bound method x every kind of net x both precisions, attacked."""

from __future__ import annotations

import math

import pytest
import torch
from bound_checks import bounds, crossing, extremes
from conftest import FRONTS, SIDE, small_net
from torch import nn

from cure_plugin import PerturbationL0, PerturbationLpBall, PerturbationPatch, PerturbationSet, PerturbationUnion
from cure_plugin.sets import PerturbationGeometric

METHODS = ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN")

SETS: dict[str, PerturbationSet] = {
    "l1": PerturbationLpBall(1, 1.5),
    "l2": PerturbationLpBall(2, 0.6),
    "linf": PerturbationLpBall(math.inf, 0.08),
    "l2-uncut": PerturbationLpBall(2, 0.6, domain=None),
    "l0": PerturbationL0(2),
    "patch": PerturbationPatch(3, 2),
    "patch-block": PerturbationPatch(2, 2, (2, 4, 1, 5)),
    "rotation": PerturbationGeometric.parse("R(8)"),
    "composition": PerturbationGeometric.parse("Sh(3) Sc(4) C(5) B(0.02)"),
    "union": PerturbationUnion(
        [PerturbationLpBall(1, 1.5), PerturbationLpBall(math.inf, 0.05), PerturbationGeometric.parse("T(0.3,0.2)")]
    ),
}


class Residual(nn.Module):
    """A residual block in front of a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(1, 4, 1, stride=2)
        self.last = nn.Linear(4 * (SIDE // 2) ** 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.relu(self.first(x))) + self.shortcut(x)
        return self.last(torch.relu(hidden).flatten(1))


def pooling(kind: type[nn.Module]) -> nn.Sequential:
    """A classifier that pools between its convolutions."""
    front = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), kind(2), nn.Conv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(16, 3))


def net_of(kind: str) -> tuple[nn.Module, int]:
    """(a classifier in eval mode, its input channels)."""
    if kind == "residual":
        return Residual().eval(), 1
    if kind == "average-pooling":
        return pooling(nn.AvgPool2d).eval(), 1
    if kind == "max-pooling":
        return pooling(nn.MaxPool2d).eval(), 1
    if kind == "colour":
        return small_net("normalize", 3), 3
    return small_net(kind), 1


NETS = (*FRONTS, "colour", "residual", "average-pooling", "max-pooling")


def check(kind: str, name: str, dtype: torch.dtype, samples: int, optimised: int, alpha_iterations: int) -> None:
    net, channels = net_of(kind)
    net = net.to(dtype)
    x = torch.rand(3, channels, SIDE, SIDE, dtype=dtype)
    x = torch.where(x < 0.3, 0.0, torch.where(x > 0.8, 1.0, x))
    reached = extremes(net, x, SETS[name], samples, optimised)
    for method in METHODS:
        if (kind, method) == ("max-pooling", "alpha-CROWN"):
            continue  # auto_LiRPA 0.3 raises TypeError there, for any set
        lower, upper = bounds(net, x, SETS[name], method, alpha_iterations)
        assert lower.dtype == dtype and bool((lower <= upper).all())
        assert crossing(lower, upper, reached) <= 1e-5, method


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ("normalize", "batch-norm", "residual", "average-pooling", "colour"))
def test_no_point_crosses_a_bound(kind: str, name: str) -> None:
    check(kind, name, torch.float32, 900, 60, alpha_iterations=3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", NETS)
def test_many_points_cross_no_bound(kind: str, name: str, dtype: torch.dtype) -> None:
    check(kind, name, dtype, 100_000, 1_000, alpha_iterations=20)
