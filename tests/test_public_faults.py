"""What public multi-norm training scripts get wrong. Every check here is shown to fail on the faulty form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_plugin.attacks import pgd_variable
from cure_plugin.bounds.margins import lower_margins
from cure_plugin.bounds.module import bounded_module
from cure_plugin.datasets import load_data
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.sets import PerturbationLpBall
from cure_plugin.training import (
    CureObjective,
    Recipe,
    SetRecipe,
    Trainer,
    TrainingSet,
    load_recipe,
    natural_loss,
    projected_epoch,
    random_partition,
    run_epoch,
    smooth_ramp,
    warmup_regularizer,
)
from cure_plugin.training.loss import Adversarial, Sabr
from cure_plugin.training.recipe import shipped_recipes

BALL = PerturbationLpBall(2, 0.5)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    return load_data("mnist-slice", True).batch(slice(0, 8))


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    return build_net(NetSpec("cnn_small", (1, 28, 28)), torch.Generator().manual_seed(3)).eval()


def inside(x: Tensor, point: Tensor, eps: float) -> bool:
    return bool(((point - x).flatten(1).norm(dim=1) <= eps + 1e-5).all() and (point >= 0).all() and (point <= 1).all())


# 1. l2 PGD


def drifting_pgd(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The faulty form: the projected offset is added to the current iterate, and the start is doubled."""
    start = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    point = x + 2 * eps * start / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for _ in range(8):
        point.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(point), y), point)
        step = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=1e-12)
        offset = point.detach() + step - x
        offset = offset * (eps / offset.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
        point = point.detach() + offset
    return point


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0])
def test_l2_attacks_stay_in_the_ball_and_scale_with_it(
    eps: float, net: nn.Sequential, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    point, _ = pgd_variable(net, x, y, PerturbationLpBall(2, eps), generator=torch.Generator().manual_seed(0))
    assert inside(x, point, eps)
    assert float((point - x).flatten(1).norm(dim=1).mean()) > 0.5 * eps  # steps scale with eps: the ball is used
    assert not inside(x, drifting_pgd(net, x, y, eps), eps)


# 2. the small l2 region


@pytest.mark.parametrize("ratio", [0.1, 0.4, 1.0])
def test_the_small_l2_region_stays_in_the_ball(ratio: float, net: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    free = PerturbationLpBall(2, 0.5, None)  # the region is not cut with the domain
    variable, _ = pgd_variable(net, x, y, BALL, generator=torch.Generator().manual_seed(0))

    def farthest(centre: Tensor, radius: float) -> Tensor:
        direction = centre - x + 1e-6
        return centre + radius * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    centre, _ = BALL.small_region(x, variable, ratio)
    assert bool(free.contains(x, farthest(centre, ratio * 0.5), 1e-4).all())
    assert not bool(free.contains(x, farthest(variable, ratio * 0.5), 1e-4).all())  # the faulty form: not moved inward


# 3. Random


def is_partition(parts: list[Tensor], size: int) -> bool:
    return sorted(torch.cat(parts).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 7, 128])
def test_random_partitions_the_batch(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    assert is_partition(random_partition(size, 2, generator), size)
    half = size // 2
    faulty = [torch.randperm(size, generator=generator)[:half], torch.randperm(size, generator=generator)[half:]]
    assert size == 2 or not is_partition(faulty, size)


def test_random_bounds_every_sample_for_exactly_one_set(net: nn.Sequential, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    sets = [TrainingSet(PerturbationLpBall(math.inf, 0.0), 1.0), TrainingSet(PerturbationLpBall(2, 0.0), 1.0)]
    objective = CureObjective(sets, strategy="random", attack_steps=1)
    loss = objective(bounded_module(net, (1, 28, 28)), net, x, y, generator=torch.Generator().manual_seed(0)).loss
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(net(x), y).detach()), abs=1e-5)


# 4. gradient projection


class TwoParameters(nn.Module):
    """Logits (w x, v x) of a number x."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-0.25))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.w * x, self.v * x], dim=1)


X, Y = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0, 0, 1])
RATE = 0.1


def by_hand(w: float, v: float, sign: float = 1.0) -> tuple[float, float]:
    """One epoch of gradient descent, a sample a step, on sign * cross entropy: derivatives written out."""
    for x, y in zip(X.tolist(), Y.tolist(), strict=True):
        p = 1 / (1 + math.exp((v - w) * x))  # softmax of (w x, v x), class 0
        slope = (p - (1 - y)) * x
        w, v = w - RATE * sign * slope, v + RATE * sign * slope
    return w, v


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(x[None], y[None]) for x, y in zip(X, Y, strict=True)]


def epoch(model: nn.Module, sign: float = 1.0) -> Callable[[], dict[str, float]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def loss(x: Tensor, y: Tensor) -> object:
        outcome = natural_loss(model)(x, y)
        return type(outcome)(sign * outcome.loss, {})

    return lambda: run_epoch(model, batches(), loss, optimizer)  # type: ignore[arg-type]


def test_the_natural_epoch_is_gradient_descent_whatever_gradients_were_left() -> None:
    model = TwoParameters()
    model.w.grad, model.v.grad = torch.tensor(9.0), torch.tensor(-9.0)  # as the certified epoch may leave them
    epoch(model)()
    assert (model.w.item(), model.v.item()) == pytest.approx(by_hand(0.5, -0.25))
    faulty = TwoParameters()  # gradients never zeroed
    optimizer = torch.optim.SGD(faulty.parameters(), lr=RATE)
    for x, y in batches():
        F.cross_entropy(faulty(x), y).backward()
        optimizer.step()
    assert (faulty.w.item(), faulty.v.item()) != pytest.approx(by_hand(0.5, -0.25))


def test_projection_by_hand_on_two_parameters() -> None:
    """Certified: descent on half the loss; natural: on the loss. Both from the same start, then mixed."""
    model = TwoParameters()
    projected_epoch(model, epoch(model, 0.5), epoch(model), 0.3)
    start = (0.5, -0.25)
    certified, natural = by_hand(*start, 0.5), by_hand(*start)
    expected = []
    for theta, c, n in zip(start, certified, natural, strict=True):
        cosine = math.copysign(1, (c - theta) * (n - theta))  # of single numbers
        expected.append(theta + 0.7 * (c - theta) + 0.3 * max(cosine, 0) * (n - theta))
    assert (model.w.item(), model.v.item()) == pytest.approx(expected, abs=1e-6)
    chained = by_hand(*certified)  # the faulty form: the natural epoch goes on from the certified one's end
    assert pytest.approx(natural, abs=1e-6) != chained


def test_opposite_updates_are_not_mixed() -> None:
    model = TwoParameters()
    projected_epoch(model, epoch(model), epoch(model, -1.0), 0.3)
    w, v = by_hand(0.5, -0.25)
    assert (model.w.item(), model.v.item()) == pytest.approx((0.5 + 0.7 * (w - 0.5), -0.25 + 0.7 * (v + 0.25)))


def test_projection_does_not_mix_running_statistics() -> None:
    def run(weight: float) -> nn.BatchNorm1d:
        norm = nn.BatchNorm1d(1)

        def feed(value: float) -> Callable[[], object]:
            return lambda: norm.train()(torch.full((4, 1), value) + torch.arange(4.0)[:, None])

        projected_epoch(norm, feed(1.0), feed(100.0), weight)
        return norm

    assert run(0.9).running_mean == pytest.approx(run(0.0).running_mean)  # those of the certified epoch alone
    assert float(run(0.9).running_mean) == pytest.approx(0.1 * 2.5)  # type: ignore[arg-type]


def test_the_optimisers_of_the_two_epochs_do_not_meet() -> None:
    recipe = recipe_of(gradient_projection=0.5, natural_epochs=0, ramp_epochs=0, epochs=2)
    trainer = Trainer(recipe, load_data("mnist-slice", True).first(60))
    trainer.run()
    steps = [
        {int(state["step"]) for state in optimizer.state.values()}
        for optimizer in (trainer.certified_optimizer, trainer.natural_optimizer)
    ]
    assert steps == [{6}, {6}]  # 2 epochs of 3 batches each, and moments of their own
    pairs = zip(trainer.certified_optimizer.state.values(), trainer.natural_optimizer.state.values(), strict=True)
    assert not any(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in pairs)


# 5. the warm-up regulariser


@pytest.mark.parametrize("order", [("linf", "l2"), ("l2", "linf"), ("l2", "linf", "smaller linf")])
def test_the_regulariser_watches_the_linf_boxes(order: tuple[str, ...], batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    net = build_net(NetSpec("cnn_small", (1, 28, 28)), torch.Generator().manual_seed(3)).eval()
    with torch.no_grad():
        net[0].weight.mul_(30)  # type: ignore[operator,union-attr]
    sets = {
        "linf": TrainingSet(PerturbationLpBall(math.inf, 0.3), 1.0),
        "l2": TrainingSet(PerturbationLpBall(2, 0.5), 1e-5),
        "smaller linf": TrainingSet(PerturbationLpBall(math.inf, 0.1), 1.0),
    }
    bounded = bounded_module(net, (1, 28, 28))
    objective = CureObjective([sets[name] for name in order], regularizer=1.0, attack_steps=1)
    seen = objective(bounded, net, x, y, 0.5, torch.Generator().manual_seed(0)).figures["regularizer"]
    ball = PerturbationLpBall(math.inf, 0.15)
    lower_margins(bounded, x, y, ball, "IBP")
    expected = 0.5 * float(warmup_regularizer(bounded, ball.x_U - ball.x_L).detach())
    assert seen == pytest.approx(expected, rel=1e-4)
    tiny = PerturbationLpBall(2, 1e-5, None)
    lower_margins(bounded, x, y, tiny, "IBP")
    faulty = 0.5 * float(warmup_regularizer(bounded, tiny.x_U - tiny.x_L).detach())
    assert seen != pytest.approx(faulty, rel=1e-4)


# 6. the log


def recipe_of(**changes: object) -> Recipe:
    values: dict[str, object] = {
        "data": "mnist-slice",
        "net": "cnn_small",
        "sets": (SetRecipe("linf=0.1", Sabr(0.4)), SetRecipe("l2=0.3", Sabr(0.5))),
        "epochs": 2,
        "ramp_epochs": 0,
        "batch_size": 20,
        "attack_steps": 1,
        **changes,
    }
    return Recipe(**values)  # type: ignore[arg-type]


def test_logged_figures_are_what_their_names_say() -> None:
    test = load_data("mnist-slice", False).first(60)
    sets = (SetRecipe("linf=0.005", Sabr(0.4)), SetRecipe("l2=2.0", Sabr(0.01)))
    recipe = recipe_of(learning_rate=5e-3, sets=sets, natural_epochs=2, epochs=3)
    trainer = Trainer(recipe, load_data("mnist-slice", True).first(400), test=test)
    net = trainer.run()
    logged = trainer.history[-1]
    x, y = test.batch(slice(0, 60))
    bounded = bounded_module(net, (1, 28, 28))
    shares = {}
    for name, ball in {"linf": PerturbationLpBall(math.inf, 0.005), "l2": PerturbationLpBall(2, 2.0)}.items():
        with torch.no_grad():
            shares[name] = float((lower_margins(bounded, x, y, ball, "IBP") > 0).all(1).float().mean())
    assert logged["test.ibp.linf"] == pytest.approx(shares["linf"], abs=1e-5)
    assert logged["test.ibp.l2"] == pytest.approx(shares["l2"], abs=1e-5)
    assert shares["l2"] != shares["linf"]  # the faulty form logs one as the other
    with torch.no_grad():
        clean = float((net(x).argmax(1) == y).float().mean())
    assert logged["test.clean"] == pytest.approx(clean, abs=1e-5)
    assert shares["l2"] <= logged["test.pgd.l2"] <= clean


def test_logged_losses_match_recomputation() -> None:
    """With a rate too small to move the weights, the epoch's means are those of the first weights."""
    data = load_data("mnist-slice", True).first(50)
    recipe = recipe_of(learning_rate=1e-30, epochs=1, natural_epochs=0, batch_size=20)
    trainer = Trainer(recipe, data)
    trainer.run()
    logged = trainer.history[0]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    totals = {"loss": 0.0, "loss.linf": 0.0, "loss.l2": 0.0, "region_certified.l2": 0.0}
    trainer.net.train()
    for chosen in order.split(20):
        outcome = recipe.objective()(trainer.bounded, trainer.net, *data.batch(chosen), 1.0, generator)
        for name in totals:
            value = float(outcome.loss.detach()) if name == "loss" else outcome.figures[name]
            totals[name] += value * len(chosen) / 50
    for name, value in totals.items():
        assert logged[name] == pytest.approx(value, abs=1e-5)


# 7. what is compared with what


@pytest.mark.parametrize("name", shipped_recipes())
def test_annealing_ends_at_full_size_with_epochs_to_spare(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.natural_epochs + recipe.ramp_epochs < recipe.epochs
    assert smooth_ramp(1.0) == pytest.approx(1.0)
    if recipe.start:
        assert recipe.natural_epochs == 0  # no natural epochs on top of a certified net
    assert list(recipe.milestones) == sorted(recipe.milestones) and max(recipe.milestones, default=0) < recipe.epochs


@pytest.mark.parametrize("setting", sorted({name.split("/")[0] for name in shipped_recipes() if "/" in name}))
def test_methods_of_a_setting_train_at_equal_radii(setting: str) -> None:
    others = ("published", "larger")  # the paper's own, and the ablation that is about the radius
    names = [name for name in shipped_recipes() if name.startswith(f"{setting}/") and not name.endswith(others)]
    radii: dict[str, set[str]] = {}
    for name in names:
        for entry in load_recipe(name).sets:
            radii.setdefault(entry.set.split("=")[0], set()).add(entry.set)
    assert all(len(texts) == 1 for texts in radii.values()), radii
    epochs = {load_recipe(name).epochs for name in names if not load_recipe(name).start and "/union" not in name}
    assert len(epochs) == 1  # those of CURE and its parts; the tables tell every method's


# 8. lambda = 0


def test_training_on_attacks_alone_trains() -> None:
    recipe = recipe_of(sets=(SetRecipe("l2=0.3", Adversarial()),), natural_epochs=0, learning_rate=5e-3, epochs=3)
    trainer = Trainer(recipe, load_data("mnist-slice", True).first(400))
    before = [parameter.detach().clone() for parameter in trainer.net.parameters()]
    trainer.run()
    after = list(trainer.net.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.history[-1]["loss.l2"] < 0.8 * trainer.history[0]["loss.l2"]
