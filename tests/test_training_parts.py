"""Losses, strategies, alignment, projection, schedule, regulariser: each against a computation by hand."""

from __future__ import annotations

import functools
import importlib
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import small_net
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall
from cure_plugin.attacks import find_counterexample, pgd, pgd_variables, worst_margin_loss
from cure_plugin.bounds.margins import elided, elided_cross_entropy, lower_margins, margin_matrix
from cure_plugin.bounds.module import bounded_module
from cure_plugin.errors import SpecError
from cure_plugin.training import (
    CureObjective,
    TrainingSet,
    bound_alignment,
    joint,
    maximum,
    project_update,
    random_partition,
    smooth_ramp,
    warmup_regularizer,
)
from cure_plugin.training.batch_norm import clean_statistics
from cure_plugin.training.loss import LOSSES, Sabr
from cure_plugin.training.losses import SetLoss

LABELS = torch.tensor([0, 2, 1])


def test_margin_matrix_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    margins = margin_matrix(torch.tensor([1]), 3) @ logits.unsqueeze(-1)
    assert margins.flatten().tolist() == [1.0, -2.0]


@pytest.mark.parametrize("method", ["IBP", "CROWN"])
def test_margins_bound_the_truth(method: str, images: Tensor) -> None:
    net = small_net("plain")
    ball = PerturbationLpBall(2, 0.5)
    margins = lower_margins(bounded_module(net, (1, 8, 8)), images, LABELS, ball, method)
    assert margins.shape == (3, 2)
    loss = elided_cross_entropy(elided(margins))
    for _ in range(100):
        logits = net(ball.sample(images))
        assert bool((-worst_margin_loss(logits, LABELS) >= margins.amin(1) - 1e-5).all())
        assert bool((F.cross_entropy(logits, LABELS, reduction="none") <= loss + 1e-5).all())


def test_margins_at_zero_radius_are_the_clean_ones(images: Tensor) -> None:
    net = small_net("plain")
    margins = lower_margins(bounded_module(net, (1, 8, 8)), images, LABELS, PerturbationLpBall(2, 0.0), "IBP")
    assert torch.allclose(margins.amin(1), -worst_margin_loss(net(images), LABELS), atol=1e-5)
    assert torch.allclose(
        elided_cross_entropy(elided(margins)), F.cross_entropy(net(images), LABELS, reduction="none"), atol=1e-5
    )


def test_strategies_by_hand() -> None:
    first, second = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0])
    assert float(joint([first, second])) == pytest.approx(2.5)
    assert float(joint([first, second], [0.2, 0.8])) == pytest.approx(0.2 * 2.5 + 0.8 * 2.5)
    assert float(maximum([first, second])) == pytest.approx(3.5)
    with pytest.raises(SpecError, match="weights must be 2 numbers"):
        joint([first, second], [1.0])


def test_maximum_sends_the_gradient_through_the_winner() -> None:
    first = torch.tensor([1.0, 4.0], requires_grad=True)
    second = torch.tensor([3.0, 2.0], requires_grad=True)
    maximum([first, second]).backward()
    assert first.grad is not None and second.grad is not None
    assert (first.grad.tolist(), second.grad.tolist()) == ([0.0, 0.5], [0.5, 0.0])


@pytest.mark.parametrize("size, parts", [(10, 2), (7, 3), (1, 2)])
def test_random_is_a_partition(size: int, parts: int) -> None:
    """The public script draws two permutations: a quarter of the batch is in both halves, a quarter in neither."""
    pieces = random_partition(size, parts)
    assert sorted(torch.cat(pieces).tolist()) == list(range(size))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_alignment_by_hand_on_certified_samples_only() -> None:
    q = torch.tensor([[0.0, -1.0, -2.0], [0.0, 1.0, -2.0]], requires_grad=True)
    r = torch.tensor([[0.0, -3.0, 0.5], [0.0, 9.0, 9.0]], requires_grad=True)
    p_q, p_r = q[0].softmax(0), r[0].softmax(0)
    expected = float((p_q * (p_q / p_r).log()).sum())
    aligned = bound_alignment(q, r)
    assert float(aligned.detach()) == pytest.approx(expected, abs=1e-6)
    aligned.backward()
    assert q.grad is not None and r.grad is not None
    assert float(q.grad[0].abs().sum()) > 0 and float(r.grad[0].abs().sum()) > 0
    assert float(q.grad[1].abs().sum()) == 0
    assert float(bound_alignment(q[1:], r[1:])) == 0


