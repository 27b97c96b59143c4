"""Branch and bound against what it may not miss: gradients, leaves, exhaustive enumeration, attacks."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from bound_checks import cancelling
from searches import Recording, smallest_margin, unstable_values
from torch import Tensor, nn

import cure_plugin.relaxation.root as root_module
from cure_plugin import PerturbationBox, PerturbationLpBall, PerturbationSet
from cure_plugin.bounds.margins import relu_boxes
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification import BranchAndBound, Certifier
from cure_plugin.certification.bounder import Bounder
from cure_plugin.relaxation.affine import affine_net
from cure_plugin.relaxation.dual import Domain, Dual, Duals, Found
from cure_plugin.relaxation.optimise import Ascent, climb
from cure_plugin.relaxation.products import Product
from cure_plugin.relaxation.recheck import certified
from cure_plugin.relaxation.reduced import Rows
from cure_plugin.relaxation.root import Root, root
from cure_plugin.relaxation.search import Limits
from cure_plugin.relaxation.tighten import tighten, worthwhile

SETS: dict[str, Callable[[float], PerturbationSet]] = {
    "linf": lambda size: PerturbationLpBall(math.inf, size),
    "l2": lambda size: PerturbationLpBall(2, 2 * size),
    "l1": lambda size: PerturbationLpBall(1, 4 * size),
    "uncut l2": lambda size: PerturbationLpBall(2, 2 * size, None),
    "box": lambda size: PerturbationBox(0.0, 1.0).scaled(size),
}


class Residual(nn.Module):
    """A net whose last ReLU sees two layers."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(inputs, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1)).relu()
        return self.third((self.second(y) + y).relu())


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)
    ),
    "residual": lambda: Residual(9),
}


def drawn(name: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """(net, x (1, 1, 3, 3), its label)."""
    torch.manual_seed(seed)
    net = NETS[name]().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for parameter in net.parameters():
            parameter.mul_(2)
        x = torch.rand(1, 1, 3, 3)
        return net, x, net(x).argmax(1)


def start_of(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    hint: tuple[float, float] | None = None,
    until: float = math.inf,
) -> Root:
    """``hint``: what is said of every neuron; default: what IBP says."""
    bounded = bounded_module(net, tuple(x.shape[1:]), self_check=False)
    with torch.no_grad():
        region = perturbation.around(x)
        bounded.compute_bounds(x=(region.bounded_tensor(),), method="IBP")
        hints = relu_boxes(bounded)
        if hint is not None:
            hints = {node: (low * 0 + hint[0], high * 0 + hint[1]) for node, (low, high) in hints.items()}
        return root(affine_net(bounded), bounded, region, int(y), hints, until=until)


class Prefix(nn.Module):
    """A net behind arithmetic on numbers and buffers, of which graphs hold results in the net's precision."""

    def __init__(self, scaled: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("a", torch.tensor(0.35))
        self.register_buffer("b", torch.tensor(0.44))
        self.scaled, self.net = scaled, NETS["mlp"]()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.scaled(x, self.a, self.b))


PREFIXES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "quotient": lambda x, a, b: (x - a) / b,
    "number": lambda x, a, b: (x - 0.35) / 0.44,
    "number's inverse": lambda x, a, b: (x - 0.35) * (1 / 0.44),
    "buffers' quotient": lambda x, a, b: x * (a / b),
    "buffers' difference": lambda x, a, b: (x - (a - b)) / (b * 0.7),
    "exponential": lambda x, a, b: x * a.exp(),
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_what_is_made_of_constants_is_read_as_float64_makes_it(kind: str) -> None:
    torch.manual_seed(0)
    net = Prefix(PREFIXES[kind]).eval()
    bounder, x = Bounder(net, (1, 3, 3), 1, 2.0), torch.rand(5, 1, 3, 3, dtype=torch.float64)
    for _ in range(2):
        affine = bounder.affine()
        assert affine is not None
        expected = copy.deepcopy(net).double()(x)
        assert torch.allclose(affine.forward(x.flatten(1))[-1], expected, rtol=0, atol=1e-14)
        for buffer in net.buffers():  # as training may change them
            buffer.mul_(1.3)


@pytest.mark.parametrize("name", NETS)
def test_the_graph_is_read_as_it_is(name: str) -> None:
    net, _, _ = drawn(name, 0)
    bounded = bounded_module(net, (1, 3, 3), self_check=False)
    points = torch.randn(20, 1, 3, 3)
    bounded(points)
    with torch.no_grad():
        assert torch.allclose(
            affine_net(bounded).forward(points.flatten(1).double())[-1].float(), net(points), atol=1e-5
        )


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_differences(name: str, kind: str, split: bool) -> None:
    net, x, y = drawn(name, 1)
    start = start_of(net, x, y, SETS[kind](0.2))
    dual, rows = Dual(start.exact, start.coupled), start.margins
    duals = dual.start(rows)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-1, 2, duals.slopes.shape, generator=generator).double() if split else duals.slopes * 0
    random = torch.rand(duals.slopes.shape, generator=generator, dtype=torch.float64)
    duals = Duals(random, (random - 0.5) * signs.abs(), duals.multipliers, duals.budget)
    for _ in range(20):  # multipliers near their best, where the bound is flat in them
        found = dual.evaluate(rows, duals, Domain(signs))
        duals = Duals(duals.slopes, duals.splits, found.multipliers, found.budget)
    step = 1e-6
    for kind_of, gradient in (("slopes", found.slopes), ("splits", found.splits)):
        for index in range(duals.slopes.shape[1]):
            moved = [Duals(**{k: getattr(duals, k).clone() for k in Duals.__dataclass_fields__}) for _ in range(2)]
            getattr(moved[0], kind_of)[:, index] += step
            getattr(moved[1], kind_of)[:, index] -= step
            up, down = (dual.value(rows, one, Domain(signs)) for one in moved)
            difference = (up - down) / (2 * step)
            asked = torch.ones(len(rows), dtype=torch.bool) if kind_of == "slopes" else signs[:, index] != 0
            tolerance = 2e-3 * float(gradient.abs().max()) + 1e-4
            assert torch.allclose(difference[asked], gradient[asked, index], atol=tolerance)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", NETS)
