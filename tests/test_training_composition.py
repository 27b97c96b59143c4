"""The training loop put together by hand: what each key of a recipe does to loss, gradient, schedule and state."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import small_net
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall
from cure_plugin.attacks import Pgd, pgd, pgd_variables, worst_margin_loss
from cure_plugin.bounds.module import bounded_module
from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.folding import AttackNet
from cure_plugin.nets import Normalize
from cure_plugin.training import (
    CureObjective,
    Recipe,
    SetRecipe,
    Trainer,
    TrainingSet,
    bound_alignment,
    evaluate,
    projected_epoch,
    run_epoch,
    smooth_ramp,
    warmup_regularizer,
)
from cure_plugin.training.loss import Sabr
from cure_plugin.training.losses import SetLoss, cc_ibp_loss, mtl_ibp_loss, sabr_box_loss, sabr_loss
from cure_plugin.training.objective import Outcome
from cure_plugin.training.regularizer import _imbalance
from cure_plugin.training.shrinking import relu_shrinking
from cure_plugin.training.world import ALONE

LABELS = torch.tensor([0, 2, 1])
SCALE = 0.6

RECIPE = Recipe(
    data="mnist-slice",
    net="cnn_small",
    sets=(SetRecipe("linf=0.05", Sabr(0.4)), SetRecipe("l2=0.2", Sabr(0.5))),
    epochs=5,
    ramp_epochs=1.5,
    batch_size=50,
    gradient_projection=0.5,
    attack_steps=1,
    milestones=(2, 4),
)


def by_hand(losses: list[Any], combined: str, penalty: Tensor, alignment: float) -> Tensor:
    values = torch.stack([loss.values for loss in losses])
    total = values.max(0).values.mean() if combined == "max" else 0.3 * values[0].mean() + 0.7 * values[1].mean()
    return total + alignment * bound_alignment(losses[1].vector, losses[0].vector) + penalty


@pytest.mark.parametrize("strategy", ["max", "joint"])
@pytest.mark.parametrize("loss", ["sabr", "sabr-box", "mtl-ibp", "cc-ibp"])
def test_the_objective_is_its_parts(strategy: str, loss: str, images: Tensor) -> None:
    """Loss and every gradient, of attacks at the annealed size with steps of their own, shrunken ReLUs and all."""
    net = small_net("plain")
    with torch.no_grad():  # decided enough for alignment to weigh something
        net[-1].weight.mul_(20)
    bounded = bounded_module(net, (1, 8, 8))
    linf, l2 = PerturbationLpBall(math.inf, 0.02), PerturbationLpBall(2, 0.1)
    keys = {"sabr": {"ratio": 0.5}, "sabr-box": {"ratio": 0.05}}.get(loss, {"mix": 0.3})
    labels = net(images).argmax(1)
    objective = CureObjective(
        [TrainingSet(linf, 0.4, attack_step=0.7), TrainingSet(l2, loss=loss, attack_step=0.3, **keys)],  # type: ignore[arg-type]
        strategy=strategy,
        weights=[0.3, 0.7] if strategy == "joint" else (),
        alignment=0.8,
        align_from="l2",
        regularizer=0.5,
        attack_steps=3,
        relu_shrink=0.5,
    )
    outcome = objective(bounded, net, images, labels, SCALE, torch.Generator().manual_seed(3))
    given = torch.autograd.grad(outcome.loss, list(net.parameters()))

    small = [linf.scaled(SCALE), l2.scaled(SCALE)]
    jobs = [(images, labels, ball) for ball in small]
    generator = torch.Generator().manual_seed(3)
    found = pgd_variables(AttackNet(net), jobs, Pgd(3), generator, best=False, first_steps=[0.7, 0.3])
    variables = [variable for variable, _ in found]
    reference = bounded_module(net, (1, 8, 8))
    with relu_shrinking(reference, 0.5):
        first = sabr_loss(reference, images, labels, small[0], variables[0], 0.4)
        centre, region = small[0].small_region(images, variables[0], 0.4)
        lower, upper = region.box(centre)
        penalty = 0.5 * (1 - SCALE) * warmup_regularizer(reference, upper - lower)
        if loss == "sabr":
            second = sabr_loss(reference, images, labels, small[1], variables[1], 0.5)
        elif loss == "sabr-box":
            second = sabr_box_loss(reference, images, labels, small[1], variables[1], 0.05)
        elif loss == "mtl-ibp":
            second = mtl_ibp_loss(reference, net, images, labels, small[1], variables[1], 0.3)
        else:
            second = cc_ibp_loss(reference, net, images, labels, small[1], variables[1], 0.3)
    aligned = bound_alignment(second.vector, first.vector)
    assert float(aligned.detach()) > 1e-4 and float(penalty.detach()) > 1e-4  # or they could be left out unseen
    expected = by_hand([first, second], strategy, penalty, 0.8)
    assert float(outcome.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(given, wanted, strict=True))


def test_alignment_of_many_sets_weighs_as_of_two() -> None:
    vectors = [torch.tensor([[0.0, -2.0]]), torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, -1.0]])]
    results = [SetLoss(torch.zeros(1), vector) for vector in vectors]
    balls = [TrainingSet(PerturbationLpBall(norm, 0.1)) for norm in (2, 1, math.inf)]
    two, three = (CureObjective(balls[:n], alignment=1.0, align_from="l2") for n in (2, 3))
    assert float(two._alignment(results[:2])) == pytest.approx(float(three._alignment(results)))


def test_attacks_in_training_go_uphill(images: Tensor) -> None:
    net = small_net("plain")
    ball = PerturbationLpBall(2, 1.0)
    losses = []
    for steps in (1, 8):
        objective = CureObjective([TrainingSet(ball, loss="adversarial")], attack_steps=steps)
        outcome = objective(bounded_module(net, (1, 8, 8)), net, images, LABELS, 1.0, torch.Generator().manual_seed(0))
        losses.append(float(outcome.loss.detach()))
    clean = float(F.cross_entropy(net(images), LABELS).detach())
    assert clean < losses[0] < losses[1]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_epoch_is_its_steps(clip: float | None) -> None:
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    nets = [nn.Linear(4, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())

    def loss(x: Tensor, y: Tensor) -> Outcome:
        return Outcome(F.cross_entropy(nets[0](x), y), {})

    figures = run_epoch(nets[0], batches, loss, torch.optim.SGD(nets[0].parameters(), lr=0.5), 0.01, clip)
    total = 0.0
    for part, labels in batches:
        penalty = sum(p.abs().sum() for p in nets[1].parameters())
        value = F.cross_entropy(nets[1](part), labels) + 0.01 * penalty
        gradients = torch.autograd.grad(value, list(nets[1].parameters()))
        length = torch.cat([g.flatten() for g in gradients]).norm()
        factor = 1.0 if clip is None else min(1.0, clip / float(length))
        with torch.no_grad():
            for p, g in zip(nets[1].parameters(), gradients, strict=True):
                p -= 0.5 * factor * g
        total += len(part) * float(value.detach())
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert figures["loss"] == pytest.approx(total / 6, rel=1e-5)


def test_the_schedule_is_logged_and_kept(tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, load_data("mnist-slice", True).first(100), tmp_path)
    trainer.run()
    rates = [entry["learning_rate"] for entry in trainer.history]
    assert rates == pytest.approx([5e-4, 5e-4, 1e-4, 1e-4, 2e-5])
    for optimizer in (trainer.certified_optimizer, trainer.natural_optimizer):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-5)
    scales = [entry.get("scale") for entry in trainer.history]
    first, second = [(smooth_ramp(at / 1.5) + smooth_ramp((at + 0.5) / 1.5)) / 2 for at in (0, 1)]
    assert scales[0] is None and scales[1:] == pytest.approx([first, second, 1.0, 1.0])
    kept = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert kept == trainer.history


def test_the_log_grows_with_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data("mnist-slice", True).first(100)
    trainer = Trainer(RECIPE, data, tmp_path)
    epoch = Trainer._epoch

    def killed(self: Trainer, number: int, bar: Any) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    monkeypatch.setattr(Trainer, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == 3
    monkeypatch.undo()
    Trainer(RECIPE, data, tmp_path).run()
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == 5


def test_every_optimiser_is_resumed_between_projected_epochs(tmp_path: Path) -> None:
    """Stopped after each epoch, of which several are projected: the same weights, bit for bit."""
    data = load_data("mnist-slice", True).first(100)
    whole = Trainer(RECIPE, data).run()
    part = None
    for _ in range(RECIPE.epochs):
        stopped = Trainer(RECIPE, data, tmp_path)
        epochs = iter(range(1))

        def one(number: int, bar: Any, stopped: Trainer = stopped, epochs: Any = epochs) -> Any:
            if next(epochs, None) is None:
                raise KeyboardInterrupt
            return Trainer._epoch(stopped, number, bar)

        stopped._epoch = one  # type: ignore[method-assign]
        try:
            part = stopped.run()
        except KeyboardInterrupt:
            continue
    assert part is not None
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


def test_projection_starts_both_epochs_from_the_same_statistics() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    met = []

    def epoch() -> None:
        met.append((net[0].weight.detach().clone(), net[1].running_mean.clone()))  # type: ignore[union-attr,operator]
        net.train()
        with torch.no_grad():
            net[0].weight += 1
            net(torch.randn(5, 2))

    projected_epoch(net, epoch, epoch, 0.5)
    assert torch.equal(met[0][0], met[1][0]) and torch.equal(met[0][1], met[1][1])


@pytest.mark.parametrize("when", ["natural epoch", "weights"])
def test_what_is_not_finite_is_not_kept(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss of the certified epoch says nothing about the natural one, nor about the last step."""
    data = load_data("mnist-slice", True).first(100)
    recipe = replace(RECIPE, ramp_epochs=0, natural_epochs=0, epochs=2, milestones=())
    trainer = Trainer(recipe, data, tmp_path)
    epoch = Trainer._epoch

    def diverged(number: int, bar: Any) -> dict[str, float]:
        figures = epoch(trainer, number, bar)
        if number == 1 and when == "natural epoch":
            return {**figures, "natural_loss": math.nan}
        if number == 1:
            with torch.no_grad():
                next(iter(trainer.net.parameters())).flatten()[0] = math.nan
        return figures

    monkeypatch.setattr(trainer, "_epoch", diverged)
    with pytest.raises(SpecError, match=r"(natural_loss|a weight) became nan in epoch 2, which is not kept"):
        trainer.run()
    assert Trainer(recipe, data, tmp_path).epochs_done == 1


