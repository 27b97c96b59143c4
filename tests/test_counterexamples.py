"""The search for counterexamples: stronger than greedy pixels in l1, inside every set, aimed at every class in turn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SIDE, small_net
from scipy.optimize import linprog
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall, PerturbationSet, PerturbationUnion
from cure_plugin.attacks import Pgd, find_counterexample, pgd, worst_margin_loss
from cure_plugin.datasets import load_data
from cure_plugin.sets import linear_minimum
from cure_plugin.sets.linear_minimum import l1_box_maximizer


@pytest.fixture(scope="module")
def mlp() -> nn.Module:
    """60 hidden units, trained plainly on the shipped slice."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 60), nn.ReLU(), nn.Linear(60, 10))
    data = load_data("mnist-slice", False)
    x, y = data.batch(slice(0, len(data)))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(5):
        for some in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[some]), y[some]).backward()
            optimizer.step()
    return net.requires_grad_(False)


def greedy_pixels(net: nn.Module, x: Tensor, y: Tensor, budget: float) -> Tensor:
    """Which images fall when the pixel of the largest gradient times room is saturated again and again; (B,) bool."""
    broken = torch.zeros(len(x), dtype=torch.bool)
    for index in range(len(x)):
        point, left, moved = x[index : index + 1].flatten(1), budget, torch.zeros(1, x[0].numel(), dtype=torch.bool)
        while True:
            point.requires_grad_()
            value = worst_margin_loss(net(point.view(1, *x.shape[1:])), y[index : index + 1])
            broken[index] = bool(value >= 0)
            if broken[index] or left <= 1e-6:
                break
            (gradient,) = torch.autograd.grad(value, point)
            point = point.detach().clone()
            room = torch.where(gradient > 0, 1 - point, point).clamp(max=left)
            best = (gradient.abs() * room).masked_fill(moved, -1).argmax()
            amount = float(room[0, best])
            point[0, best] += gradient[0, best].sign() * amount
            moved[0, best] = True
            left = left - amount if amount > 0 else 0.0
    return broken