def test_any_duals_give_bounds_of_any_subdomain(name: str, kind: str) -> None:
    """Random duals, random splits: no point of the set and of the subdomain lies below the bound."""
    for seed in range(5):
        net, x, y = drawn(name, seed)
        perturbation = SETS[kind](0.3)
        start = start_of(net, x, y, perturbation)
        generator = torch.Generator().manual_seed(seed)
        region = perturbation.around(x.expand(2000, *x.shape[1:]))
        points = region.sample(generator)
        signs_at = unstable_values(start, points).sign()
        values = start.exact.net.forward(points.flatten(1).double())
        margins = values[-1][:, int(y), None] - values[-1]
        margins = margins[:, [j for j in range(margins.shape[1]) if j != int(y)]]
        dual = Dual(start.exact, start.coupled)
        count = len(dual.lower)
        for trial in range(20):
            index = torch.randint(len(start.margins), (1,), generator=generator)
            rows = start.margins.select(index)
            split = torch.rand(1, count, generator=generator) < 0.3
            signs = torch.where(split, signs_at[trial], 0.0)
            first = dual.start(rows)
            duals = Duals(
                torch.rand(1, count, generator=generator).double(),
                torch.randn(1, count, generator=generator).double() * split,
                first.multipliers * torch.rand(first.multipliers.shape, generator=generator).double() * 3 + 1e-9,
                first.budget * 2 * float(torch.rand(1, generator=generator)) + 1e-9,
            )
            bound = certified(start.exact, rows, start.sizes[index], duals, Domain(signs), start.coupled, start.terms)
            assert torch.allclose(bound, dual.value(rows, duals, Domain(signs)), atol=1e-6)
            inside = ((signs == 0) | (signs == signs_at)).all(1)
            assert bool((margins[inside, int(index)] >= bound - 1e-6).all())


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", NETS)
def test_leaves_cover_the_set_once(name: str, kind: str) -> None:
    proved = 0
    for seed in range(3):
        net, x, y = drawn(name, seed)
        perturbation = SETS[kind](0.25)
        start = start_of(net, x, y, perturbation)
        search = Recording(start, Limits(20.0, 5000))
        if not search.run().proved:
            continue
        proved += 1
        points = perturbation.around(x.expand(500, *x.shape[1:])).sample(torch.Generator().manual_seed(seed))
        values = unstable_values(start, points)
        for index in range(len(start.margins)):
            inside = sum((leaf.reach(values) > 0).long() for leaf in search.leaves if leaf.row == index)
            assert bool((torch.as_tensor(inside) == 1).all())
    assert proved > 0


