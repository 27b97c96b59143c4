"""Branch and bound over pieces: sound, cheaper than one bound of everything allows, honest when it fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cure_plugin import PerturbationGeometric, PerturbationPatch, PerturbationSet
from cure_plugin.attacks import find_counterexample
from cure_plugin.bounds.margins import LayerBounds, crown_bounds
from cure_plugin.certification import Certifier, Crown, Found, Splitting
from cure_plugin.certification.bounder import Bounder
from cure_plugin.certification.splitting import Prove, SplitResult, Steps, prove_by_splitting
from cure_plugin.checkpoint import load_net
from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.sets import set_spec
from cure_plugin.training import Trainer, load_recipe


@pytest.fixture(scope="module")
def net(made_once: Callable[..., Path]) -> nn.Module:
    return load_net(made_once("net for splitting", train) / "checkpoint.pt")[1]


def train(folder: Path) -> None:
    recipe = load_recipe(
        "demo_linf", {"epochs": 3, "ramp_epochs": 1, "batch_size": 50, "attack_steps": 2, "milestones": []}
    )
    Trainer(recipe, load_data("mnist-slice", True).first(2000), folder).run()


def steps(prove: Prove) -> Steps:
    """To prove pieces, and nothing else."""
    return Steps(prove, lambda *_: None, lambda *_: SplitResult(False, 0, -math.inf))


@pytest.mark.parametrize("text, count", [("R(8)", 5), ("R(2) Sh(2)", 3), ("patch=2x2", 2)])
def test_splitting_beats_one_bound_and_no_attack_beats_it(net: nn.Module, text: str, count: int) -> None:
    certifier = Certifier(net, (1, 28, 28), batch_size=16, pieces=150)
    x, y = load_data("mnist-slice", False).batch(slice(0, count))
    perturbation: PerturbationSet = set_spec(text).build()
    at_once = certifier.lower_bound(x, y, perturbation, "CROWN") > 1e-4
    results = [certifier.split(x[i : i + 1], y[i : i + 1], set_spec(text).build()) for i in range(count)]
    proved = torch.tensor([result.proved for result in results])
    assert bool((proved | ~at_once).all()) and bool(proved.any())
    found, _ = find_counterexample(net, x, y, perturbation, steps=20)
    assert not bool((found & proved).any())
    assert all(result.pieces <= 150 for result in results)


@pytest.mark.parametrize("text", ["R(2) Sh(2)", "R(30)", "T(2,1)", "Sc(1) R(1) C(1) B(0.001)", "C(10)", "R(0)"])
def test_pieces_cover_a_parameter_box(text: str) -> None:
    x = torch.rand(1, 1, 28, 28)
    whole = PerturbationGeometric.parse(text)
    shares = torch.cat([torch.rand(2000, len(whole.lower)).round(decimals=2), torch.eye(len(whole.lower))])
    points = whole.lower + shares * (whole.upper - whole.lower)
    for pieces in (whole.partition(x), whole.split(x)):
        if pieces:
            inside = [
                ((points >= piece.lower) & (points <= piece.upper)).all(1)  # type: ignore[attr-defined]
                for piece in pieces
            ]
            assert bool(torch.stack(inside).any(0).all())
    assert len(PerturbationGeometric.parse("R(30)").partition(x)) == 12


@pytest.mark.parametrize("block", [None, (3, 9, 0, 10), (5, 5, 5, 5)])
def test_pieces_cover_every_position_of_a_patch(block: tuple[int, int, int, int] | None) -> None:
    x = torch.rand(1, 1, 28, 28)
    whole = PerturbationPatch(5, 5, block)
    r0, r1, c0, c1 = whole.positions(x)[0].tolist()
    for pieces in (whole.partition(x), whole.split(x)):
        positions = [
            (r, c)
            for piece in pieces
            for ends in [piece.block.tolist()]  # type: ignore[attr-defined]
            for r in range(ends[0], ends[1] + 1)
            for c in range(ends[2], ends[3] + 1)
        ]
        assert len(positions) == len(set(positions))
        assert not pieces or set(positions) == {(r, c) for r in range(r0, r1 + 1) for c in range(c0, c1 + 1)}


def test_the_margin_of_a_failed_split_is_a_bound_of_the_whole() -> None:
    """Worse pieces may be waiting when one that cannot be split further fails."""
    x, y = torch.rand(1, 1, 5, 2), torch.zeros(1, dtype=torch.long)
    whole = PerturbationPatch(2, 2)  # rows 0 to 2, and row 3 alone

    def prove(x: torch.Tensor, y: torch.Tensor, pieces: PerturbationSet, *_: object) -> Found:
        lower = torch.where(pieces.positions(x)[:, 0] == 3, -1.0, -5.0)  # type: ignore[attr-defined]
        return Found(lower, lower > 0)

    result = prove_by_splitting(steps(prove), x, y, whole, 100, 8)
    assert not result.proved and result.margin == -5.0


def test_what_is_known_of_a_piece_helps_with_its_parts(net: nn.Module) -> None:
    """Neurons that do not bend over the piece are not bounded again, and margins stay what they are."""
    bounder = Bounder(net, (1, 28, 28), 1, 4.0)
    x, y = load_data("mnist-slice", False).batch(slice(0, 1))
    whole = PerturbationGeometric.parse("R(4)")
    known = bounder.widened(whole.around(x), crown_bounds(bounder.bounded, x, y, whole))
    for part in whole.split(x):
        alone = crown_bounds(bounder.bounded, x, y, part)
        helped = crown_bounds(bounder.bounded, x, y, part, hints=known.boxes)
        assert torch.allclose(alone.margins, helped.margins, rtol=1e-3, atol=1e-3)
        for name, (low, high) in list(known.boxes.items())[1:]:
            still = (low >= 0) | (high <= 0)
            bends = (alone.boxes[name][0] < 0) & (alone.boxes[name][1] > 0)
            assert bool(still.any()) and not bool((still & bends).any())
            assert torch.equal(helped.boxes[name][0][still], low[still])


def test_parts_are_bounded_with_what_is_known_of_the_piece() -> None:
    x, y = torch.rand(1, 1, 5, 2), torch.zeros(1, dtype=torch.long)
    heard: list[LayerBounds | None] = []

    def prove(x: torch.Tensor, y: torch.Tensor, pieces: PerturbationSet, _: str, known: LayerBounds | None) -> Found:
        heard.append(known)
        number = torch.full((len(x),), float(len(heard)))
        layers = LayerBounds(number[:, None], {}, torch.zeros(len(x)).bool(), torch.zeros(len(x)).long())
        return Found(number, number > 1, layers=layers)

    assert prove_by_splitting(steps(prove), x, y, PerturbationGeometric.parse("R(1)"), 99, 8).proved
    assert heard[0] is None and heard[1] is not None
    assert heard[1].margins.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(("text", "methods", "whole"), [("R(9)", 2, 0), ("R(9)", 1, 1), ("R(1)", 2, 1)])
def test_wide_sets_are_left_to_their_pieces(
    net: nn.Module, text: str, methods: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where splitting follows."""
    bounded: list[str] = []
    monkeypatch.setattr(Splitting, "split", lambda *_: SplitResult(False, 0, math.nan))
    monkeypatch.setattr(Crown, "run", lambda self, work: bounded.append(self.name) or Found(work.y * 0.0, work.y > 99))
    x, y = load_data("mnist-slice", False).batch(slice(0, 1))
    Certifier(net, (1, 28, 28), [Crown(), Splitting()][:methods]).decide(x, y, PerturbationGeometric.parse(text))
    assert len(bounded) == whole