@pytest.mark.parametrize(
    "align_from, pairs", [("l2", ["l2 l1"]), ("l1", ["l1 l2"]), ("both", ["l2 l1", "l1 l2"]), ("weaker", ["l1 l2"])]
)
def test_alignment_goes_from_where_it_is_told(align_from: str, pairs: list[str]) -> None:
    """Of these vectors l2 has two certified samples, l1 one; KL differs by direction."""
    vectors = {
        "l2": torch.tensor([[0.0, -1.0, -2.0], [0.0, -0.5, -3.0], [0.0, 1.0, 1.0]]),
        "l1": torch.tensor([[0.0, -3.0, -0.5], [0.0, 2.0, 0.5], [0.0, 4.0, -1.0]]),
    }
    sets = [TrainingSet(PerturbationLpBall(norm, 0.1)) for norm in (2, 1)]
    objective = CureObjective(sets, alignment=1.0, align_from=align_from)
    results = [SetLoss(torch.zeros(3), vectors[name]) for name in ("l2", "l1")]
    by_hand = {"l2 l1": (0, 1), "l1 l2": (0,)}  # the samples certified for the first
    expected = 0.0
    for pair in pairs:
        q, r = (vectors[name].softmax(1) for name in pair.split())
        expected += float(torch.stack([(q[i] * (q[i] / r[i]).log()).sum() for i in by_hand[pair]]).mean())
    assert float(objective._alignment(results)) == pytest.approx(expected, abs=1e-6)


def test_joint_weighs_the_sets() -> None:
    sets = [TrainingSet(PerturbationLpBall(norm, 0.1)) for norm in (2, 1)]
    objective = CureObjective(sets, strategy="joint", weights=[0.2, 0.8])
    combined = objective.combination.combine([torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0])])
    assert float(combined) == pytest.approx(0.2 * 2.5 + 0.8 * 2.5)
    combined = objective.combination.combine([torch.tensor([1.0]), torch.tensor([3.0])])
    assert float(combined) == pytest.approx(0.2 * 1 + 0.8 * 3)


def test_attack_steps_shrink_as_in_sabr(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[float] = []
    ascend = PerturbationLpBall.ascend

    def watched(self: Any, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        lengths.append(step)
        return ascend(self, x, variable, gradient, step)

    monkeypatch.setattr(PerturbationLpBall, "ascend", watched)
    ball = PerturbationLpBall(math.inf, 0.1)
    pgd_variables(small_net("plain"), [(images, LABELS, ball)], first_steps=[0.5])
    assert lengths == pytest.approx([0.5] * 4 + [0.05] * 3 + [0.005])


def test_a_batch_norm_used_twice_is_refused(images: Tensor) -> None:
    norm = nn.BatchNorm2d(1)
    net = nn.Sequential(nn.Conv2d(1, 1, 1), norm, nn.ReLU(), nn.Conv2d(1, 1, 1), norm, nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(SpecError, match="used twice"):
        clean_statistics(bounded_module(net, (1, 8, 8)), net.train(), images)


def test_projection_by_hand() -> None:
    start = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0])}
    certified = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([1.0])}
    natural = {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor([-2.0])}
    mixed = project_update(start, certified, natural, 0.25)
    cosine = 1 / math.sqrt(2)
    assert mixed["a"].tolist() == pytest.approx([1 + 0.75 + 0.25 * cosine, 1 + 0.25 * cosine])
    assert mixed["b"].tolist() == pytest.approx([0.75])  # opposite directions: nothing is mixed in
    with pytest.raises(SpecError, match="weight must lie in"):
        project_update(start, certified, natural, 1.5)


def test_ramp_is_continuous_and_ends_at_one() -> None:
    values = [smooth_ramp(i / 1000) for i in range(1001)]
    assert values[0] == 0 and values[-1] == pytest.approx(1) and smooth_ramp(7) == pytest.approx(1)
    steps = [b - a for a, b in pairwise(values)]
    assert min(steps) >= 0 and max(steps) < 0.0015


def test_regularizer_is_zero_for_tight_bounds_and_grows_with_width(images: Tensor) -> None:
    net = small_net("plain")
    bounded = bounded_module(net, (1, 8, 8))
    penalties = []
    for factor in (1.0, 30.0):
        with torch.no_grad():
            net[0].weight.mul_(factor)
        ball = PerturbationLpBall(math.inf, 0.1)
        lower_margins(bounded, images, LABELS, ball, "IBP")
        penalties.append(float(warmup_regularizer(bounded, ball.x_U - ball.x_L)))
    assert 0 <= penalties[0] < penalties[1]


def test_pgd_raises_the_loss_and_restores_the_mode(images: Tensor) -> None:
    net = small_net("conv-batch-norm")
    net.train()
    net[1].eval()
    ball = PerturbationLpBall(2, 0.5)
    point = pgd(net, images, LABELS, ball)
    assert net.training and not net[1].training
    net.eval()
    before = F.cross_entropy(net(images), LABELS, reduction="none")
    after = F.cross_entropy(net(point), LABELS, reduction="none")
    assert bool((after >= before - 1e-6).all()) and bool(ball.contains(images, point, 1e-5).all())


