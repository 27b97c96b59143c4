"""Nets on a device other than the CPU, a pretended one: nothing is made in the wrong place, little is waited for."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from pretend_device import DEVICE, Pretending, lend
from torch import nn

from cure_plugin import bounded_module
from cure_plugin.attacks import find_counterexample
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.certification import (
    AlphaCrown,
    Attack,
    BranchAndBound,
    Certifier,
    Crown,
    IbpBound,
    Splitting,
)
from cure_plugin.certification.method import METHODS, BoundMethod
from cure_plugin.sets import PerturbationLpBall, PerturbationUnion, set_spec
from cure_plugin.training import CureObjective, LipschitzMargin, Sabr, TrainingSet

SHAPE = (1, 6, 6)

QUICK = (IbpBound(), Attack(10, 1), Crown(), BranchAndBound(), Splitting(), AlphaCrown(2))
"""The cascade's kinds of methods; every bound method has a test of its own."""

STEPS = 4
"""Of optimised bounds, each of which does the same on a device."""


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretending]:
    lend(monkeypatch)
    with Pretending() as pretending:
        yield pretending


def _net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 2, 4, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 6), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(6, 3)).eval()
    with torch.no_grad():  # freshly drawn, it hardly looks at images
        for layer in (net[0], net[4], net[6]):
            layer.weight *= 3
            layer.bias *= 0
    return net


def _batch(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return x, net(x).argmax(1)


def test_tensors_of_two_devices_do_not_meet() -> None:
    there = torch.ones(3, device=DEVICE)
    assert (there + 1).tolist() == [2, 2, 2] and (there[torch.tensor([0, 1])]).device == DEVICE
    for meeting in (
        lambda: there + torch.ones(3),
        lambda: torch.stack([there[0], torch.ones(())]),
        lambda: torch.ones(3)[there.long()],
        lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="device"):
            meeting()


def test_what_reads_values_is_counted(device: Pretending) -> None:
    there = torch.ones(3, device=DEVICE)
    there.sum().item(), there.cpu(), there[there > 0], there.tolist(), there.nonzero()
    assert sum(device.waits.values()) == 5


@pytest.mark.parametrize(
    "text",
    ["linf=0.1", "l2=0.4", "patch=1x1", "l0=1"]
    + [pytest.param(text, marks=pytest.mark.slow) for text in ("l1=1.5", "l1=1.0", "R(5)", "R(20)")],
)
def test_verdicts_are_those_of_the_cpu(text: str) -> None:
    net = _net()
    x, y = _batch(net)
    expected, _ = Certifier(net, SHAPE, QUICK).decide(x, y, set_spec(text).build())
    there = Certifier(copy.deepcopy(net).to(DEVICE), SHAPE, QUICK)
    verdicts, points = there.decide(x.to(DEVICE), y.to(DEVICE), set_spec(text).build())
    assert [verdict.status for verdict in verdicts] == [verdict.status for verdict in expected]
    assert points.device == DEVICE


@pytest.mark.parametrize("method", [name for name in METHODS if issubclass(METHODS.named(name), BoundMethod)])
def test_bounds_are_those_of_the_cpu(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoupledBounds.__init__, "__defaults__", (3 * STEPS, STEPS, 1, 0.2, torch.inf))
    net = _net()
    x, y = _batch(net)
    ball, asked = set_spec("l2=0.3").build(), AlphaCrown(STEPS) if method == AlphaCrown.name else method
    expected = Certifier(net, SHAPE).lower_bound(x, y, ball, asked)
    found = Certifier(copy.deepcopy(net).to(DEVICE), SHAPE).lower_bound(x.to(DEVICE), y.to(DEVICE), ball, asked)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_union_goes_to_a_device_with_its_members() -> None:
    ball = PerturbationLpBall(2, torch.tensor([0.1, 0.2]))
    (there,) = PerturbationUnion([ball]).on(DEVICE).members
    assert there.eps.device == DEVICE and ball.eps.device == torch.device("cpu")


def test_an_attack_waits_once_a_step(device: Pretending) -> None:
    net = _net().to(DEVICE)
    x = torch.rand(4, *SHAPE, device=DEVICE)
    y = net(x).argmax(1)
    counts = []
    for steps in (20, 40):
        device.waits.clear()
        find_counterexample(net, x, y, set_spec("l1=0.1").build(), steps, 1)
        counts.append(sum(device.waits.values()))
    assert counts[1] - counts[0] <= 20


@pytest.mark.parametrize("sets", [["linf=0.05", "l2=0.4"], ["R(5)", "patch=2x2"]], ids=str)
def test_a_training_step_waits_as_often_for_any_number_of_attack_steps(sets: list[str], device: Pretending) -> None:
    net = _net()
    x, y = _batch(net)
    there = copy.deepcopy(net).to(DEVICE)
    here, elsewhere = bounded_module(net, SHAPE), bounded_module(there, SHAPE)
    entries = [TrainingSet(set_spec(text).build(), Sabr(0.4)) for text in sets]
    if sets[1].startswith("l2"):
        entries.append(TrainingSet(set_spec("l1=1.0").build(), LipschitzMargin()))
    counts = []
    for steps in (2, 6):
        objective = CureObjective(entries, alignment=0.5, natural=0.1, attack_steps=steps)
        expected = objective(here, net, x, y, 0.5, torch.Generator().manual_seed(0)).loss
        device.waits.clear()
        loss = objective(elsewhere, there, x.to(DEVICE), y.to(DEVICE), 0.5, torch.Generator(DEVICE).manual_seed(0)).loss
        counts.append(sum(device.waits.values()))
        loss.backward()
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
        assert any(parameter.grad is not None for parameter in there.parameters())
    assert counts[0] == counts[1]
