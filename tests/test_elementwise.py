"""Constants that scale and shift every entry, written out in any way: bounded as ``Normalize`` is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from auto_LiRPA import BoundedTensor
from conftest import tail
from net_attacks import reached
from test_first_layer import exact_range
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.bounds.module import bounded_module, default_dtype
from cure_plugin.bounds.rounding import required_margins
from cure_plugin.nets import Normalize

SHAPE = (3, 8, 8)
MEAN, STD = [0.3, 0.4, 0.5], [0.25, 0.2, 0.3]
BALLS = [PerturbationLpBall(1, 1.5), PerturbationLpBall(2, 0.4), PerturbationLpBall(math.inf, 0.03)]

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]

SPELLINGS: dict[str, Formula] = {
    "sub div": lambda x, mean, std: (x - mean) / std,
    "mul add": lambda x, mean, std: x * (1 / std) + -mean / std,
    "div sub": lambda x, mean, std: x / std - mean / std,
    "reversed": lambda x, mean, std: (mean - x) * (-1 / std),
    "negated": lambda x, mean, std: -(mean - x) / std,
    "bytes": lambda x, mean, std: (x * 255 - 255 * mean) / (std * 255),
    "symmetric": lambda x, mean, std: (2 * x - 1 + (1 - 2 * mean)) / (2 * std),
    "root": lambda x, mean, std: (x - mean) / torch.sqrt(std * std + 0.0),
    "images": lambda x, mean, std: (x - mean.expand(1, *SHAPE)) / std,
    "vectors": lambda x, mean, std: (x - mean.view(3, 1, 1)) / std.view(3, 1, 1),
}
"""Of ``(x - mean) / std``, with constants (1, C, 1, 1)."""


class Spelled(nn.Module):
    """One of :data:`SPELLINGS`, with buffers or with parameters to be trained."""

    def __init__(self, formula: Formula, trained: bool = False) -> None:
        super().__init__()
        self.formula = formula
        for name, values in (("mean", MEAN), ("std", STD)):
            value = torch.tensor(values).view(1, -1, 1, 1)
            if trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.mean, self.std)


def norm(affine: bool) -> nn.BatchNorm2d:
    """The same as a BatchNorm."""
    layer = nn.BatchNorm2d(3, eps=0.0, affine=affine)
    layer.running_mean.copy_(torch.tensor(MEAN))
    layer.running_var.copy_(torch.tensor(STD).square())
    return layer


FRONTS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda formula=formula: Spelled(formula) for name, formula in SPELLINGS.items()},
    "batch norm": lambda: norm(True),
    "plain batch norm": lambda: norm(False),
}


class Branching(nn.Module):
    """Two layers and a sum that all read the normalised image."""

    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        self.front, self.one, self.other = front, nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1)
        self.last = nn.Linear(192, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.last((x + torch.relu(self.one(x)) + self.other(x)).relu().flatten(1))


BACKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "convolutions": lambda front: nn.Sequential(front, *tail(3)),
    "features": lambda front: nn.Sequential(front, nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3)),
    "branches": Branching,
}


def net_of(back: str, front: nn.Module) -> nn.Module:
    """In float64, where the search of coupled bounds goes the same way whatever rounding does."""
    torch.manual_seed(1)
    return BACKS[back](front).double().eval()


def bounds_of(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By method and ball."""
    bounded = bounded_module(net, SHAPE)
    assert bounded.bound_opts["conv_mode"] == "patches"
    found = {}
    for ball in BALLS:
        for method in ("IBP", "CROWN-IBP", "CROWN"):
            with torch.no_grad():
                ends = bounded.compute_bounds(x=(BoundedTensor(x, ball),), method=method)
            found[f"{method} {ball}"] = torch.stack(ends)
        if ball.p != math.inf:
            found[f"coupled {ball}"] = CoupledBounds(bounded, 6, 6, 1).bounds(x, y, ball).margins
    return found


def normalised() -> Normalize:
    """The reference, of the numbers that the spellings' float32 constants are."""
    reference = Normalize([0.0] * 3, [1.0] * 3).double()
    mean, std = torch.tensor(MEAN).double(), torch.tensor(STD).double()
    reference.weight = torch.diag(1 / std)[:, :, None, None]
    reference.bias = -mean / std
    return reference


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Tensor]]:
    """Bounds behind Normalize, by what follows it."""
    return {back: bounds_of(net_of(back, normalised()), *labelled()) for back in BACKS}


