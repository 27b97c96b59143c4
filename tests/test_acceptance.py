"""Which nets are accepted, in which mode, and that what auto_LiRPA gets wrong is mended or refused by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import auto_LiRPA
import pytest
import torch
from auto_LiRPA import BoundedTensor
from bound_checks import cancelling
from conftest import small_net
from net_attacks import reached, worst
from random_nets import Affine, Picked, Quotient, View
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall
from cure_plugin.attacks import worst_margin_loss
from cure_plugin.bounds import module, operators, rounding
from cure_plugin.bounds.margins import crown_bounds
from cure_plugin.bounds.module import bounded_module
from cure_plugin.bounds.operators import OPERATORS, table
from cure_plugin.bounds.rounding import growth, required_margins
from cure_plugin.certification import AlphaCrown, Certifier, Crown, IbpBound, Piece
from cure_plugin.certification.bounder import Bounder
from cure_plugin.errors import SpecError

OLD = auto_LiRPA.__version__ == "0.3"


def oblong() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 4, 3, 2),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, 1, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def dilated() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, 1, 2, 2),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, 1, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 3),
    )


def twice() -> nn.Module:
    return nn.Sequential(Picked(1, [0, 0, 1]), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))


class Sloped(nn.Module):
    """``(x - 1) / (x + 1)``."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 1) / (x + 1)


def quotient() -> nn.Module:
    linear = nn.Linear(1, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [0.0]]))
        linear.bias.copy_(torch.tensor([0.9, 0.0]))
    return nn.Sequential(Sloped(), linear)


Kind = tuple[Callable[[], nn.Module], tuple[int, ...], float, tuple[int, ...]]

