"""CROWN in parts: the bounds of the whole, in the memory asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from auto_LiRPA import BoundedModule
from net_attacks import image, sets_for
from random_nets import Drawn, draw
from torch import nn

from cure_plugin.bounds.margins import crown_bounds
from cure_plugin.bounds.memory import crown_rows
from cure_plugin.bounds.module import bounded_module
from cure_plugin.bounds.parts import crown_bounds_in_parts, only_relus_bend
from cure_plugin.certification import AlphaCrown, Certifier, Coupled, Crown
from cure_plugin.errors import SpecError
from cure_plugin.sets import set_spec


def test_only_nets_of_relus_are_bounded_in_parts() -> None:
    for layer, divides in ((nn.ReLU(), True), (nn.Tanh(), False), (nn.LeakyReLU(), False)):
        net = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        bounded = bounded_module(net, (3,))
        assert only_relus_bend(bounded) == divides
        assert all(method.divides(bounded) == divides for method in (Crown(), Coupled(), AlphaCrown()))


def bounded_nets(first: int, count: int) -> Iterator[tuple[Drawn, nn.Module, BoundedModule]]:
    """Generated nets that can be bounded in parts, with what they were drawn as."""
    for seed in range(first, first + 20 * count):
        drawn = draw(seed, exotic=seed % 2 == 0)
        net = drawn.build()
        try:
            bounded = bounded_module(net, drawn.shape)
        except SpecError:
            continue
        if bounded.relus and only_relus_bend(bounded):
            count -= 1
            yield drawn, net, bounded
        if count == 0:
            return


@pytest.mark.parametrize(("first", "nets"), [(50_000, 2), pytest.param(51_000, 30, marks=pytest.mark.slow)])
def test_parts_give_the_bounds_of_the_whole(first: int, nets: int) -> None:
    compared = 0
    for drawn, net, bounded in bounded_nets(first, nets):
        x, perturbation = image(drawn), sets_for(drawn.shape, drawn.seed)["l2"]
        y = net(x).argmax(1)
        whole = crown_bounds(bounded, x, y, perturbation)
        rows = dict.fromkeys(crown_rows(bounded, 4, 1), 5)
        parts = crown_bounds_in_parts(bounded, x, y, perturbation, rows)
        points = perturbation.around(x.expand(50, *x.shape[1:])).sample(torch.Generator().manual_seed(0))
        logits = net(points)
        margins = torch.cat([logits[:, y] - logits[:, j : j + 1] for j in range(logits.shape[1]) if j != y], 1)
        assert bool((margins.amin(0) >= parts.margins[0] - 1e-5).all())
        for name, (low, high) in whole.boxes.items():
            tolerance = 1e-5 * (1 + (high - low).abs().max())
            bends = (low < 0) & (high > 0)
            assert bool((parts.boxes[name][0] >= low - tolerance)[bends].all())
            assert bool((parts.boxes[name][1] <= high + tolerance)[bends].all())
            compared += int(bends.sum())
    assert compared > 5 * nets


@pytest.mark.parametrize("text", ["linf=0.03", "l2=0.2"])
def test_little_memory_changes_no_margin(text: str) -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU()]
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 3)).eval()
    x, perturbation = torch.rand(1, 1, 8, 8), set_spec(text).build()
    y = net(x).argmax(1)
    for method in ("CROWN", "coupled", "alpha-CROWN"):
        ample, little = (Certifier(net, (1, 8, 8), memory=memory) for memory in (2.0, 1e-6))
        found = little.lower_bound(x, y, perturbation, method)
        assert torch.allclose(found, ample.lower_bound(x, y, perturbation, method), atol=2e-2)
        assert bool(found > ample.lower_bound(x, y, perturbation, "CROWN") - 1e-4)