@pytest.mark.parametrize("seed", range(8))
def test_it_agrees_with_exhaustive_enumeration(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    x = torch.rand(1, 4)
    y = net(x).argmax(1)
    ball = PerturbationLpBall(math.inf, 0.3)
    least = smallest_margin(net, x, int(y), ball)
    for by in (1e-3, -1e-3):  # only just robust, and only just not
        with torch.no_grad():
            net[-1].bias[y] -= least - by
        least = by
        verdict = Certifier(net, (4,), [BranchAndBound(seconds=30)]).decide(x, y, ball)[0][0]
        assert verdict.status == ("proved" if by > 0 else "falsified"), by


@pytest.mark.parametrize("kind", SETS)
def test_a_tie_is_no_proof(kind: str) -> None:
    """Margins of exactly 0, whether a neuron is unstable or none is."""
    x = torch.rand(1, 4)
    for bias in (0.0, 100.0):
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        with torch.no_grad():
            net[0].bias += bias
            net[2].weight[1] = net[2].weight[0]
            net[2].bias[1] = net[2].bias[0]
        for y in (0, 1):
            label = torch.tensor([y])
            assert not bool(Certifier(net, (4,), [BranchAndBound()]).proved(x, label, SETS[kind](0.1)))


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("hint", [(-2.0, -1.0), (1.0, 2.0), (math.nan, math.nan), (-1.0, 1.0)])
def test_boxes_hold_whatever_the_hints_say(kind: str, hint: tuple[float, float]) -> None:
    for name, seed in itertools.product(NETS, range(3)):
        net, x, y = drawn(name, seed)
        perturbation = SETS[kind](0.3)
        boxes_hold(start_of(net, x, y, perturbation, hint), perturbation, x, seed)


def boxes_hold(start: Root, perturbation: PerturbationSet, x: Tensor, seed: int) -> None:
    points = perturbation.around(x.expand(1000, *x.shape[1:])).sample(torch.Generator().manual_seed(seed))
    values = start.exact.net.forward(points.flatten(1).double())
    for value, layer in zip(values, start.exact.layers, strict=False):
        inside = value[:, layer.kept[: layer.unstable]]
        assert bool(((inside >= layer.lower) & (inside <= layer.upper)).all())
        assert bool((inside - layer.clean).norm(dim=1).amax() <= layer.radius) if layer.unstable else True
        active = value[:, layer.kept[layer.unstable :]]
        gone = torch.ones(value.shape[1], dtype=torch.bool)
        gone[layer.kept] = False
        assert bool((active >= 0).all()) and bool((value[:, gone] <= 0).all())


@pytest.mark.parametrize("kind", SETS)
def test_boxes_hold_when_time_is_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of wide layers that nobody had the time to optimise are wider, no more."""
    monkeypatch.setattr(root_module, "_NARROW", 0)
    monkeypatch.setattr(root_module, "_CHUNK", 2)
    total = {-math.inf: 0.0, math.inf: 0.0}
    for (name, seed), until in itertools.product(itertools.product(NETS, range(3)), total):
        net, x, y = drawn(name, seed)
        perturbation = SETS[kind](0.3)
        start = start_of(net, x, y, perturbation, until=until)
        boxes_hold(start, perturbation, x, seed)
        total[until] += sum(float((layer.upper - layer.lower).sum()) for layer in start.exact.layers)
    assert total[math.inf] < total[-math.inf]


def test_climbing_ends_where_nothing_is_left_or_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    start = start_of(*drawn("mlp", 0), SETS["linf"](0.3))
    dual, rows = Dual(start.net, start.coupled), start.margins.to(torch.float32)
    looks: list[int] = []
    evaluate = Dual.evaluate

    def counted(self: Dual, some: Rows, duals: Duals, domain: Domain | None) -> Found:
        looks.append(len(some))
        return evaluate(self, some, duals, domain)

    monkeypatch.setattr(Dual, "evaluate", counted)
    whole = climb(dual, rows, dual.start(rows), Ascent(9))
    assert looks == [2] * 9
    looks.clear()
    late = climb(dual, rows, dual.start(rows), Ascent(9, until=-math.inf))
    assert looks == [2] and bool((late.value <= whole.value).all())
    looks.clear()
    climb(dual, rows, dual.start(rows), Ascent(9), done=lambda best: torch.arange(2) < len(looks) - 2)
    assert looks == [2, 2, 2, 1]


def test_what_float32_takes_for_a_proof_is_none() -> None:
    """Logits of size 1 made of terms of size 1e7: float32's bounds are off by more than the margins."""
    ball, asked = PerturbationLpBall(math.inf, 1e-5), 0
    for seed in range(40):
        net, x, y, exact = cancelling(seed, 3e6)
        if exact < 0:
            asked += 1
            assert not bool(Certifier(net, (16,), [BranchAndBound(nodes=20)]).proved(x, y, ball))
    assert asked > 5


def test_radii_behind_matrices_whose_own_norm_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide layer's radius is that of the whole matrix's norm, not of all its entries."""
    net, x, y = drawn("mlp", 3)
    radii = []
    for side in (1600, 0):
        monkeypatch.setattr(root_module, "_NORM_SIDE", side)
        start = start_of(net, x, y, PerturbationLpBall(2, 0.2, None))
        radii.append([layer.radius for layer in start.exact.layers])
    norms = [float(torch.linalg.matrix_norm(layer.weight.double(), 2)) for layer in (net[1], net[3])]
    for own, whole, reach in zip(*radii, (0.2 * norms[0], 0.2 * norms[0] * norms[1]), strict=True):
        assert own <= whole * (1 + 1e-6) and whole <= reach * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_products_are_the_dense_ones(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.05, 0.9):
        matrix = torch.randn(200, 300, generator=generator, dtype=dtype)
        matrix *= torch.rand(200, 300, generator=generator) < share
        product, down, up = Product(matrix), torch.randn(5, 200).to(dtype), torch.randn(5, 300).to(dtype)
        assert product._dense == (share > 0.5)
        assert torch.allclose(product.down(down), down @ matrix, atol=1e-4)
        assert torch.allclose(product.up(up), up @ matrix.T, atol=1e-4)
        assert torch.allclose(product.up(up[0]), up[0] @ matrix.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_tightened_boxes_hold(kind: str) -> None:
    """Of the last hidden layer, by splits of the layers before."""
    narrower = 0.0
    for seed, name in enumerate(NETS):
        net, x, y = drawn(name, seed)
        perturbation = SETS[kind](0.4)
        start = start_of(net, x, y, perturbation)
        if not worthwhile(start):
            continue
        better = tighten(start, Limits(20, 60))
        values = start.exact.net.forward(
            perturbation.around(x.expand(2000, *x.shape[1:]))
            .sample(torch.Generator().manual_seed(seed))
            .flatten(1)
            .double()
        )
        lower, upper = better.exact.boxes(len(better.exact.layers))
        assert bool(((values[-2] >= lower) & (values[-2] <= upper)).logical_or(upper <= 0).all())
        assert bool((values[-2] <= upper).all())
        before, after = (one.exact.boxes(len(one.exact.layers))[1].sum() for one in (start, better))
        narrower += float(before - after)
        margins = (values[-1][:, int(y), None] - values[-1]).double()
        dual = Dual(better.exact, better.coupled)
        bound = dual.value(better.margins, dual.start(better.margins), None)
        assert bool((margins[:, [j for j in range(3) if j != int(y)]] >= bound - 1e-6).all())
    assert narrower > 0.01
