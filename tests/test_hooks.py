"""Hooks into auto_LiRPA know themselves from other people's wrappers, above and below them, and can be taken away."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from auto_LiRPA import BoundedModule, BoundedTensor
from auto_LiRPA.bound_ops import BoundRelu
from conftest import small_net
from torch import Tensor

from cure_plugin import PerturbationLpBall
from cure_plugin.bounds import hooks
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.bounds.module import bounded_module

Function = Callable[..., Any]


class Counter:
    """Something to hook into."""

    def count(self, start: int) -> int:
        """``start`` as it is."""
        return start


class Inheriting(Counter):
    """The method is its parent's."""


def plus_one(original: Function) -> Function:
    return lambda self, start: original(self, start) + 1


def foreign(original: Function) -> Function:
    """Another package's wrapper, as functools.wraps leaves it: with the attributes of what is below."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return 10 * original(*args, **kwargs)

    return wrapper


def hidden(original: Function) -> Function:
    """The same without a trace of what is below."""
    return lambda *args, **kwargs: 10 * original(*args, **kwargs)


@pytest.fixture(autouse=True)
def stock() -> Iterator[Function]:
    """The method as it was, and is again afterwards."""
    own = Counter.count
    yield own
    for owner in (Counter, Inheriting):
        hooks.uninstall(owner, "count")
    Counter.count = own  # type: ignore[method-assign]


def test_twice_wraps_once(stock: Function) -> None:
    assert not hooks.installed(Counter, "count")
    hooks.install(Counter, "count", plus_one)
    first = Counter.count
    hooks.install(Counter, "count", plus_one)
    assert Counter.count is first and hooks.installed(Counter, "count") and Counter().count(1) == 2
    assert Counter.count.__doc__ == stock.__doc__


def test_uninstalling_gives_the_same_function_back(stock: Function) -> None:
    for _ in range(2):
        hooks.install(Counter, "count", plus_one)
        hooks.uninstall(Counter, "count")
        assert Counter.count is stock and not hooks.installed(Counter, "count")
    hooks.uninstall(Counter, "count")
    assert Counter.count is stock


def test_an_inherited_method_is_inherited_again(stock: Function) -> None:
    hooks.install(Inheriting, "count", plus_one)
    assert Inheriting().count(1) == 2 and Counter().count(1) == 1
    hooks.uninstall(Inheriting, "count")
    assert "count" not in vars(Inheriting) and Inheriting.count is stock


@pytest.mark.parametrize("wrap", [foreign, hidden])
def test_a_foreign_wrapper_below_is_no_hook_of_ours(wrap: Callable[[Function], Function]) -> None:
    Counter.count = below = wrap(Counter.count)  # type: ignore[method-assign]
    hooks.install(Counter, "count", plus_one)
    assert Counter().count(1) == 11
    hooks.uninstall(Counter, "count")
    assert Counter.count is below and Counter().count(1) == 10


@pytest.mark.parametrize("wrap", [foreign, hidden])
def test_below_a_foreign_wrapper_ours_falls_silent_and_acts_again(wrap: Callable[[Function], Function]) -> None:
    hooks.install(Counter, "count", plus_one)
    Counter.count = above = wrap(Counter.count)  # type: ignore[method-assign]
    assert Counter().count(1) == 20
    hooks.uninstall(Counter, "count")
    assert Counter.count is above and Counter().count(1) == 10 and not hooks.installed(Counter, "count")
    for _ in range(2):
        hooks.install(Counter, "count", plus_one)
        assert hooks.installed(Counter, "count")
        # found below a wrapper that says what it wraps; on top of one that hides it, once
        assert Counter().count(1) == (20 if wrap is foreign else 11)


def test_below_a_foreign_wrapper_ours_is_not_installed_again() -> None:
    hooks.install(Counter, "count", plus_one)
    Counter.count = above = foreign(Counter.count)  # type: ignore[method-assign]
    hooks.install(Counter, "count", plus_one)
    assert Counter.count is above and hooks.installed(Counter, "count")


def test_a_foreign_wrapper_that_takes_ours_away_with_it(stock: Function) -> None:
    Counter.count = foreign(stock)  # type: ignore[method-assign]
    hooks.install(Counter, "count", plus_one)
    Counter.count = stock  # type: ignore[method-assign]
    assert not hooks.installed(Counter, "count")
    hooks.install(Counter, "count", plus_one)
    assert Counter().count(1) == 2


@dataclass(frozen=True)
class Case:
    """One of our hooks: where it is, what to measure, and what it does to that (-1: less of it)."""

    owner: type
    method: str
    measure: Callable[[Tensor], float]
    sign: int


def first_layer_width(images: Tensor) -> float:
    """Of the first layer's IBP bounds over an l2 ball."""
    torch.manual_seed(0)
    bounded = bounded_module(small_net("plain"), (1, 8, 8))
    bounded.compute_bounds(x=(BoundedTensor(images, PerturbationLpBall(2, 0.5)),), method="IBP")
    node = bounded.relus[0].inputs[0]
    return float((node.upper - node.lower).detach().sum())