def test_a_partition_that_covers_nothing_proves_nothing() -> None:
    class Empty(PerturbationPatch):
        def partition(self, x: torch.Tensor) -> tuple[PerturbationSet, ...]:
            return ()

    x, y = torch.rand(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)
    with pytest.raises(SpecError, match="empty partition"):
        prove_by_splitting(steps(lambda *_: Found(torch.ones(1), torch.ones(1) > 0)), x, y, Empty(2, 2), 100, 8)


def test_nan_bounds_prove_nothing() -> None:
    x, y = torch.rand(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)

    def prove(x: torch.Tensor, *_: object) -> Found:
        lower = torch.full((len(x),), torch.nan)
        return Found(lower, lower > 0)

    nan = prove_by_splitting(steps(prove), x, y, PerturbationPatch(2, 2), 99, 8)
    assert not nan.proved


def test_small_batches_and_huge_grids(net: nn.Module) -> None:
    x, y = load_data("mnist-slice", False).batch(slice(0, 1))
    Certifier(net, (1, 28, 28), batch_size=2, pieces=200).split(x, y, PerturbationPatch(2, 2))
    assert len(PerturbationGeometric.parse("R(30) Sc(10) T(10,10)").partition(x)) <= 4096


def test_what_cannot_be_split_or_stacked_is_refused() -> None:
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(SpecError, match="one image"):
        PerturbationPatch(2, 2).split(x)
    with pytest.raises(SpecError, match="cannot be stacked"):
        set_spec("l2=0.5").build().stack([])
    with pytest.raises(SpecError, match="block of positions"):
        PerturbationPatch(2, 2).stack([PerturbationPatch(2, 2)])
    with pytest.raises(SpecError, match="one size"):
        PerturbationPatch(2, 2).stack([PerturbationPatch(5, 5, (0, 0, 0, 0))])
    with pytest.raises(SpecError, match="takes 1 parameters"):
        PerturbationGeometric(("R",), [0.0, 1.0], [1.0, 2.0])
    with pytest.raises(SpecError, match="lower <= upper"):
        PerturbationGeometric(("R",), [1.0], [0.0])


