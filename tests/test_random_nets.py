"""Random nets attacked: no point of a set crosses a bound, and no net that just loses is proved."""

from __future__ import annotations

import collections
import re
import sys
from dataclasses import replace

import pytest
import torch
from net_attacks import METHODS, broken_proof, crossings, mode, sets_for, wrongly_proved
from random_nets import Drawn, branching, draw

from cure_plugin.bounds.module import bounded_module
from cure_plugin.errors import SpecError

_CHUNK = 5


def nets(first: int, count: int) -> list[Drawn]:
    """Nets of consecutive seeds; every third with rare operators, every second in float64."""
    drawn = [draw(seed, exotic=seed % 3 == 0) for seed in range(first, first + count)]
    return [replace(one, dtype=torch.float64) if one.seed % 2 else one for one in drawn]


def attack(drawn: Drawn, every: int = 1) -> None:
    """Attack every such set of the net, alpha-CROWN on as many nets; fails with a script that makes the net again."""
    names = list(sets_for(drawn.shape, drawn.seed))
    methods = METHODS if drawn.seed % every == 0 else METHODS[:-1]
    try:
        broken = list(crossings(drawn, names[drawn.seed % every :: every], methods))
    except SpecError:
        return
    lines = "\n".join(broken)
    assert not broken, f"{lines}\n{drawn.script()}\nsets: net_attacks.sets_for({drawn.shape}, {drawn.seed})"


def lose(drawn: Drawn, by: float, name: str = "") -> None:
    """The set of that name, or one of every net, in turn."""
    names = list(sets_for(drawn.shape, drawn.seed))
    try:
        wrong = wrongly_proved(drawn, name or names[drawn.seed % len(names)], by)
    except SpecError:
        return
    assert not wrong, f"{wrong}\n{drawn.script()}"


def win(drawn: Drawn, steps: int) -> None:
    """One set of every net, in turn."""
    names = list(sets_for(drawn.shape, drawn.seed))
    try:
        broken = broken_proof(drawn, names[drawn.seed % len(names)], steps)
    except SpecError:
        return
    assert not broken, f"{broken}\n{drawn.script()}"


@pytest.mark.parametrize("first", range(0, 40, _CHUNK))
def test_no_bound_is_broken(first: int) -> None:
    for drawn in nets(first, _CHUNK):
        attack(drawn, every=3)


def test_nets_that_branch_are_refused() -> None:
    for drawn in nets(6000, 40):
        with pytest.raises(SpecError, match="reads values"):
            bounded_module(branching(drawn).build(), drawn.shape)


@pytest.mark.parametrize("first", range(0, 15, 5))
def test_nets_that_just_lose_are_not_proved(first: int) -> None:
    for drawn in nets(1000 + first, 5):
        lose(drawn, 1e-4 if drawn.seed % 4 < 2 else 1e-6)


@pytest.mark.parametrize("first", range(0, 10, 5))
def test_nets_that_are_just_proved_are_not_broken(first: int) -> None:
    for drawn in nets(1100 + first, 5):
        win(drawn, steps=60)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1000, 50))
def test_no_bound_is_broken_of_a_thousand_nets(first: int) -> None:
    for drawn in nets(2000 + first, 50):
        attack(drawn, every=3)


@pytest.mark.slow
@pytest.mark.parametrize("by", [1e-4, 1e-6])
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_two_hundred_nets_that_just_lose_are_not_proved(first: int, by: float) -> None:
    for drawn in nets(4000 + first, 20):
        lose(drawn, by)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linf", "l2", "l1"])
@pytest.mark.parametrize("first", range(0, 300, 20))
def test_three_hundred_nets_that_just_lose_are_not_proved_by_splits(first: int, name: str) -> None:
    for drawn in nets(7000 + first, 20):
        lose(drawn, 1e-4, name)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_two_hundred_nets_that_are_just_proved_are_not_broken(first: int) -> None:
    for drawn in nets(5000 + first, 20):
        win(drawn, steps=300)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_most_nets_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how many of a thousand nets run in which mode, and why others are refused."""
    modes = [mode(drawn) for drawn in nets(2000, 1000)]
    shown = collections.Counter(re.sub(r"node \S+|\S*\d\S*", "...", one)[:150] for one in modes)
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(f"{count:5d} {what}" for what, count in shown.most_common()) + "\n")
    assert sum(not one.startswith("refused") for one in modes) >= 600