def labelled() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(2, *SHAPE, generator=generator).double(), torch.tensor([0, 2])


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.parametrize("back", BACKS)
def test_bounds_are_those_of_normalize(back: str, name: str, references: dict[str, dict[str, Tensor]]) -> None:
    found = bounds_of(net_of(back, FRONTS[name]()), *labelled())
    for key, expected in references[back].items():
        assert torch.allclose(found[key], expected, rtol=1e-6, atol=1e-6), key


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.parametrize("last", ["convolution", "features"])
def test_the_first_layer_stays_exact(last: str, name: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1)] if last == "convolution" else [nn.Flatten(), nn.Linear(192, 5)]
    front = nn.Sequential(FRONTS[name](), *layers).double().eval()
    bounded = bounded_module(nn.Sequential(front, nn.ReLU()).eval(), SHAPE)
    x, _ = labelled()
    for ball in BALLS[:2]:
        bounded.compute_bounds(x=(BoundedTensor(x, ball),), method="IBP")
        node = bounded.relus[0].inputs[0]
        lower, upper = exact_range(front, x, ball)
        assert torch.allclose(node.lower.flatten(1), lower, atol=1e-6)
        assert torch.allclose(node.upper.flatten(1), upper, atol=1e-6)


def test_rounding_counts_as_much_as_behind_normalize() -> None:
    x, y = labelled()
    for ball in BALLS:
        needed = []
        for front in (normalised(), *(make() for make in FRONTS.values())):
            bounded = bounded_module(net_of("convolutions", front), SHAPE)
            with default_dtype(x.dtype):
                bounded.compute_bounds(x=(BoundedTensor(x, ball),), method="IBP")
            needed.append(required_margins(bounded, x, y, ball, {}))
        assert all(float((one / needed[0] - 1).abs().max()) < 0.5 for one in needed)


class Scattered(nn.Module):
    """Constants of every size, in front, between layers and on features; an image of scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.last = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3))
        self.register_buffer("image", torch.randn(1, *SHAPE))
        self.register_buffer("maps", torch.randn(4, 4, 4))
        self.register_buffer("features", torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(0.3 - x * self.image))
        x = torch.relu(self.maps * self.second(x) - 0.2) - 0.1 * x
        return self.last((self.features - x.flatten(1)) * self.features) / 2


def test_no_point_crosses_bounds_of_constants_anywhere() -> None:
    torch.manual_seed(0)
    net, (x, _) = Scattered().double().eval(), labelled()
    bounded = bounded_module(net, SHAPE)
    for ball in BALLS:
        for index in range(len(x)):
            low, high = reached(net, x[index : index + 1], ball, 50)
            for method in ("IBP", "CROWN-IBP", "CROWN"):
                image = BoundedTensor(x[index : index + 1], ball)
                with default_dtype(x.dtype):
                    lower, upper = bounded.compute_bounds(x=(image,), method=method)
                assert bool((lower[0] <= low + 1e-9).all() and (upper[0] >= high - 1e-9).all())


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
@pytest.mark.parametrize("name", ["sub div", "mul add", "bytes"])
def test_gradients_reach_trained_constants_and_follow_them(name: str, method: str) -> None:
    """Those of Normalize's weights made from the same parameters, before and after a step."""
    torch.manual_seed(0)
    front = Spelled(SPELLINGS[name], trained=True)
    net = nn.Sequential(front, *tail(3)).double()
    bounded, (x, _) = bounded_module(net, SHAPE), labelled()
    image = BoundedTensor(x, BALLS[1])
    for _ in range(2):
        lower, upper = bounded.compute_bounds(x=(image,), method=method)
        loss = (upper - lower).sum() + lower.square().sum()
        found = torch.autograd.grad(loss, [front.mean, front.std])
        reference = normalised()
        reference.weight = torch.diag(1 / front.std.flatten())[:, :, None, None].detach().requires_grad_()
        reference.bias = (-front.mean / front.std).flatten().detach().requires_grad_()
        other = bounded_module(nn.Sequential(reference, *net[1:]), SHAPE)
        lower, upper = other.compute_bounds(x=(image,), method=method)
        loss = (upper - lower).sum() + lower.square().sum()
        weight, bias = torch.autograd.grad(loss, [reference.weight, reference.bias])
        scale, mean = front.std.flatten().reciprocal().detach(), front.mean.flatten().detach()
        assert torch.allclose(found[0].flatten(), -bias * scale, atol=1e-9)
        by_std = -weight[:, :, 0, 0].diagonal() * scale**2 + bias * mean * scale**2
        assert torch.allclose(found[1].flatten(), by_std, atol=1e-9)
        with torch.no_grad():
            front.mean += 0.1
            front.std *= 1.5
