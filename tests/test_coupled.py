"""Norm-coupled ReLU bounds: the closed form, the norms under it, never looser than CROWN, never crossed."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from bound_checks import crossing, extremes
from conftest import SIDE, small_net
from test_table import Residual
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall, PerturbationPatch, PerturbationSet, PerturbationUnion
from cure_plugin.bounds import coupled_relu
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.bounds.coupled_relu import coupled_offset
from cure_plugin.bounds.margins import lower_margins
from cure_plugin.bounds.module import bounded_module
from cure_plugin.bounds.norms import column_norms, convolution_norm, matrix_norm
from cure_plugin.bounds.radii import GraphRadii, Radius

SETS: dict[str, PerturbationSet] = {
    "l2": PerturbationLpBall(2, 0.6),
    "l1": PerturbationLpBall(1, 1.5),
    "linf": PerturbationLpBall(float("inf"), 0.05),
    "patch": PerturbationPatch(2, 2),
    "union": PerturbationUnion([PerturbationLpBall(2, 0.5), PerturbationLpBall(1, 1.0)]),
}


def convolution_matrix(weight: Tensor, size: int, **options: int) -> Tensor:
    """The dense matrix (outputs, inputs) of a convolution."""
    shape = (1, weight.shape[1], size, size)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: F.conv2d(v, weight, None, **options), torch.zeros(shape).double()
    )
    return jacobian.reshape(-1, weight.shape[1] * size * size)


@pytest.mark.parametrize(
    "stride, padding, dilation, kernel", [(1, 1, 1, 3), (2, 1, 1, 4), (2, 0, 1, 3), (3, 2, 2, 3), (1, 0, 1, 1)]
)
def test_convolution_norms_bound_the_dense_matrix(stride: int, padding: int, dilation: int, kernel: int) -> None:
    weight = torch.randn(5, 2, kernel, kernel, dtype=torch.float64)
    matrix = convolution_matrix(weight, 9, stride=stride, padding=padding, dilation=dilation)
    exact = float(torch.linalg.svdvals(matrix)[0])
    pairs = (stride, stride), (padding, padding), (dilation, dilation)
    bound = convolution_norm(weight, *pairs, (9, 9))
    assert exact <= bound <= 1.25 * exact
    assert matrix_norm(matrix) == pytest.approx(exact, rel=1e-6)
    l1, l2 = column_norms(weight, pairs[0], pairs[2])
    assert float(matrix.abs().sum(0).max()) <= l1 * (1 + 1e-9)
    assert float(matrix.norm(dim=0).max()) <= l2 * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_offset_holds_for_any_slope_and_multiplier_and_is_attained(seed: int) -> None:
    torch.manual_seed(seed)
    size = 6
    clean, a = torch.randn(size).double(), torch.randn(size).double()
    lower, upper = clean - torch.rand(size).double(), clean + torch.rand(size).double()
    radius = torch.tensor(0.1 + float(torch.rand(()))).double()
    share = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, torch.rand(size).double()))
    slope = a * share
    direction = torch.randn(20_000, size).double()
    length = radius * torch.rand(20_000, 1).double() ** (1 / size)
    points = clean + direction / direction.norm(dim=1, keepdim=True) * length
    points = torch.minimum(torch.maximum(points, lower), upper)  # clipping towards the centre stays in the ball
    gaps = []
    for multiplier in (0.0, 0.1, 1.0, 10.0, 1e4):
        m = torch.tensor([multiplier]).double()
        offset, _ = coupled_offset(a[None], slope[None], m, (lower, upper), clean, radius)
        gap = (points.relu() @ a - points @ slope - offset).min()
        assert float(gap) >= -1e-9
        gaps.append(float(gap))
    assert min(gaps) < 0.5


def test_offset_gradient_matches_finite_differences() -> None:
    clean, a = torch.randn(3, 5).double(), torch.randn(4, 3, 5).double().requires_grad_()
    lower, upper = clean - torch.rand(3, 5).double(), clean + torch.rand(3, 5).double()
    slope = (a.detach() * torch.rand(4, 3, 5).double()).requires_grad_()
    multiplier, radius = torch.rand(4, 3).double(), torch.rand(3).double()
    assert torch.autograd.gradcheck(
        lambda *rows: coupled_offset(*rows, multiplier, (lower, upper), clean, radius)[0], (a, slope)
    )


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, a = torch.randn(1, 3, 5), torch.randn(4, 3, 5)
    box = clean - torch.rand(4, 3, 5), clean + torch.rand(4, 3, 5)
    rest = a * torch.rand(4, 3, 5), torch.rand(4, 3), box, clean, torch.rand(3)
    whole = coupled_offset(a, *rest)
    monkeypatch.setattr(coupled_relu, "_CACHED_ELEMENTS", 16)
    for one, other in zip(whole, coupled_offset(a, *rest), strict=True):
        assert torch.equal(one, other)


def random_case(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A net of one of several kinds with weights of a random size, images and labels; float64."""
    torch.manual_seed(seed)
    kinds = ("plain", "normalize", "batch-norm", "conv-batch-norm", "linear", "residual")
    kind = kinds[seed % len(kinds)]
    net = (Residual().eval() if kind == "residual" else small_net(kind)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5 + 1.5 * float(torch.rand(())))
    x = torch.rand(2, 1, SIDE, SIDE, dtype=torch.float64)
    return net, torch.where(x < 0.3, 0.0, x), torch.randint(3, (2,))


