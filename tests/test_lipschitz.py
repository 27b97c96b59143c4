"""Norms of layers: power iteration against upper bounds, and the bounds against attacks."""

from __future__ import annotations

import math

import pytest
import torch
from net_attacks import image, sets_for, worst
from random_nets import draw
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall
from cure_plugin.attacks import worst_margin_loss
from cure_plugin.bounds.lipschitz import LayerNorms, kept_norms
from cure_plugin.bounds.module import bounded_module
from cure_plugin.bounds.radii import GraphRadii, Radius
from cure_plugin.certification import Certifier, LipschitzBound
from cure_plugin.errors import SpecError
from cure_plugin.nets import Normalize
from cure_plugin.training import LipschitzMargin, lipschitz_loss
from cure_plugin.training.batch_norm import batch_statistics

SHAPE = (2, 6, 6)


class Residual(nn.Module):
    """A sum of two branches, one of them normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.last((self.norm(self.b(y)) + y).relu().flatten(1))


NETS = {
    "strided": lambda: nn.Sequential(
        Normalize([0.1, 0.2], [0.3, 0.3]),
        nn.Conv2d(2, 4, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    ),
    "normalised": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ),
    "residual": Residual,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return net


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("name", NETS)
def test_no_gradient_is_steeper(name: str, p: float) -> None:
    net = made(name)
    apart = LayerNorms().distances(bounded_module(net, SHAPE), p, 100)
    dual = {1: math.inf, 2: 2, math.inf: 1}[p]
    steepest = torch.zeros(3, 3)
    for x in torch.rand(20, 1, *SHAPE):
        rows = torch.autograd.functional.jacobian(lambda point: net(point)[0], x).flatten(1)
        local = (rows[:, None] - rows[None]).norm(p=dual, dim=2)
        steepest = torch.maximum(steepest, local)
    assert bool((apart >= steepest * (1 - 1e-4)).all())
    if name == "linear":
        assert torch.allclose(apart, steepest, rtol=1e-4)


@pytest.mark.parametrize("name", ["strided", "normalised", "pooled", "linear"])
def test_power_iteration_comes_close_from_below(name: str) -> None:
    net = made(name)
    bounded, ball = bounded_module(net, SHAPE), PerturbationLpBall(2, 0.5)
    exact = GraphRadii().apart(bounded.final_node(), Radius(*ball.radii(torch.full((1, *SHAPE), 0.5))))[0]
    norms = LayerNorms()
    first, later = (0.5 * norms.distances(bounded, 2, steps) for steps in (1, 300))
    assert bool((later <= exact * (1 + 1e-5)).all()) and bool((later >= first * (1 - 1e-5)).all())
    others = ~torch.eye(3).bool()
    assert bool((later[others] >= 0.6 * exact[others]).all())  # of any grid, these are small


def test_vectors_are_kept_until_they_are_forgotten() -> None:
    bounded = bounded_module(made("strided"), SHAPE)
    norms = kept_norms(bounded)
    assert kept_norms(bounded) is norms
    first, second = norms.distances(bounded, 2), norms.distances(bounded, 2)
    norms.restart()
    assert torch.equal(norms.distances(bounded, 2), first) and not torch.equal(first, second)


def test_a_part_of_a_ball_is_the_smaller_ball() -> None:
    net = made("strided")
    x, y = torch.rand(4, *SHAPE), torch.arange(4) % 3
    ball, part = PerturbationLpBall(2, 0.4), PerturbationLpBall(2, 0.1)
    of_part = lipschitz_loss(bounded_module(net, SHAPE), net, x, y, ball, ratio=0.25)
    assert torch.allclose(of_part.vector, lipschitz_loss(bounded_module(net, SHAPE), net, x, y, part).vector)
    with pytest.raises(SpecError, match="ratio must lie in"):
        LipschitzMargin(ratio=1.5)


def test_every_weight_has_a_gradient_and_batch_statistics_count() -> None:
    net = made("normalised").train()
    bounded, x = bounded_module(net, SHAPE), torch.rand(8, *SHAPE)
    with batch_statistics(bounded, net, x):
        by_batch = LayerNorms().distances(bounded, 2, 50)
        by_batch.sum().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if name.endswith("weight"))
    assert not torch.allclose(by_batch, LayerNorms().distances(bounded, 2, 50), rtol=1e-2)


def test_what_has_no_norm_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 1), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(SpecError, match=r"node .* \(MaxPool\) has no norm"):
        LayerNorms().distances(bounded_module(net, SHAPE), 2)


def crossed(seed: int) -> str:
    """What lies below the reported bound of a drawn net, over its l2 and l1 balls; empty where nothing does."""
    drawn = draw(seed)
    try:
        certifier = Certifier(drawn.build(), drawn.shape, [LipschitzBound()])
    except SpecError:
        return ""
    x, net = image(drawn), certifier.net
    with torch.no_grad():
        y = net(x).argmax(1)
    for name in ("l2", "l1"):
        ball = sets_for(drawn.shape, seed)[name]
        bound = float(certifier.lower_bound(x, y, ball, "lipschitz"))
        with torch.no_grad():
            margin = -float(worst_margin_loss(net(worst(net, x, y, ball, 30)), y))
        if bound > margin + 1e-4 * max(1.0, abs(margin)):
            return f"{name}: margin {margin:.6g} lies below the bound {bound:.6g}\n{drawn.script()}"
    return ""


@pytest.mark.parametrize("first", [pytest.param(n, marks=pytest.mark.slow if n else ()) for n in range(0, 100, 10)])
def test_the_reported_bound_is_never_crossed(first: int) -> None:
    for seed in range(first, first + 10):
        broken = crossed(seed)
        assert not broken, broken


def test_it_proves_what_was_trained_for_it() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 72), nn.ReLU(), nn.Linear(72, 2))
    with torch.no_grad():
        nn.init.orthogonal_(net[1].weight)
        net[1].bias.zero_()
        net[3].weight[0], net[3].weight[1] = 0.1, 0
        net[3].bias[0], net[3].bias[1] = 1, 0
    x, y = torch.rand(1, *SHAPE), torch.tensor([0])
    verdict = Certifier(net, SHAPE, [LipschitzBound()]).decide(x, y, PerturbationLpBall(2, 0.5))[0][0]
    assert (verdict.status, verdict.stage) == ("proved", "lipschitz")