KINDS: dict[str, Kind] = {
    "oblong": (oblong, (1, 6, 9), 0.05, (10, 22)),
    "tall": (oblong, (1, 9, 6), 0.05, (10, 22)),
    "dilated": (dilated, (1, 8, 8), 0.05, tuple(range(6))),
    "picked-twice": (twice, (4,), 0.1, (0, 1)),
    "quotient": (quotient, (1,), 0.5, (0,)),
    "soft-sign": (
        lambda: nn.Sequential(nn.Linear(4, 6), Quotient(0.0, 1.0), nn.Linear(6, 3)),
        (4,),
        0.2,
        (0, 1),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_listed_kinds(name: str) -> None:
    """Bounds hold, or the net is refused with the node and its operator."""
    make, shape, eps, seeds = KINDS[name]
    for seed in seeds:
        torch.manual_seed(seed)
        net = make().eval()
        x = torch.full((1, *shape), 0.5) if name == "quotient" else torch.rand(1, *shape)
        ball = PerturbationLpBall(math.inf, eps)
        if OLD and name in ("quotient", "soft-sign"):
            with pytest.raises(SpecError, match=r"node \S+ of the net, quotient by .* use auto_LiRPA 0\.7\.1"):
                bounded_module(net, shape)
            continue
        bounded = bounded_module(net, shape)
        low, high = reached(net, x, ball, 100)
        for method in ("IBP", "CROWN-IBP", "CROWN"):
            lower, upper = bounded.compute_bounds(x=(BoundedTensor(x, ball),), method=method)
            assert bool((lower[0] <= low + 1e-5).all() and (upper[0] >= high - 1e-5).all())


class Viewed(nn.Module):
    """Features by ``view(x.size(0), -1)``, as users write it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


def _head(*layers: nn.Module, shape: tuple[int, ...] = (1, 8, 8)) -> nn.Module:
    net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    net(torch.rand(1, *shape))
    return net.eval()


GEOMETRIES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "square": ("patches", lambda: _head(nn.Conv2d(1, 2, 3, 2, 1)), (1, 8, 8)),
    "normalised": ("patches", lambda: _head(nn.Conv2d(1, 2, 3, 2, 1), nn.BatchNorm2d(2)), (1, 8, 8)),
    "oblong map": ("matrix", lambda: _head(nn.Conv2d(1, 2, 3, 1, 1), shape=(1, 8, 6)), (1, 8, 6)),
    "oblong kernel": ("matrix", lambda: _head(nn.Conv2d(1, 2, (3, 1), 1, (1, 0))), (1, 8, 8)),
    "oblong stride": ("matrix", lambda: _head(nn.Conv2d(1, 2, 3, (1, 2), 1)), (1, 8, 8)),
    "oblong padding": ("matrix", lambda: _head(nn.Conv2d(1, 2, 3, 1, (1, 0))), (1, 8, 8)),
    "dilation": ("matrix", lambda: _head(nn.Conv2d(1, 2, 3, 1, 2, 2)), (1, 8, 8)),
    "groups": ("matrix", lambda: _head(nn.Conv2d(2, 2, 3, 1, 1, groups=2), shape=(2, 8, 8)), (2, 8, 8)),
    "view": (
        "matrix",
        lambda: _head(nn.Conv2d(1, 2, 3, 1, 1), View(2, 32, 2), nn.Conv2d(2, 2, 2)),
        (1, 8, 8),
    ),
    "view to features": ("patches", lambda: _head(nn.Conv2d(1, 2, 3, 2, 1), Viewed(), nn.Linear(32, 4)), (1, 8, 8)),
    "square view": (
        "matrix",
        lambda: _head(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), View(1, 16, 16), nn.Conv2d(1, 2, 3, 1, 1)),
        (1, 8, 8),
    ),
    "transposed": ("matrix", lambda: _head(nn.ConvTranspose2d(1, 2, 3, 2)), (1, 8, 8)),
    "average pooling": ("matrix", lambda: _head(nn.AvgPool2d(3, 2, 1)), (1, 8, 8)),
    "max pooling": ("matrix", lambda: _head(nn.MaxPool2d(3, 2, 1)), (1, 8, 8)),
    "padding": ("matrix", lambda: _head(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(1, 2, 3)), (1, 8, 8)),
    "index": ("matrix", lambda: _head(nn.Conv2d(1, 2, 3), Picked(1, [0, 0, 1])), (1, 8, 8)),
    "affine": ("patches", lambda: _head(Affine([0.3], [0.2], True, 3), nn.Conv2d(1, 2, 3)), (1, 8, 8)),
    "sigmoid": ("matrix", lambda: _head(nn.Conv2d(1, 2, 3), nn.Sigmoid()), (1, 8, 8)),
    "tanh": ("matrix", lambda: _head(nn.Conv2d(1, 2, 3), nn.Tanh()), (1, 8, 8)),
    "leaky": ("matrix", lambda: _head(nn.Conv2d(1, 2, 3), nn.LeakyReLU(0.1)), (1, 8, 8)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry_decides_the_mode(name: str) -> None:
    mode, make, shape = GEOMETRIES[name]
    assert bounded_module(make(), shape).bound_opts["conv_mode"] == mode
    # by the table alone: what the self-check would find besides must not be what holds it up
    assert bounded_module(make(), shape, self_check=False).bound_opts["conv_mode"] == mode


def test_every_row_of_the_table_names_a_test_and_is_shown() -> None:
    assert all(row.reason and row.layers and row.test.startswith("tests/") for row in OPERATORS)
    assert len(table().splitlines()) == len(OPERATORS) + 2
    assert table() in (Path(__file__).parents[1] / "docs" / "design.md").read_text()  # benchmarks/ledger.py render
    missing = [row.test for row in OPERATORS if not (Path(__file__).parents[1] / row.test.partition("::")[0]).is_file()]
    assert not missing


class Exponential(nn.Module):
    """An operator without a row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x)


def test_unknown_operators_pass_only_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    net = _head(nn.Conv2d(1, 2, 3), Exponential())
    assert bounded_module(net, (1, 8, 8)).bound_opts["conv_mode"] == "matrix"
    with pytest.raises(SpecError, match=r"node \S+ of the net is a Exp, of which nothing is known"):
        bounded_module(net, (1, 8, 8), self_check=False)
    monkeypatch.setattr(module, "violation", lambda *_: "node /x (Exp): broken")
    with pytest.raises(SpecError, match=r"does not bound this net soundly: node /x \(Exp\)"):
        bounded_module(net, (1, 8, 8))


@pytest.mark.parametrize("make, shape", [(oblong, (1, 6, 9)), (dilated, (1, 8, 8))])
def test_the_self_check_alone_finds_what_patches_mode_gets_wrong(
    make: Callable[[], nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the table let such nets through, they would fall to matrix mode."""
    loose = [row for row in OPERATORS if row.kind != "BoundConv"]
    monkeypatch.setattr(operators, "OPERATORS", (*loose, operators.Operator("BoundConv", "any", "patches", "mutation")))
    torch.manual_seed(0)
    assert bounded_module(make().eval(), shape).bound_opts["conv_mode"] == "matrix"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_certified_for_the_weights_it_holds(dtype: torch.dtype) -> None:
    """Nothing is proved that the same weights lose in float64, by as little as a millionth."""
    for seed in range(10):
        torch.manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 3)]
        net = nn.Sequential(*layers).to(dtype).eval()
        x, ball = torch.rand(1, 1, 8, 8).to(dtype), PerturbationLpBall(math.inf, 0.002)
        exact = copy.deepcopy(net).double()
        with torch.no_grad():
            y = exact(x.double()).argmax(1)
            point = worst(exact, x.double(), y, ball)
            # scaled so that the shift is a number of this precision, then moved until the point is lost
            net[-1].bias[y] -= float(-worst_margin_loss(exact(point), y))
            while float(-worst_margin_loss(copy.deepcopy(net).double()(point), y)) > 0:
                net[-1].bias[y] -= torch.finfo(dtype).eps * net[-1].bias[y].abs()
        certifier = Certifier(net, (1, 8, 8), attack_steps=1, restarts=1, alpha_iterations=2)
        assert certifier.net[-1].weight.dtype == torch.float64 and net[-1].weight.dtype == dtype
        assert not bool(certifier.proved(x, y, ball))
    with pytest.raises(SpecError, match="wrap a copy in float64"):
        bounded_module(net, (1, 8, 8))


def test_half_precision_nets_are_proved_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3)).bfloat16().eval()
    x = torch.rand(4, 1, 8, 8).bfloat16()
    y = net(x).argmax(1)
    verdicts, points = Certifier(net, (1, 8, 8)).decide(x, y, PerturbationLpBall(math.inf, 1e-3))
    assert "proved" in [verdict.status for verdict in verdicts] and points.dtype == torch.float64


def test_hidden_values_that_cancel_are_no_proof_in_float32() -> None:
    """Logits of size 1 made of terms of size 1e6: what float32 adds up is no evidence of a positive margin."""
    ball, asked = PerturbationLpBall(math.inf, 1e-5), 0
    for seed in range(60):
        net, x, y, exact = cancelling(seed, 3e5)
        if exact < 0:
            asked += 1
            assert not bool(Certifier(net, (16,), alpha_iterations=2).proved(x, y, ball))
    assert asked > 10


def test_alpha_crown_alone_takes_no_boxes_of_other_images() -> None:
    """Which neurons are inactive decides how large rounding may be: what another batch left behind says nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    x, ball = torch.rand(1, 16), PerturbationLpBall(math.inf, 1e-3)
    y = net(x).argmax(1)
    bounder = Certifier(net, (16,), alpha_iterations=2)._bounder
    bounder.bound(Piece(region=ball.around(x * 0), y=y), Crown())
    assert AlphaCrown(2).bounds(bounder, Piece(region=ball.around(x), y=y)).boxes == {}


def test_margins_grow_with_terms_and_shrink_with_precision() -> None:
    assert growth(10, torch.float64) == pytest.approx(10 * 2.0**-53, rel=1e-9)
    assert growth(10_000, torch.float32) > growth(100, torch.float32) > 1e6 * growth(100, torch.float64)


def absolute(net: nn.Module) -> nn.Module:
    """The net of its weights' and biases' absolute values."""
    copied = copy.deepcopy(net).double()
    with torch.no_grad():
        for value in [*copied.parameters(), *copied.buffers()]:
            value.abs_()
    return copied


@pytest.mark.parametrize(
    "front", ["plain", "normalize", "raw-normalize", "batch-norm", "linear", "windows", "grouped windows", "diagonal"]
)
@pytest.mark.parametrize(
    "ball", [PerturbationLpBall(1, 1.5), PerturbationLpBall(2, 0.7), PerturbationLpBall(1, 2, None)]
)
def test_the_terms_of_a_ball_are_those_of_no_point_less(front: str, ball: PerturbationLpBall) -> None:
    """Sizes from radii are at most those from the box, far less where the box is far larger, and no point has more."""
    torch.manual_seed(0)
    channels = 9 if front == "grouped windows" else 1
    if "windows" in front:  # rows of a first layer that look diagonal, though each pixel is read nine times
        windows = nn.Conv2d(channels, 9, 3, padding=1, bias=False, groups=channels)
        with torch.no_grad():
            windows.weight.copy_(2 * torch.eye(9).view(9, 1, 3, 3))
        net = nn.Sequential(windows, nn.Flatten(), nn.Linear(576, 3)).eval()
    elif front == "diagonal":
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 3)).eval()
        with torch.no_grad():
            net[1].weight.copy_(torch.linspace(-2, 2, 64).diag())
    else:
        net = small_net(front)
    x = torch.where(torch.rand(2, channels, 8, 8) < 0.8, 0, torch.rand(2, channels, 8, 8))
    bounded = module.bounded_module(net, (channels, 8, 8))
    with torch.no_grad():
        bounded(x)
        lower, upper = ball.box(x)
        largest = torch.maximum(lower.abs(), upper.abs())
        sizes = rounding._sizes(bounded, x, largest, ball, {})
        box = rounding._sizes(bounded, x, largest, PerturbationLpBall(math.inf, 0.1), {})
        assert sizes is not None and box is not None and bool((sizes <= box).all())
        if "windows" not in front and ball.p == 1:
            assert bool((sizes < 0.7 * box).all())
        for number in range(x[0].numel()):  # all of the budget on one pixel
            points = x.clone()
            points.flatten(1)[:, number] += float(ball.eps)
            terms = absolute(net)(ball.project(x, points).double().abs())
            assert bool((terms <= sizes.double() * (1 + 1e-5)).all())


@pytest.mark.parametrize("by", [1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("seed", range(4))
def test_what_fails_in_float64_is_no_proof_and_no_traceback(seed: int, by: float) -> None:
    """auto_LiRPA 0.3 bounds a reciprocal in float32 alone."""

    class OneOver(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1 / (x.abs() + 0.5)

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), OneOver(), nn.Linear(6, 2)).eval()
    x, ball = torch.rand(1, 4), PerturbationLpBall(math.inf, 1e-3)
    y = net(x).argmax(1)
    try:
        certifier = Certifier(net, (4,), alpha_iterations=2)
    except SpecError:
        return
    with torch.no_grad():
        net[2].bias[y] -= float(certifier.lower_bound(x, y, ball, "CROWN")) - by
    assert certifier.decide(x, y, ball)[0][0].status in ("proved", "undecided")


def test_what_float32_leaves_open_is_bounded_again_in_float64() -> None:
    """A margin far above float64's rounding, and below float32's allowance for it, is a proof."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    x, ball = torch.rand(1, 16), PerturbationLpBall(math.inf, 0.0)
    with torch.no_grad():
        y = net(x).argmax(1)
        net[-1].bias[y] -= float(-worst_margin_loss(net(x), y)) - 2e-6
    certifier = Certifier(net, (16,))
    found = certifier._bounder.bound(Piece(region=ball.around(x), y=y), IbpBound())
    assert float(found.lower) < float(required_margins(certifier._bounder.bounded, x, y, ball, {}))
    assert bool(found.proved)
    with torch.no_grad():
        net[-1].bias += 1
    wide = certifier._bounder._in_float64()
    assert wide is not None
    copied = wide.net[-1].bias
    assert copied.dtype == torch.float64 and torch.equal(copied.float(), net[-1].bias)  # it follows the net


def test_boxes_of_float32_spare_float64_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widened they hold float64's, and what CROWN leaves open in float32 is proved over them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    x, ball = torch.rand(1, 16), PerturbationLpBall(math.inf, 0.1)
    bounder = Bounder(net, (16,), 1, 1.0)
    wide = bounder._in_float64()
    assert wide is not None
    y = net(x).argmax(1)
    with torch.no_grad():
        net[-1].bias[y] -= crown_bounds(bounder.bounded, x, y, ball).margins.flatten() - 2e-6
    known = bounder.widened(ball.around(x), crown_bounds(bounder.bounded, x, y, ball))
    exact = crown_bounds(wide.bounded, x.double(), y, ball).boxes
    assert len(exact) == 2
    for name, (low, high) in known.boxes.items():
        assert bool((low < exact[name][0]).all() and (high > exact[name][1]).all())
        assert float((exact[name][0] - low).max()) < 1e-3
    monkeypatch.setattr(wide, "bound", None)  # which would compute them again
    found = bounder.bound(Piece(region=ball.around(x), y=y), Crown())
    assert 0 < float(found.lower) < 1e-5 and bool(found.proved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.Tanh()])
def test_lines_around_s_shapes_hold_on_every_interval(layer: nn.Module, dtype: torch.dtype) -> None:
    """On a grid of intervals, narrow and wide: neither line cuts through, as 0.3's own do beyond its table's end."""
    ends = torch.cat([torch.linspace(-7, 7, 57), torch.tensor([-600.0, -90.0, 90.0, 600.0])]).to(dtype)
    low, high = (end.flatten() for end in torch.meshgrid(ends, ends + 1e-3, indexing="ij"))
    low, high = low[low < high], high[low < high]
    width = len(low)
    net = nn.Sequential(layer, nn.Linear(width, width, bias=False)).to(dtype)
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(width))
    bounded = module._mended(module._traced(net, torch.zeros(1, width, dtype=dtype), {"conv_mode": "matrix"}))
    box = PerturbationLpBall(math.inf, 1000.0, (low[None], high[None]))
    centre = ((low + high) / 2)[None]
    with module.default_dtype(dtype):
        bounded.compute_bounds(x=(BoundedTensor(centre, box),), method="CROWN")
    low, high = box.box(centre)
    node = next(node for node in bounded.children() if hasattr(node, "lw"))
    for share in torch.linspace(0, 1, 101, dtype=dtype):
        z = (low + share * (high - low)).clamp(low, high)
        value = layer(z)
        room = 8 * torch.finfo(dtype).eps * (1 + z.abs())
        assert bool((node.lw * z + node.lb <= value + room).all() and (node.uw * z + node.ub >= value - room).all())
