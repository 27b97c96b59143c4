"""The first layer and an l1 ball together: never above what is met, exact at corners that the domain leaves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cure_plugin.relaxation import corners
from cure_plugin.relaxation.affine import AffineNet
from cure_plugin.relaxation.corners import mean_outputs, moved, smallest
from cure_plugin.relaxation.inputs import InputSet
from cure_plugin.relaxation.reduced import ReducedNet


def drawn(seed: int, eps: float) -> tuple[ReducedNet, Tensor, Tensor]:
    """(a layer of six neurons over four pixels in [0, 1], coefficients <= 0, rows over the input)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    x = torch.rand(4, generator=generator, dtype=torch.float64)
    clean = 0.1 * torch.randn(6, generator=generator, dtype=torch.float64)
    net = AffineNet(("z",), ({0: weight}, {1: torch.eye(6).double()}), (clean - weight @ x, torch.zeros(6).double()))
    start = InputSet(x, (-x).clamp(min=-eps), (1 - x).clamp(max=eps), 1, eps, joint=True)
    reduced = ReducedNet(net, start)
    reduced.add(clean - 9, clean + 9, clean, 9.0, torch.ones(6).double())
    concave = -torch.rand(3, 6, generator=generator, dtype=torch.float64)
    return reduced, concave, torch.randn(3, 4, generator=generator, dtype=torch.float64)


def points(start: InputSet) -> Tensor:
    """Corners as far as the domain lets them go, two pixels that share the radius, and what lies between."""
    steps = [start.eps * side * torch.eye(4).double() for side in (1, -1)]
    ends = torch.cat(steps)
    pairs = [share * a + (1 - share) * b for a, b in itertools.product(ends, ends) for share in (0.3, 0.5, 0.9)]
    mixed = torch.distributions.Dirichlet(torch.full((8,), 0.3).double()).sample((500,)) @ ends
    every = torch.cat([ends, torch.stack(pairs), mixed, torch.zeros(1, 4).double()])
    return torch.maximum(torch.minimum(every, start.high), start.low)


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.7, 1.5])
@pytest.mark.parametrize("seed", range(5))
def test_no_point_lies_below_the_bound(seed: int, eps: float) -> None:
    net, concave, first = drawn(seed, eps)
    layer, start = net.layers[0], net.start
    assert layer.jump == eps
    least, shares, _ = smallest(layer, start, concave, first)
    torch.manual_seed(seed)
    d = points(start)
    after = (layer.clean + d @ layer.weights[0].T).clamp(min=0) - layer.clean.clamp(min=0)
    values = concave @ after.T + first @ d.T
    assert bool((least[:, None] <= values + 1e-12).all())
    inside = bool((start.high >= eps).all() and (start.low <= -eps).all())
    nearest = values.amin(1) - least
    assert not inside or bool((nearest < 1e-12).all())
    # the point and the mean outputs explain the bound
    change = mean_outputs(layer, shares) - layer.clean.clamp(min=0)
    again = (concave * change).sum(1) + (first * moved(layer, shares)).sum(1)
    assert torch.allclose(again, least, atol=1e-9)
    assert bool((moved(layer, shares).abs().sum(1) <= eps + 1e-9).all())


def test_some_bounds_are_exact() -> None:
    exact = 0
    for seed in range(20):
        net, _, _ = drawn(seed, 0.05)
        exact += bool((net.start.high >= 0.05).all() and (net.start.low <= -0.05).all())
    assert exact >= 8


@pytest.mark.parametrize("eps", [0.05, 0.7, 1.5])
def test_few_corners_are_as_good_as_all(eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the budget ends at those that are looked at first or not."""
    for seed in range(5):
        net, concave, first = drawn(seed, eps)
        found = []
        for count in (1, 2, 100):
            monkeypatch.setattr(corners, "_CORNERS", count)
            found.append(smallest(net.layers[0], net.start, concave, first))
        for some in found[:2]:
            assert all(torch.equal(a, b) for a, b in zip(some, found[2], strict=True))
