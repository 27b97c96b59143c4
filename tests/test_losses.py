"""Losses for one set: bounds hold on the region, the region lies in the set, every loss is what its paper says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cure_plugin.attacks import Pgd, pgd_variable
from cure_plugin.bounds.margins import elided, lower_margins
from cure_plugin.bounds.module import bounded_module
from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.sets import PerturbationLpBall, PerturbationSet, PerturbationUnion, set_spec
from cure_plugin.testing import LossTestCase
from cure_plugin.training import (
    LOSSES,
    CureObjective,
    TrainingSet,
    adversarial_loss,
    cc_ibp_loss,
    crown_ibp_loss,
    ibp_loss,
    mtl_ibp_loss,
    relu_shrinking,
    sabr_box_loss,
    sabr_loss,
)
from cure_plugin.training.loss import Blended, LipschitzMargin, Loss, Sabr, SabrBox
from cure_plugin.training.recipe import SetRecipe, recipe_from_mapping

SETTINGS = {"data": "mnist-slice", "net": "cnn_small", "epochs": 2, "ramp_epochs": 1}

SETS = ("linf=0.05", "l2=0.4", "l1=1.0", "R(10)", "R(5) Sh(2)", "C(5) B(0.01)", "T(1,1)", "patch=2x2", "l0=2")
"""One of every kind."""

COSTLY = ("R(5) Sh(2)", "C(5) B(0.01)")
"""Geometric sets beside another of their kind."""


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    return load_data("mnist-slice", True).batch(slice(0, 6))


def trained(batch_norm: bool = False) -> torch.nn.Sequential:
    """A net whose logits are not all alike."""
    net = build_net(NetSpec("cnn_small", (1, 28, 28), batch_norm=batch_norm), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    x, y = load_data("mnist-slice", True).batch(slice(0, 100))
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


NET = trained()


def attacked(perturbation: PerturbationSet, x: Tensor, y: Tensor) -> Tensor:
    return pgd_variable(NET, x, y, perturbation, Pgd(3), generator=torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=pytest.mark.slow) if text in COSTLY else text for text in SETS]
)
def test_small_regions_lie_in_the_set_and_their_loss_bounds_the_cross_entropy(
    text: str, ratio: float, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    perturbation = set_spec(text).build()
    variable = attacked(perturbation, x, y)
    centre, region = perturbation.small_region(x, variable, ratio)
    loss = sabr_loss(bounded_module(NET, (1, 28, 28)), x, y, perturbation, variable, ratio)
    for seed in range(5):
        point = region.sample(centre, torch.Generator().manual_seed(seed))
        if not isinstance(region, PerturbationLpBall) or region.domain is not None:
            assert bool(perturbation.contains(x, point, 1e-4).all())
        else:  # l1 and l2 regions are not cut with the domain
            assert bool(PerturbationLpBall(region.p, perturbation.eps, None).contains(x, point, 1e-5).all())
        assert bool((F.cross_entropy(NET(point), y, reduction="none") <= loss.values + 1e-4).all())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_loss_trains_every_parameter(kind: str, batch_norm: bool, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    net = trained(batch_norm).train()
    loss = LOSSES.make(kind, {key: {"ratio": 0.01, "mix": 0.5, "steps": 2}[key] for key in LOSSES.options(kind)})
    sets = [TrainingSet(set_spec(text).build(), loss) for text in ("linf=0.02", "l2=0.1")]
    objective = CureObjective(sets, strategy="joint", alignment=0.1, align_from="both", attack_steps=2)
    outcome = objective(bounded_module(net, (1, 28, 28)), net, x, y, generator=torch.Generator().manual_seed(0))
    outcome.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert sum(float(p.grad.abs().sum()) for p in net.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("text", ["linf=0.05", "l2=0.4", "R(5)", "patch=2x2"])
def test_losses_by_their_definition(text: str, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    perturbation = set_spec(text).build()
    bounded = bounded_module(NET, (1, 28, 28))
    variable = attacked(perturbation, x, y)
    with torch.no_grad():
        interval = elided(lower_margins(bounded, x, y, perturbation, "IBP"))
        logits = NET(perturbation.decode(x, variable))
        adversarial = adversarial_loss(NET, x, y, perturbation, variable)
        assert torch.allclose(adversarial.values, F.cross_entropy(logits, y, reduction="none"), atol=1e-5)
        assert torch.allclose(ibp_loss(bounded, x, y, perturbation).vector, interval, atol=1e-5)
        mtl = mtl_ibp_loss(bounded, NET, x, y, perturbation, variable, 0.3)
        zero = torch.zeros(len(y), dtype=torch.long)
        robust = F.cross_entropy(interval, zero, reduction="none")
        assert torch.allclose(mtl.values, 0.7 * adversarial.values + 0.3 * robust, rtol=1e-4, atol=1e-4)
        mixed = 0.7 * adversarial.vector + 0.3 * interval
        cc = cc_ibp_loss(bounded, NET, x, y, perturbation, variable, 0.3)
        assert torch.allclose(cc.values, F.cross_entropy(mixed, zero, reduction="none"), rtol=1e-4, atol=1e-4)
        # De Palma et al.: convexity of the cross entropy puts CC-IBP below MTL-IBP
        assert bool((cc.values <= mtl.values + 1e-4).all())


def test_crown_ibp_is_a_mix_of_two_bounds(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    ball = PerturbationLpBall(math.inf, 0.03)
    bounded = bounded_module(NET, (1, 28, 28))
    with torch.no_grad():
        parts = {method: elided(lower_margins(bounded, x, y, ball, method)) for method in ("IBP", "CROWN-IBP")}
        expected = 0.25 * parts["CROWN-IBP"] + 0.75 * parts["IBP"]
        assert torch.allclose(crown_ibp_loss(bounded, x, y, ball, 0.25).vector, expected, atol=1e-4)
        assert torch.allclose(crown_ibp_loss(bounded, x, y, ball).vector, parts["CROWN-IBP"], atol=1e-5)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_papers_box_lies_in_the_ball(p: float, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    ball = PerturbationLpBall(p, 0.5)
    ratio = 1 if p == math.inf else 0.5 * 784 ** (-1 / p)
    variable = attacked(ball, x, y)
    centre, box = ball.small_box(x, variable, ratio)
    lower, upper = box.box(centre)
    # the point of the box that lies farthest from x
    corner = torch.where((upper - x).abs() > (x - lower).abs(), upper, lower)
    assert bool(ball.contains(x, corner, 1e-5).all())
    loss = sabr_box_loss(bounded_module(NET, (1, 28, 28)), x, y, ball, variable, ratio)
    assert bool((F.cross_entropy(NET(corner), y, reduction="none") <= loss.values + 1e-4).all())


def test_a_box_that_does_not_fit_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    with pytest.raises(SpecError, match="does not fit into it; take a ratio"):
        PerturbationLpBall(2, 0.5).small_box(x, x, 0.1)
    with pytest.raises(SpecError, match="takes lp balls"):
        TrainingSet(set_spec("R(10)").build(), SabrBox(0.1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "sabre"}, "unknown loss 'sabre'"),
        ({"ratio": 0.0}, "attacks alone are loss adversarial"),
        ({"mix": 1.5, "loss": "mtl-ibp"}, r"l2: mix must lie in \(0, 1\]"),
        ({"mix": 0.5}, "l2: mix means nothing to loss 'sabr'"),
        ({"ratio": 0.5, "loss": "ibp"}, "l2: ratio means nothing to loss 'ibp'"),
        ({"loss": "cc-ibp"}, "l2: loss 'cc-ibp' needs mix"),
        ({"attack_step": 0.0}, "attack_step of l2"),
    ],
)
def test_bad_training_sets_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        TrainingSet(PerturbationLpBall(2, 0.5), **changes)  # type: ignore[arg-type]


def test_unions_are_refused_with_a_remedy(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    union = PerturbationUnion([PerturbationLpBall(2, 0.5), PerturbationLpBall(math.inf, 0.1)])
    objective = CureObjective([TrainingSet(union, 0.5)], attack_steps=1)
    with pytest.raises(SpecError, match="one by one"):
        objective(bounded_module(NET, (1, 28, 28)), NET, x, y)


def test_shrinking_acts_inside_its_block_only(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    ball = PerturbationLpBall(math.inf, 0.05)
    bounded = bounded_module(NET, (1, 28, 28))
    with torch.no_grad():
        before = lower_margins(bounded, x, y, ball, "IBP")
        with relu_shrinking(bounded, 0.8):
            shrunk = lower_margins(bounded, x, y, ball, "IBP")
            assert torch.equal(before, lower_margins(bounded_module(NET, (1, 28, 28)), x, y, ball, "IBP"))
        after = lower_margins(bounded, x, y, ball, "IBP")
    assert torch.equal(before, after) and bool((shrunk > before).any())


class TestSabr(LossTestCase):
    def make(self) -> Loss:
        return LOSSES.make("sabr", {"ratio": 0.4})


class TestSabrBox(LossTestCase):
    def make(self) -> Loss:
        return LOSSES.make("sabr-box", {"ratio": 0.01})


class TestIbp(LossTestCase):
    def make(self) -> Loss:
        return LOSSES.make("ibp")


class TestCrownIbp(LossTestCase):
    def make(self) -> Loss:
        return LOSSES.make("crown-ibp", {"mix": 0.5})


class TestLipschitzMargin(LossTestCase):
    def make(self) -> Loss:
        return LOSSES.make("lipschitz")


class TestLipschitzMarginOfAPart(LossTestCase):
    """Of a ball of half the radius: what the loss of that ball is."""

    def make(self) -> Loss:
        return LOSSES.make("lipschitz", {"ratio": 0.5})


class TestLipschitzMarginOfL1(TestLipschitzMargin):
    def perturbation(self) -> PerturbationSet:
        return PerturbationLpBall(1, 0.1)


class _OfNoName:
    """Made of other losses, so it is not registered itself."""

    def test_it_is_registered_and_made_again_from_its_options(self) -> None:
        recipe = SetRecipe("l2=0.1", self.make())  # type: ignore[attr-defined]
        assert recipe_from_mapping({**SETTINGS, "sets": [recipe.to_mapping()]}).sets == (recipe,)


class TestBlendedWithClean(_OfNoName, LossTestCase):
    def make(self) -> Loss:
        return Blended(LipschitzMargin(), 0.6)


class TestBlendedWithAttacks(_OfNoName, LossTestCase):
    def make(self) -> Loss:
        return Blended(Sabr(0.4), 0.6, attacked=True, vectors=True)


class TestMtlIbp(LossTestCase):
    def make(self) -> Loss:
        return LOSSES.make("mtl-ibp", {"mix": 0.3})


class TestCcIbp(LossTestCase):
    def make(self) -> Loss:
        return LOSSES.make("cc-ibp", {"mix": 0.3})


class TestAdversarial(LossTestCase):
    def make(self) -> Loss:
        return LOSSES.make("adversarial")