@pytest.mark.parametrize("text", [pytest.param("R(60)", marks=pytest.mark.slow), "patch=6x6"])
def test_counterexamples_in_pieces_lie_in_the_whole_set(net: nn.Module, text: str) -> None:
    certifier = Certifier(net, (1, 28, 28), (Crown(), Splitting(pieces=400)))  # no attack but the one on pieces
    x, y = load_data("mnist-slice", False).batch(slice(0, 6))
    perturbation: PerturbationSet = set_spec(text).build()
    verdicts, points = certifier.decide(x, y, perturbation, torch.Generator().manual_seed(0))
    found = torch.tensor([verdict.stage == "splitting" and verdict.status == "falsified" for verdict in verdicts])
    assert bool(found.any())
    assert bool(perturbation.contains(x[found], points[found], 1e-3).all())
    assert bool((net(points[found]).argmax(1) != y[found]).all())
    assert all(verdict.margin <= 0 for verdict, broken in zip(verdicts, found, strict=True) if broken)


@pytest.mark.parametrize("seed", [2, 5])
def test_neurons_are_split_where_a_patch_has_one_position_left(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    x, patch = torch.rand(1, 1, 5, 5), PerturbationPatch(2, 2)
    with torch.no_grad():
        y = net(x).argmax(1)
        net[-1].bias[y] += 0.05
    pieces_alone, both = (
        Certifier(net, (1, 5, 5), ["IBP", "CROWN-IBP", "CROWN", method]).decide(x, y, patch)[0][0]
        for method in (Splitting(seconds=1e-9), Splitting())
    )
    assert (pieces_alone.status, both.status) == ("undecided", "proved")
    assert both.pieces > pieces_alone.pieces and both.depth >= pieces_alone.depth > 0
    found, _ = find_counterexample(net, x, y, patch, steps=100)
    assert not bool(found.any())


class Whole(PerturbationPatch):
    """Has one piece, whose box is larger than it."""

    split_methods = ("CROWN",)

    def partition(self, x: torch.Tensor) -> tuple[PerturbationSet, ...]:
        return (self,)

    def split(self, x: torch.Tensor) -> tuple[PerturbationSet, ...]:
        return ()


def test_a_counterexample_of_a_larger_box_is_none_of_the_set() -> None:
    """z_0 = 0.05 + |a - 0.6| - 10 relu(a + b - 1.5) falls below 0 only where the patch would cover both a and b."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].weight[:] = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
        net[1].bias[:] = torch.tensor([-0.6, 0.6, -1.5])
        net[3].weight[:] = torch.tensor([[1.0, 1.0, -10.0], [0.0, 0.0, 0.0]])
        net[3].bias[:] = torch.tensor([0.05, 0.0])
    x, y = torch.zeros(1, 1, 1, 2), torch.tensor([0])
    verdict = Certifier(net, (1, 1, 2), ["CROWN", Splitting()]).decide(x, y, Whole(1, 1))[0][0]
    assert (verdict.status, verdict.stage) == ("undecided", "splitting")
    assert verdict.pieces > 1  # neurons were split