def test_imbalance_by_hand() -> None:
    """Centres 1, -4, -4, 0 of mean -7/4: active ones sum to 1, inactive ones to 8, deviations 7.6 and 10.1."""
    lower, upper = torch.tensor([0.5, -4.5, -4.5, -1.0]), torch.tensor([1.5, -3.5, -3.5, 1.0])
    whole = ALONE.share(4)
    assert float(_imbalance(lower, upper, whole)) == pytest.approx(0.5 - 1 / 8)
    assert float(_imbalance(lower.abs(), upper.abs() + 9, whole)) == 0  # none is inactive


def test_logged_figures_are_told_apart() -> None:
    """Clean accuracy, what PGD leaves and what IBP certifies, each against a computation of its own."""
    data = load_data("mnist-slice", False).first(60)
    net = Trainer(
        replace(RECIPE, epochs=3, ramp_epochs=1, learning_rate=2e-3, milestones=()),
        load_data("mnist-slice", True).first(800),
    ).run()
    ball = PerturbationLpBall(2, 1.0)
    shares = evaluate(bounded_module(net, data.shape), net, data, [ball])
    x, y = data.batch(slice(0, 60))
    right = net(x).argmax(1) == y
    points = pgd(AttackNet(net), x, y, ball, Pgd(8, worst_margin_loss), torch.Generator().manual_seed(0))
    left = right & (net(points).argmax(1) == y)
    assert shares["clean"] == pytest.approx(float(right.float().mean()))
    assert shares["pgd.l2"] == pytest.approx(float(left.float().mean()))
    assert shares["ibp.l2"] <= shares["pgd.l2"] < shares["clean"]


