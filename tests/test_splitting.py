"""Branch and bound over pieces: sound, cheaper than one bound of everything allows, honest when it fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cure_plugin import PerturbationGeometric, PerturbationPatch, PerturbationSet
from cure_plugin.attacks import find_counterexample
from cure_plugin.certification import Certifier
from cure_plugin.certification.splitting import prove_by_splitting
from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.sets import set_spec
from cure_plugin.training import Trainer, load_recipe


@pytest.fixture(scope="module")
def net() -> nn.Module:
    recipe = load_recipe(
        "demo_linf", {"epochs": 3, "ramp_epochs": 1, "batch_size": 50, "attack_steps": 2, "milestones": []}
    )
    return Trainer(recipe, load_data("mnist-slice", True).first(2000)).run()


@pytest.mark.parametrize("text, count", [("R(8)", 5), ("R(2) Sh(2)", 3), ("patch=2x2", 2)])
def test_splitting_beats_one_bound_and_no_attack_beats_it(net: nn.Module, text: str, count: int) -> None:
    certifier = Certifier(net, (1, 28, 28), batch_size=16)
    x, y = load_data("mnist-slice", False).batch(slice(0, count))
    perturbation: PerturbationSet = set_spec(text).build()
    at_once = certifier.lower_bound(x, y, perturbation, "CROWN") > 1e-4
    results = [
        prove_by_splitting(certifier, x[i : i + 1], y[i : i + 1], set_spec(text).build(), ("IBP", "CROWN"), 150)
        for i in range(count)
    ]
    proved = torch.tensor([result.proved for result in results])
    assert bool((proved | ~at_once).all()) and bool(proved.any())
    found, _ = find_counterexample(net, x, y, perturbation, steps=20)
    assert not bool((found & proved).any())
    assert all(result.pieces <= 150 for result in results)


def test_pieces_cover_the_whole(net: nn.Module) -> None:
    x = load_data("mnist-slice", False).batch(slice(0, 1))[0]
    pieces = PerturbationGeometric.parse("R(2) Sh(2)").split(x)
    assert len(pieces) == 2
    ends = [(p.lower.tolist(), p.upper.tolist()) for p in pieces]  # type: ignore[attr-defined]
    assert min(low for low, _ in ends) == [-2.0, -2.0] and max(high for _, high in ends) == [2.0, 2.0]
    positions = {
        (r, c)
        for p in PerturbationPatch(5, 5).split(x)
        for r in range(int(p.block[0]), int(p.block[1]) + 1)  # type: ignore[attr-defined]
        for c in range(int(p.block[2]), int(p.block[3]) + 1)  # type: ignore[attr-defined]
    }
    assert len(positions) == 24 * 24


def test_what_cannot_be_split_or_stacked_is_refused() -> None:
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(SpecError, match="one image"):
        PerturbationPatch(2, 2).split(x)
    with pytest.raises(SpecError, match="cannot be stacked"):
        set_spec("l2=0.5").build().stack([])
    with pytest.raises(SpecError, match="block of positions"):
        PerturbationPatch(2, 2).stack([PerturbationPatch(2, 2)])
    with pytest.raises(SpecError, match="takes 1 parameters"):
        PerturbationGeometric(("R",), [0.0, 1.0], [1.0, 2.0])
    with pytest.raises(SpecError, match="lower <= upper"):
        PerturbationGeometric(("R",), [1.0], [0.0])