def test_l1_leaves_no_more_images_than_greedy_pixels(mlp: nn.Module) -> None:
    """PGD with steps of fixed sparsity left 68 of these 100."""
    x, y = load_data("mnist-slice", True).batch(slice(0, 100))
    found, points = find_counterexample(mlp, x, y, PerturbationLpBall(1, 4.0), 40, 2, torch.Generator().manual_seed(0))
    greedy = greedy_pixels(mlp, x, y, 4.0)
    assert int((~found).sum()) <= int((~greedy).sum()) < 68
    assert bool((worst_margin_loss(mlp(points[found]), y[found]) >= 0).all())
    assert torch.equal(points[~found], x[~found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("radii", ["one", "per sample"])
@pytest.mark.parametrize("domain", ["pixels", "tensors", "none"])
def test_what_is_found_lies_in_the_ball_and_is_wrong(norm: float, dtype: torch.dtype, radii: str, domain: str) -> None:
    net = small_net("plain").to(dtype)
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(12, 1, SIDE, SIDE, generator=generator, dtype=dtype)
    x[:4] = x[:4].round()  # at the ends of the domain
    with torch.no_grad():
        y = net(x).argmax(1)
    size = {1: 8.0, 2: 1.5, math.inf: 0.25}[norm]
    eps = size if radii == "one" else size * torch.linspace(0, 1, 12, dtype=dtype)
    ends = {"pixels": (0.0, 1.0), "tensors": ((x - 0.3).clamp(min=0), (x + 0.2).clamp(max=1)), "none": None}[domain]
    ball = PerturbationLpBall(norm, eps, ends)
    found, points = find_counterexample(net, x, y, ball, 20, 3, generator)
    assert points.dtype == dtype and bool(found.any())
    assert bool(ball.contains(x, points).all())
    with torch.no_grad():
        assert torch.equal(found, worst_margin_loss(net(points), y) >= 0)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_leaps_stay_in_large_balls_of_many_pixels(norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 32, 32, generator=generator)
    ball = PerturbationLpBall(norm, {1: 12.0, 2: 2.0, math.inf: 8 / 255}[norm])
    point = ball.random_start(x, generator)
    for step in range(10):
        point = ball.leap(x, point, torch.randn(x.shape, generator=generator), 1 - step / 10)
        assert bool(ball.contains(x, point).all())


class Plateau(nn.Module):
    """Class 1 is close but never wins; class 2 is far and wins where the second half of the pixels is bright."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (half.mean(1) for half in x.flatten(1).split(50, dim=1))
        near = -0.1 - torch.relu(0.6 - first)
        return torch.stack([torch.zeros_like(first), near, 4 * second - 2.6], 1)


@pytest.mark.parametrize("norm, eps", [(1, 12.0), (2, 2.0), (math.inf, 0.2)])
def test_a_run_at_the_second_class_breaks_what_the_worst_margin_does_not(norm: float, eps: float) -> None:
    net, x, y = Plateau(), torch.full((2, 1, 10, 10), 0.5), torch.zeros(2, dtype=torch.long)
    ball = PerturbationLpBall(norm, eps)
    for start in (False, True):
        point = pgd(net, x, y, ball, Pgd(40, worst_margin_loss, start), torch.Generator().manual_seed(0))
        assert bool((worst_margin_loss(net(point), y) < 0).all())
    found, points = find_counterexample(net, x, y, ball, generator=torch.Generator().manual_seed(0))
    assert bool(found.all()) and bool((net(points).argmax(1) == 2).all())
    assert bool(ball.contains(x, points).all())


@pytest.mark.parametrize("text", ["l1", "l2", "linf", "union"])
def test_the_same_generator_finds_the_same(text: str, mlp: nn.Module) -> None:
    x, y = load_data("mnist-slice", True).batch(slice(0, 20))
    balls = {"l1": (1, 3.0), "l2": (2, 1.0), "linf": (math.inf, 0.06)}
    sets: dict[str, PerturbationSet] = {name: PerturbationLpBall(*ball) for name, ball in balls.items()}
    perturbation = sets.get(text) or PerturbationUnion(list(sets.values()))
    first, again = (
        find_counterexample(mlp, x, y, perturbation, 10, 2, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert bool(perturbation.contains(x, first[1]).all())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("steps, restarts", [(1, 1), (40, 2), (100, 10)])
def test_the_work_is_at_most_that_of_so_many_restarts(classes: int, steps: int, restarts: int) -> None:
    calls = []
    weights = torch.linspace(-1, 1, 9 * classes).view(classes, 9)

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return x.flatten(1) @ weights.T + F.one_hot(torch.tensor(0), classes) * 100

    x, y = torch.full((2, 1, 3, 3), 0.5), torch.zeros(2, dtype=torch.long)
    find_counterexample(Counting(), x, y, PerturbationLpBall(2, 0.1), steps, restarts)
    assert len(calls) <= restarts * (steps + 2) + 2  # the clean points, and the last check


def test_no_work_is_spent_on_broken_samples() -> None:
    sizes = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            bright = x.flatten(1).mean(1)
            return torch.stack([torch.full_like(bright, 0.65), bright], 1)

    x, y = torch.stack([torch.full((1, 4, 4), value) for value in (0.2, 0.6)]), torch.zeros(2, dtype=torch.long)
    found, _ = find_counterexample(Counting(), x, y, PerturbationLpBall(math.inf, 0.1), 20, 2)
    assert found.tolist() == [False, True]
    assert sizes[:2] == [2, 2] and set(sizes[3:-1]) == {1}


class Lower(PerturbationLpBall):
    """A ball whose points are nowhere brighter than the clean image: a refinement that defines no leap."""

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        return torch.minimum(super().project(x, point), x)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.project(x, super().random_start(x, generator))

    def select(self, x: Tensor, index: Tensor) -> Lower:
        return self


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_sets_that_refine_the_projection_are_obeyed(norm: float, mlp: nn.Module) -> None:
    x, y = load_data("mnist-slice", True).batch(slice(0, 30))
    found, points = find_counterexample(mlp, x, y, Lower(norm, {1: 6.0, 2: 2.0, math.inf: 0.2}[norm]), 10, 2)
    assert bool(found.any()) and bool((points <= x + 1e-6).all())


@pytest.mark.parametrize("few", [1, 64])
def test_the_l1_maximizer_equals_a_linear_program(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_minimum, "_FEW", few)
    generator = torch.Generator().manual_seed(0)
    for eps in (0.0, 0.4, 3.0, 50.0):
        a = torch.randn(4, 9, generator=generator, dtype=torch.float64)
        low, high = -torch.rand(2, 4, 9, generator=generator, dtype=torch.float64)
        high = -high
        found = l1_box_maximizer(a, low, high, torch.full((4, 1), eps, dtype=torch.float64))
        assert bool((found >= low).all() and (found <= high).all())
        assert bool((found.abs().sum(1) <= eps + 1e-12).all())
        for row in range(4):
            cost = torch.cat([-a[row], a[row]]).numpy()
            bounds = [(0, float(end)) for end in (*high[row], *-low[row])]
            best = -linprog(cost, A_ub=[[1.0] * 18], b_ub=[eps], bounds=bounds).fun
            assert float((a[row] * found[row]).sum()) == pytest.approx(best, abs=1e-9)


def test_l1_projections_do_not_depend_on_the_rest_of_the_batch() -> None:
    """Batches that lie inside the ball take a short cut: training's points must be the same bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 6, 6, generator=generator)
    point = x + torch.randn(x.shape, generator=generator) * torch.tensor([0.01, 0.01, 1.0, 1.0]).view(4, 1, 1, 1)
    ball = PerturbationLpBall(1, 2.0)
    together = ball.project(x, point)
    assert torch.equal(together[:2], ball.project(x[:2], point[:2]))
    assert not torch.equal(together[2:], point[2:])