class Margins(nn.Module):
    """z_y - z_j for j != y, padded with nothing: three classes give two margins."""

    def __init__(self, net: nn.Module, y: Tensor) -> None:
        super().__init__()
        self.net, self.y = net, y

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        y = self.y.repeat(len(x) // len(self.y))
        others = torch.tensor([[1, 2], [0, 2], [0, 1]])[y]
        return z.gather(1, y[:, None]) - z.gather(1, others)


def check(seed: int, name: str, samples: int, optimised: int) -> float:
    """Gain over CROWN; asserts that no point crosses the margins and that no margin is below CROWN's."""
    net, x, y = random_case(seed)
    bounded = bounded_module(net, tuple(x.shape[1:]))
    with torch.no_grad():
        crown = lower_margins(bounded, x, y, SETS[name], "CROWN")
    found = CoupledBounds(bounded, 6, 4, 2).bounds(x, y, SETS[name], torch.full((2,), torch.inf)).margins
    assert found.dtype == torch.float64
    assert bool((found >= crown).all())
    reached = extremes(Margins(net, y), x, SETS[name], samples, optimised)
    assert crossing(found, torch.full_like(found, torch.inf), reached) <= 0
    return float((found - crown).mean())


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("seed", range(6))
def test_never_looser_than_crown_and_never_crossed(seed: int, name: str) -> None:
    gain = check(seed, name, 600, 60)
    assert gain >= 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(500))
def test_many_nets(seed: int) -> None:
    for name in ("l2", "l1"):
        check(seed, name, 2000, 200)


def test_tighter_than_crown_where_it_matters() -> None:
    assert check(1, "l2", 600, 60) > 0.1


def test_one_multiplier_step_from_any_start_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        coupled_relu, "_search", lambda a, slope, box, clean, radius: 10 ** (4 * torch.rand_like(a[..., 0]) - 2)
    )
    for seed in range(6):
        check(seed, "l2", 600, 60)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e3])
def test_extreme_radii_give_finite_bounds(eps: float) -> None:
    net, x, y = random_case(1)
    bounded = bounded_module(net, tuple(x.shape[1:]))
    ball, never = PerturbationLpBall(2, eps), torch.full((2,), torch.inf)
    found = CoupledBounds(bounded, 40, 4, 2).bounds(x, y, ball, never).margins
    assert bool(torch.isfinite(found).all())
    if eps < 1:
        assert torch.allclose(found, Margins(net, y)(x), atol=1e-6)


def test_radii_bound_what_points_of_the_set_do() -> None:
    for seed in range(6):
        net, x, _ = random_case(seed)
        bounded = bounded_module(net, tuple(x.shape[1:]))
        with torch.no_grad():
            bounded(x)
            clean = {relu.inputs[0].name: relu.inputs[0].forward_value for relu in bounded.relus}
            lower_margins(bounded, x, torch.zeros(2, dtype=torch.long), SETS["l1"], "CROWN")
            radii, start = GraphRadii(), Radius(*SETS["l1"].radii(x))
            nodes = [relu.inputs[0] for relu in bounded.relus]
            l2 = {node.name: radii.at(node, start, {}, clean).l2 for node in nodes}
            reach = {node.name: radii.reach(node, start, {}, clean) for node in nodes}
            for _ in range(50):
                bounded(SETS["l1"].sample(x))
                for node in nodes:
                    moved = node.forward_value - clean[node.name]
                    assert bool((moved.flatten(1).norm(dim=1) <= l2[node.name]).all())
                    assert bool((moved.abs() <= reach[node.name]).all())


