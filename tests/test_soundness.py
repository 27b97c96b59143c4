"""No sampled or optimised point of a set crosses a bound, whatever stands between input and first layer."""

from __future__ import annotations

import math

import pytest
import torch
from auto_LiRPA import BoundedTensor
from bound_checks import bounds, violation
from conftest import FRONTS, small_net
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall, PerturbationUnion
from cure_plugin.attacks import Pgd, pgd
from cure_plugin.bounds.module import bounded_module

SETS = {
    "l1": PerturbationLpBall(1, 1.5),
    "l2": PerturbationLpBall(2, 0.6),
    "linf": PerturbationLpBall(math.inf, 0.08),
    "l2-uncut": PerturbationLpBall(2, 0.6, domain=None),
    "union": PerturbationUnion([PerturbationLpBall(1, 1.5), PerturbationLpBall(math.inf, 0.05)]),
}


@pytest.mark.parametrize("method", ("IBP", "CROWN-IBP", "CROWN"))
@pytest.mark.parametrize("name", ("l1", "l2"))
@pytest.mark.parametrize("front", ("normalize", "raw-normalize", "batch-norm"))
def test_many_points_behind_normalisation(front: str, name: str, method: str, images: Tensor) -> None:
    net = small_net(front)
    lower, upper = bounds(net, images, SETS[name], method)
    assert violation(net, images, SETS[name], lower, upper, 100_000, 1_000) <= 1e-5


@pytest.mark.parametrize("name", SETS)
def test_bounds_are_tight_enough_to_catch_a_doubled_radius(name: str, images: Tensor) -> None:
    """On an affine net every bound is attained, so neither a sign nor a radius can be wrong unnoticed."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    lower, upper = bounds(net, images, SETS[name], "CROWN")
    assert violation(net, images, SETS[name], lower, upper, 3000, 60) <= 1e-5
    for j in range(3):
        for sign, bound in ((1, upper), (-1, lower)):
            y = torch.zeros(3, dtype=torch.long)
            point = pgd(net, images, y, SETS[name], Pgd(300, lambda z, _, j=j, sign=sign: sign * z[:, j]))
            with torch.no_grad():
                reached = net(point)[:, j]
            width = (upper - lower)[:, j]
            assert bool(((reached - bound[:, j]).abs() <= 0.1 * width).all())


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("name", ("l1", "l2"))
def test_float64_agrees(front: str, name: str, images: Tensor) -> None:
    net = small_net(front)
    single = bounds(net, images, SETS[name], "CROWN")
    double = bounds(net.double(), images.double(), SETS[name], "CROWN")
    for one, other in zip(single, double, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-4)


class Reshaped(nn.Module):
    """Another geometry than the input's before the first convolution."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.convolution = nn.Conv2d(shape[0], 3, 3, padding=1)
        self.linear = nn.Linear(3 * shape[1] * shape[2], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.convolution(x.view(-1, *self.shape))).flatten(1))


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
@pytest.mark.parametrize("name", ["l1", "l2", "linf"])
@pytest.mark.parametrize("shape", [(1, 4, 16), (4, 4, 4)])
def test_a_reshape_before_the_first_layer(shape: tuple[int, ...], name: str, method: str, images: Tensor) -> None:
    net = Reshaped(*shape).eval()
    lower, upper = bounds(net, images, SETS[name], method)
    assert violation(net, images, SETS[name], lower, upper, 3000, 60) <= 1e-5


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
@pytest.mark.parametrize("name", ["l1", "l2"])
def test_flat_inputs(name: str, method: str, images: Tensor) -> None:
    net, x = Reshaped(1, 8, 8).eval(), images.flatten(1)
    lower, upper = bounds(net, x, SETS[name], method)
    for _ in range(300):
        output = net(SETS[name].sample(x))
        assert bool(((output >= lower - 1e-5) & (output <= upper + 1e-5)).all())


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
@pytest.mark.parametrize("name", ["l1", "l2", "linf"])
@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions(groups: int, name: str, method: str, images: Tensor) -> None:
    """auto_LiRPA's patches mode bounds these wrongly; bounded_module chooses matrix mode."""
    grouped = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
    front = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=groups)]
    net = nn.Sequential(*front, nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    bounded = bounded_module(net, (1, 8, 8))
    lower, upper = bounded.compute_bounds(x=(BoundedTensor(images, SETS[name]),), method=method)
    assert violation(net, images, SETS[name], lower.detach(), upper.detach(), 3000, 60) <= 1e-5


def test_running_statistics_are_shared_with_the_wrapper(images: Tensor) -> None:
    net = small_net("conv-batch-norm")
    bounded = bounded_module(net, (1, 8, 8))
    with torch.no_grad():
        net[1].running_mean.add_(1.0)
        net[1].running_var.mul_(2.0)
    lower, upper = bounded.compute_bounds(x=(BoundedTensor(images, SETS["l2"]),), method="CROWN")
    assert violation(net, images, SETS["l2"], lower.detach(), upper.detach(), 3000, 60) <= 1e-5
    net.train()
    bounded.train()
    before = net[1].running_mean.clone()
    bounded(images)
    assert not torch.equal(before, net[1].running_mean)