def coupled_margins(images: Tensor) -> float:
    """The sum of norm-coupled bounds; those of CROWN over tightened boxes without the hook."""
    torch.manual_seed(0)
    bounds = CoupledBounds(bounded_module(small_net("plain"), (1, 8, 8)), iterations=10)
    labels, best = torch.tensor([0, 2, 1]), torch.full((3,), torch.inf)
    return float(bounds.bounds(images, labels, PerturbationLpBall(2, 0.5), best).margins.detach().sum())


CASES = {
    "first layer": Case(BoundedModule, "IBP_general", first_layer_width, -1),
    "coupled": Case(BoundRelu, "bound_backward", coupled_margins, 1),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Our hooks are installed, and are again afterwards, whatever was put over them."""
    own = CASES[request.param]
    before = vars(own.owner)[own.method]
    yield own
    setattr(own.owner, own.method, before)
    hooks.install_all()


def passing(original: Function) -> Function:
    """A foreign wrapper that changes nothing."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return wrapper


def test_auto_lirpa_is_stock_without_a_hook_and_ours_with_it(case: Case, images: Tensor) -> None:
    hooked = case.measure(images)
    hooks.uninstall(case.owner, case.method)
    bare = case.measure(images)
    assert case.sign * (hooked - bare) > 1e-3
    hooks.install_all()
    assert case.measure(images) == pytest.approx(hooked, rel=1e-5)
    hooks.uninstall_all()
    assert not any(hooks.installed(other.owner, other.method) for other in CASES.values())


@pytest.mark.parametrize("place", ["below", "above"])
def test_our_hooks_stand_foreign_wrappers(case: Case, place: str, images: Tensor) -> None:
    hooked = case.measure(images)
    if place == "below":
        hooks.uninstall(case.owner, case.method)
    setattr(case.owner, case.method, passing(getattr(case.owner, case.method)))
    hooks.install_all()
    assert case.measure(images) == pytest.approx(hooked, rel=1e-5)
    hooks.uninstall(case.owner, case.method)
    assert case.sign * (hooked - case.measure(images)) > 1e-3


def test_importing_the_package_installs_both() -> None:
    assert all(hooks.installed(case.owner, case.method) for case in CASES.values())


def test_a_diagonal_convolution_that_learns_gets_all_its_gradients() -> None:
    torch.manual_seed(0)
    mixing = torch.nn.Conv2d(2, 2, 1)
    mixing.weight.data = torch.eye(2)[:, :, None, None].clone()
    net = torch.nn.Sequential(mixing, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    bounded = bounded_module(net, (2, 2, 2))
    bounded.train()
    x = BoundedTensor(torch.rand(1, 2, 2, 2), PerturbationLpBall(float("inf"), 0.1))
    bounded.compute_bounds(x=(x,), method="IBP")[0].sum().backward()
    assert mixing.weight.grad is not None and bool((mixing.weight.grad != 0).all())