def test_counterexamples_are_real(images: Tensor) -> None:
    net = small_net("plain")
    labels = net(images).argmax(1)
    ball = PerturbationLpBall(math.inf, 0.5)
    found, points = find_counterexample(net, images, labels, ball)
    assert bool(found.any())
    assert bool((net(points).argmax(1) != labels)[found].all())
    assert bool(ball.contains(images, points, 1e-5).all())


def objective(**changes: object) -> CureObjective:
    sets = [TrainingSet(PerturbationLpBall(math.inf, 0.1), 0.4), TrainingSet(PerturbationLpBall(2, 0.5), 1.0)]
    return CureObjective(sets, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["joint", "max", "random"])
def test_the_objective_trains_every_parameter(strategy: str, images: Tensor) -> None:
    net = small_net("plain")
    alignment = 0.0 if strategy == "random" else 1.0
    outcome = objective(strategy=strategy, alignment=alignment, align_from="both", regularizer=0.5)(
        bounded_module(net, (1, 8, 8)), net, images, LABELS, 0.5, torch.Generator().manual_seed(0)
    )
    outcome.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert {"loss.linf", "loss.l2", "region_certified.linf", "alignment", "regularizer"} <= set(outcome.figures)


def test_max_of_the_objective_is_what_its_figures_say(images: Tensor) -> None:
    net = small_net("plain")
    bounded = bounded_module(net, (1, 8, 8))
    outcome = objective()(bounded, net, images, LABELS, generator=torch.Generator().manual_seed(0))
    single = CureObjective([TrainingSet(PerturbationLpBall(2, 0.5), 1.0)])(bounded, net, images, LABELS)
    assert outcome.figures["loss.l2"] == pytest.approx(single.figures["loss.l2"])
    assert float(outcome.loss) >= max(outcome.figures["loss.linf"], outcome.figures["loss.l2"]) - 1e-6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"strategy": "best"}, "unknown strategy 'best'"),
        ({"strategy": "joint", "weights": [1.0]}, "one finite number >= 0 per set"),
        ({"align_from": "l7"}, "align_from must be"),
        ({"alignment": -1.0}, "alignment must be finite, >= 0"),
        ({"weights": [1.0, 1.0]}, "weights are for strategy joint"),
        ({"strategy": "single"}, "strategy single takes one set"),
        ({"strategy": "random", "alignment": 1.0}, "random bounds each for one"),
    ],
)
def test_the_objective_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        objective(**changes)


def test_a_zero_ratio_is_refused() -> None:
    with pytest.raises(SpecError, match=r"must lie in \(0, 1\]"):
        TrainingSet(PerturbationLpBall(2, 0.5), 0.0)


@pytest.mark.parametrize("training", [False, True])
def test_the_objective_normalises_as_the_model_does(training: bool, images: Tensor) -> None:
    net = small_net("conv-batch-norm")
    net.train(training)
    bounded = bounded_module(net, (1, 8, 8))
    before = net[1].running_mean.clone()
    outcome = CureObjective([TrainingSet(PerturbationLpBall(2, 0.0), 1.0)])(bounded, net, images, LABELS)
    expected = F.cross_entropy(net(images), LABELS)
    assert float(outcome.loss.detach()) == pytest.approx(expected.item(), abs=1e-4)
    assert torch.equal(before, net[1].running_mean) != training
    outcome.loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def _stock_interval(node: torch.nn.Module, _: object, *inputs: object) -> object:
    return type(node).interval_propagate(node, *inputs)


def test_leaner_intervals_are_auto_lirpas_own_with_its_gradients(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of BatchNorm (with falling channels, through the batch's statistics) and of ReLUs."""

    def gradients(lean: bool) -> list[Tensor]:
        torch.manual_seed(5)
        net = small_net("conv-batch-norm").train().double()
        with torch.no_grad():
            net[1].weight.copy_(torch.linspace(-1, 1, len(net[1].weight)))
        bounded = bounded_module(net, (1, 8, 8))
        mixed = objective(alignment=0.5, align_from="both", regularizer=0.5)
        with monkeypatch.context() as patch:
            if not lean:
                for name, operator in (("batch_norm", "BoundBatchNormalization"), ("shrinking", "BoundRelu")):
                    module = importlib.import_module(f"cure_plugin.training.{name}")
                    node = next(n for n in bounded.modules() if type(n).__name__ == operator)
                    patch.setattr(module, "_interval", functools.partial(_stock_interval, node))
            first = mixed(bounded, net, images.double(), LABELS, 0.5, torch.Generator().manual_seed(0))
            second = mixed(bounded, net, images.double().flip(0), LABELS.flip(0), 0.5, torch.Generator().manual_seed(1))
        (first.loss + 2 * second.loss).backward()
        return [first.loss, second.loss, *(p.grad for p in net.parameters() if p.grad is not None)]

    pairs = list(zip(gradients(True), gradients(False), strict=True))
    assert len(pairs) > 4 and all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4, 4)])