def test_stock_bounds_are_untouched_outside_the_context() -> None:
    net, x, y = random_case(0)
    bounded = bounded_module(net, tuple(x.shape[1:]))
    with torch.no_grad():
        before = lower_margins(bounded, x, y, SETS["l2"], "CROWN")
        CoupledBounds(bounded, 3, 3, 1).bounds(x, y, SETS["l2"])
        assert torch.equal(before, lower_margins(bounded, x, y, SETS["l2"], "CROWN"))


class Summed(nn.Module):
    """A small summand that is copied over a larger one: what moves in it moves everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, SIDE)
        self.last = nn.Linear(4 * SIDE * SIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(torch.relu(self.wide(x) + self.narrow(x))).flatten(1))


class Copied(nn.Module):
    """A constant that enlarges one value to many."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(SIDE * SIDE, 1), nn.Linear(1, 1), nn.Linear(8, 3)
        self.register_buffer("shift", torch.linspace(-1, 1, 8)[None])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(torch.relu(self.first(x.flatten(1))))
        return self.last(torch.relu(hidden + self.shift))


class Skip(nn.Module):
    """An identity skip, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4 * (SIDE // 2) ** 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(x))
        return self.last(torch.relu(self.block(hidden) + hidden).flatten(1))


def pooled_with_a_zero_row() -> nn.Module:
    layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten()]
    with torch.no_grad():
        layers[3].weight[0] = 0
    return nn.Sequential(*layers, nn.Linear(6, 3))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [Summed, Copied, Skip, pooled_with_a_zero_row])
def test_unusual_graphs(make: type[nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    net = make().double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    x, y = torch.rand(2, 1, SIDE, SIDE, dtype=torch.float64), torch.randint(3, (2,))
    for name in ("l2", "l1"):
        bounded = bounded_module(net, tuple(x.shape[1:]), {"conv_mode": "matrix"})
        with torch.no_grad():
            crown = lower_margins(bounded, x, y, SETS[name], "CROWN")
        found = CoupledBounds(bounded, 10, 5, 2).bounds(x, y, SETS[name], torch.full((2,), torch.inf)).margins
        assert bool((found >= crown).all())
        reached = extremes(Margins(net, y), x, SETS[name], 600, 60)
        assert crossing(found, torch.full_like(found, torch.inf), reached) <= 1e-12


@pytest.mark.parametrize("make", [Summed, Copied])
def test_the_radius_of_copied_values_counts_every_copy(make: type[nn.Module]) -> None:
    net = make().double().eval()
    x = torch.full((1, 1, SIDE, SIDE), 0.5, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.fill_(0.0 if name.startswith("wide") else 0.1)
    bounded = bounded_module(net, tuple(x.shape[1:]), {"conv_mode": "matrix"})
    ball = PerturbationLpBall(2, 0.5)
    with torch.no_grad():
        bounded(x)
        node = next(relu.inputs[0] for relu in bounded.relus if type(relu.inputs[0]).__name__ == "BoundAdd")
        clean = node.forward_value
        lower_margins(bounded, x, torch.zeros(1, dtype=torch.long), ball, "CROWN")
        radius = GraphRadii().at(node, Radius(*ball.radii(x)), {}, {})
        bounded(x + 0.5 / SIDE)  # the ball's point that moves the sum most
        moved = (node.forward_value - clean).flatten(1)
    assert bool((moved.norm(dim=1) <= radius.l2).all()) and bool((moved.abs().sum(1) <= radius.l1).all())


@pytest.mark.parametrize("eps", [0.0, 1e-7, 1e-6, 1e-5])
def test_tiny_radii_in_float32_stay_below_the_clean_margin(eps: float) -> None:
    torch.manual_seed(0)
    sizes = [784, 100, 100, 100, 10]
    layers: list[nn.Module] = [nn.Flatten()]
    for one, other in itertools.pairwise(sizes):
        layers += [nn.Linear(one, other), nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).eval()
    with torch.no_grad():
        layers[1].bias.add_(30)  # values at which one rounding error exceeds the radius
    x = torch.rand(2, 1, 28, 28)
    y = net(x).argmax(1)
    bounded = bounded_module(net, (1, 28, 28))
    found = CoupledBounds(bounded).bounds(x, y, PerturbationLpBall(2, eps), torch.full((2,), 99.0)).margins
    logits = net(x)
    clean = (logits.gather(1, y[:, None]) - logits).topk(9, dim=1).values.amin(1)
    assert bool((found.amin(1) <= clean + 1e-6).all())
