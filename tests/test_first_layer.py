"""The first layer's interval is exact for the set, and auto_LiRPA's own classes show why that is needed."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
from conftest import shifted_batch_norm, small_net
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall, PerturbationUnion
from cure_plugin.bounds.module import bounded_module
from cure_plugin.nets import Normalize
from cure_plugin.sets.rows import rows_of_matrix

BALLS = [PerturbationLpBall(1, 1.5), PerturbationLpBall(2, 0.6), PerturbationLpBall(2, 0.6, None)]


def exact_range(layer: nn.Module, x: Tensor, ball: PerturbationLpBall) -> tuple[Tensor, Tensor]:
    """Range of an affine layer over the ball, by its dense Jacobian: no code of the hook."""
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v).flatten(1).sum(0), x[:1]).flatten(1)
    rows = rows_of_matrix(jacobian.expand(len(x), -1, -1), tuple(x.shape[1:]))
    at_clean = layer(x).flatten(1)
    return at_clean + ball.deviation(x, rows), at_clean - ball.deviation(x, rows.negated())


@pytest.mark.parametrize("ball", BALLS, ids=repr)
@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 4, 3, 2, 1)],
        [Normalize([0.3], [0.25]), nn.Conv2d(1, 4, 3, 2, 1)],
        [shifted_batch_norm(1), nn.Conv2d(1, 4, 3, 2, 1, bias=False)],
        [nn.Conv2d(1, 4, 3, dilation=2), shifted_batch_norm(4)],
        [nn.Flatten(), nn.Linear(64, 5)],
        [Normalize([0.3], [0.25]), nn.Flatten(), nn.Linear(64, 5)],
    ],
    ids=["conv", "normalize", "batch-norm", "conv-bn", "linear", "normalize-linear"],
)
def test_ibp_of_the_first_layer_is_exact(layers: list[nn.Module], ball: PerturbationLpBall, images: Tensor) -> None:
    front = nn.Sequential(*layers).eval()
    net = nn.Sequential(*layers, nn.ReLU()).eval()
    bounded = bounded_module(net, (1, 8, 8))
    bounded.compute_bounds(x=(BoundedTensor(images, ball),), method="IBP")
    node = bounded.relus[0].inputs[0]
    lower, upper = exact_range(front, images, ball)
    assert torch.allclose(node.lower.flatten(1), lower, atol=1e-5)
    assert torch.allclose(node.upper.flatten(1), upper, atol=1e-5)


def test_linf_and_stock_perturbations_are_left_alone(images: Tensor) -> None:
    net = small_net("plain")
    ours = PerturbationLpBall(math.inf, 0.1, domain=None)
    stock = PerturbationLpNorm(norm=math.inf, eps=0.1)
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        one = bounded_module(net, (1, 8, 8)).compute_bounds(x=(BoundedTensor(images, ours),), method=method)
        other = BoundedModule(net, images).compute_bounds(x=(BoundedTensor(images, stock),), method=method)
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_ours_beats_the_stock_class_for_l2(images: Tensor) -> None:
    """Where auto_LiRPA is sound (a convolution first), the exact first layer is at least as tight everywhere."""
    net = small_net("plain")
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        ours = BoundedTensor(images, PerturbationLpBall(2, 0.5))
        stock = BoundedTensor(images, PerturbationLpNorm(norm=2, eps=0.5))
        lower, upper = BoundedModule(net, images).compute_bounds(x=(ours,), method=method)
        stock_lower, stock_upper = BoundedModule(net, images).compute_bounds(x=(stock,), method=method)
        assert (upper - lower).sum().item() < (stock_upper - stock_lower).sum().item()


def test_union_covers_its_members(images: Tensor) -> None:
    net = small_net("normalize")
    members = [PerturbationLpBall(1, 1.5), PerturbationLpBall(2, 0.4), PerturbationLpBall(math.inf, 0.05)]
    union = bounded_module(net, (1, 8, 8)).compute_bounds(
        x=(BoundedTensor(images, PerturbationUnion(members)),), method="CROWN"
    )
    for member in members:
        lower, upper = bounded_module(net, (1, 8, 8)).compute_bounds(x=(BoundedTensor(images, member),), method="CROWN")
        assert bool((union[0] <= lower + 1e-5).all() and (union[1] >= upper - 1e-5).all())


def stock_violation(net: nn.Module, images: Tensor, norm: float, eps: float) -> float:
    """How far sampled points of the uncut ball cross the stock class's IBP bounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = BoundedTensor(images, PerturbationLpNorm(norm=norm, eps=eps))
        lower, upper = BoundedModule(net, images).compute_bounds(x=(stock,), method="IBP")
    ball = PerturbationLpBall(norm, eps, domain=None)
    worst = 0.0
    for _ in range(300):
        output = net(ball.sample(images))
        worst = max(worst, float((lower - output).max()), float((output - upper).max()))
    return worst


def test_hazard_stock_l2_loses_its_radius_behind_a_subtraction(images: Tensor) -> None:
    """Documentation of a hazard in auto_LiRPA 0.3 and 0.7.1, not of this package: see docs/design.md."""
    assert stock_violation(small_net("raw-normalize"), images, 2.0, 0.6) > 0.01


def test_hazard_stock_l1_drops_the_shift_of_a_first_batch_norm(images: Tensor) -> None:
    """Documentation of a hazard in auto_LiRPA 0.3 and 0.7.1, not of this package: see docs/design.md."""
    front = shifted_batch_norm(1)
    with torch.no_grad():
        front.bias.fill_(3.0)
    assert stock_violation(nn.Sequential(front, *small_net("plain")).eval(), images, 1.0, 0.01) > 0.01