def test_moments_and_their_gradients(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0.5  # a channel that has died
    x.requires_grad_()
    moments = importlib.import_module("cure_plugin.training.batch_norm")._Moments.apply
    variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    assert all(torch.allclose(a, b) for a, b in zip(moments(x), (mean, variance), strict=True))
    assert torch.autograd.gradcheck(moments, (x,))


def test_running_statistics_are_those_of_the_clean_batch(images: Tensor) -> None:
    def fresh() -> torch.nn.Sequential:
        torch.manual_seed(5)
        return small_net("conv-batch-norm").train()

    def after(perturbation: PerturbationLpBall, loss: str) -> Tensor:
        net = fresh()
        options = {"sabr": {"ratio": 0.01}, "mtl-ibp": {"mix": 0.5}}.get(loss)
        sets = [
            TrainingSet(perturbation, LOSSES.make(loss, options)),
            TrainingSet(PerturbationLpBall(1, 0.5), Sabr(0.5)),
        ]
        outcome = CureObjective(sets)(bounded_module(net, (1, 8, 8)), net, images, LABELS)
        outcome.loss.backward()
        return net[1].running_mean.clone()

    clean = fresh()
    clean(images)
    for loss in ("sabr", "adversarial", "mtl-ibp"):
        assert torch.allclose(after(PerturbationLpBall(2, 2.0), loss), clean[1].running_mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["evaluated", "frozen layer"])
def test_bounds_normalise_as_each_layer_does(kind: str, images: Tensor) -> None:
    """After a training step, bounds of the net in eval mode are those of a fresh wrapper; frozen layers stay frozen."""
    net = small_net("conv-batch-norm").train()
    bounded = bounded_module(net, (1, 8, 8))
    if kind == "frozen layer":
        net[1].eval()
    before = net[1].running_mean.clone()
    outcome = CureObjective([TrainingSet(PerturbationLpBall(2, 0.0), 1.0)])(bounded, net, images, LABELS)
    outcome.loss.backward()
    assert torch.equal(before, net[1].running_mean) == (kind == "frozen layer")
    if kind == "frozen layer":
        expected = F.cross_entropy(net(images), LABELS)
        assert float(outcome.loss.detach()) == pytest.approx(expected.item(), abs=1e-4)
    net.eval()
    ball = PerturbationLpBall(2, 0.3)
    with torch.no_grad():
        for method in ("IBP", "CROWN"):
            fresh = lower_margins(bounded_module(net, (1, 8, 8)), images, LABELS, ball, method)
            assert torch.allclose(lower_margins(bounded, images, LABELS, ball, method), fresh, atol=1e-5)


def test_the_mode_may_change_between_loss_and_gradient(images: Tensor) -> None:
    def gradients(between: bool) -> list[Tensor]:
        torch.manual_seed(5)
        net = small_net("conv-batch-norm").train()
        bounded = bounded_module(net, (1, 8, 8))
        outcome = objective()(bounded, net, images, LABELS, generator=torch.Generator().manual_seed(0))
        if between:
            net.eval()
            lower_margins(bounded, images, LABELS, PerturbationLpBall(2, 0.3), "IBP")
        outcome.loss.backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_a_scale_beyond_one_is_refused(images: Tensor) -> None:
    net = small_net("plain")
    with pytest.raises(SpecError, match=r"scale must lie in \[0, 1\], got 1.7"):
        objective()(bounded_module(net, (1, 8, 8)), net, images, LABELS, 1.7)


def test_only_bounds_are_logged_as_certified(images: Tensor) -> None:
    net = small_net("plain")
    sets = [
        TrainingSet(PerturbationLpBall(2, 0.3), loss="adversarial"),
        TrainingSet(PerturbationLpBall(math.inf, 0.1), loss="cc-ibp", mix=0.1),
        TrainingSet(PerturbationLpBall(1, 0.3), loss="mtl-ibp", mix=0.1),
    ]
    figures = CureObjective(sets, attack_steps=1)(bounded_module(net, (1, 8, 8)), net, images, LABELS).figures
    assert [name for name in figures if name.startswith("region_certified")] == ["region_certified.l1"]