def test_the_regulariser_sees_the_input_as_the_first_layer_does() -> None:
    """A net behind a normalisation by std is penalised as one that takes inputs, and sets, 1 / std times as large."""
    inner, std, x = small_net("plain"), 0.25, torch.rand(3, 1, 8, 8)
    net = nn.Sequential(Normalize([0.0], [std]), *inner)
    penalties = []
    for model, factor in ((net, 1.0), (inner, 1 / std)):
        ball = PerturbationLpBall(math.inf, factor * 0.1, (0.0, factor))
        objective = CureObjective([TrainingSet(ball, loss="ibp")], regularizer=1.0)
        outcome = objective(bounded_module(model, (1, 8, 8)), model, factor * x, LABELS, 0.5)
        penalties.append(outcome.figures["regularizer"])
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-4) and penalties[0] > 1e-3


def test_inputs_are_normalised_inside_the_net() -> None:
    recipe = replace(RECIPE, mean=(0.3,), std=(0.25,), epochs=2, ramp_epochs=0, natural_epochs=1)
    trainer = Trainer(recipe, load_data("mnist-slice", True).first(100))
    net = trainer.run()
    assert isinstance(net[0], Normalize) and trainer.spec.mean == (0.3,)


def test_two_radii_of_one_norm_train_together(tmp_path: Path) -> None:
    recipe = replace(
        RECIPE,
        sets=(SetRecipe("l2=0.1", Sabr(0.5)), SetRecipe("l2=0.3", Sabr(0.5))),
        alignment=0.5,
        align_from="l2=0.3",
        epochs=2,
        ramp_epochs=0,
        gradient_projection=0.0,
    )
    data = load_data("mnist-slice", True).first(100)
    trainer = Trainer(recipe, data, tmp_path, test=data.first(20))
    trainer.run()
    logged = trainer.history[-1]
    assert {"loss.l2=0.1", "loss.l2=0.3", "test.pgd.l2=0.1", "test.ibp.l2=0.3"} <= set(logged)
    with pytest.raises(SpecError, match="at least one and differ"):
        replace(recipe, sets=(SetRecipe("l2=0.1"), SetRecipe("l2=0.1")))
