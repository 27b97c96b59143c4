"""Numeric settings that are no sensible number are refused by name, value and what is allowed, on one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import small_net
from torch import Tensor

from cure_plugin import PerturbationL0, PerturbationLpBall, PerturbationPatch
from cure_plugin.attacks import Pgd, find_counterexample, pgd
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification import Certifier
from cure_plugin.cli import main
from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.training import (
    CureObjective,
    Recipe,
    SetRecipe,
    Trainer,
    TrainingSet,
    augmented,
    natural_loss,
    projected_epoch,
    relu_shrinking,
    run_epoch,
    smooth_ramp,
)
from cure_plugin.training.loss import Sabr

BALL = PerturbationLpBall(2, 0.1)
RECIPE = Recipe(
    "mnist-slice", "cnn_tiny", (SetRecipe("linf=0.1", Sabr(0.4)), SetRecipe("l2=0.2")), epochs=2, ramp_epochs=0
)
X, LABELS = torch.full((3, 1, 8, 8), 0.5), torch.tensor([0, 2, 1])


def refuse(*_: Any) -> Any:
    raise AssertionError("nothing may run before the numbers are checked")


def of_recipe(name: str) -> Callable[[Any], object]:
    return lambda value: replace(RECIPE, **{name: value})


def of_objective(name: str, **keys: Any) -> Callable[[Any], object]:
    sets = [TrainingSet(BALL), TrainingSet(PerturbationLpBall(1, 0.1))]
    return lambda value: CureObjective(sets, **{**keys, name: value})  # type: ignore[arg-type]


def of_epoch(name: str) -> Callable[[Any], object]:
    net = small_net("plain")
    return lambda value: run_epoch(
        net, [(X, LABELS)], natural_loss(net), torch.optim.SGD(net.parameters()), **{name: value}
    )


def shrinking(value: Any) -> None:
    with relu_shrinking(bounded_module(small_net("plain"), (1, 8, 8)), value):
        pass


NUMBERS: dict[str, Callable[[Any], object]] = {
    **{
        name: of_recipe(name)
        for name in (
            "learning_rate", "decay", "ramp_epochs", "alignment", "gradient_projection", "regularizer", "relu_shrink",
            "l1_penalty", "clip", "epochs", "natural_epochs", "batch_size", "attack_steps", "crop", "pad", "seed",
        )
    },
    "mean": lambda value: replace(RECIPE, mean=(value,), std=(value if value == value else 1.0,)),
    "std": lambda value: replace(RECIPE, mean=(0.5,), std=(value,)),
    "milestones": lambda value: replace(RECIPE, milestones=(1, value)),
    "ratio": lambda value: TrainingSet(BALL, value),
    "mix": lambda value: TrainingSet(BALL, loss="mtl-ibp", mix=value),
    "attack_step": lambda value: TrainingSet(BALL, attack_step=value),
    "ratio of linf": lambda value: replace(RECIPE, sets=(SetRecipe("linf=0.1", Sabr(value)),)),
    "weights": of_objective("weights", strategy="joint"),
    "objective's alignment": of_objective("alignment"),
    "objective's regularizer": of_objective("regularizer"),
    "objective's attack_steps": of_objective("attack_steps"),
    "objective's relu_shrink": of_objective("relu_shrink"),
    "weight": lambda value: projected_epoch(small_net("plain"), refuse, refuse, value),
    "epoch's l1_penalty": of_epoch("l1_penalty"),
    "epoch's clip": of_epoch("clip"),
    "start_share": lambda value: smooth_ramp(0.5, value),
    "power": lambda value: smooth_ramp(0.5, power=value),
    "factor": shrinking,
    "augmented crop": lambda value: augmented(X, crop=value),
    "augmented pad": lambda value: augmented(X, crop=4, pad=value),
    "steps": lambda value: pgd(small_net("plain"), X, LABELS, BALL, Pgd(value)),
    "momentum": lambda value: pgd(small_net("plain"), X, LABELS, BALL, Pgd(2, momentum=value)),
    "restarts": lambda value: find_counterexample(small_net("plain"), X, LABELS, BALL, restarts=value),
    "factor of l0": PerturbationL0(3).scaled,
    "factor of patch2x2": PerturbationPatch(2, 2).scaled,
    "certifier's attack_steps": lambda value: Certifier(small_net("plain"), (1, 8, 8), attack_steps=value),
    "certifier's restarts": lambda value: Certifier(small_net("plain"), (1, 8, 8), restarts=value),
    "certifier's memory": lambda value: Certifier(small_net("plain"), (1, 8, 8), memory=value),
}  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_no_sensible_number_is_refused_by_name(name: str, value: float) -> None:
    given: Any = [value, 1.0] if name == "weights" else value
    with pytest.raises(SpecError) as caught:
        NUMBERS[name](given)
    said = str(caught.value)
    assert name.split(" of ")[0].split()[-1] in said and str(value) in said and "\n" not in said
    assert any(word in said for word in ("must", "need one")), said


@pytest.mark.parametrize("name", ["epochs", "batch_size", "attack_steps", "crop", "seed", "learning_rate", "clip"])
@pytest.mark.parametrize("text", [".nan", "nan", ".inf", "-1"])
def test_overrides_are_refused_by_name(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "slice/universal", f"{name}={text}", "--out", "never"]) == 2
    said = capsys.readouterr().err
    assert name in said and "images" not in said and len(said.strip().splitlines()) == 1
    assert "must" in said or "expected" in said


def test_nan_progress_is_no_place_in_the_training() -> None:
    with pytest.raises(SpecError, match="progress must not be NaN"):
        smooth_ramp(math.nan)


@pytest.mark.parametrize("rate", [1e30, 1e300])
def test_absurd_learning_rates_are_refused(rate: float) -> None:
    with pytest.raises(SpecError, match=r"learning_rate must lie in \(0, 1000\], got 1e\+30"):
        replace(RECIPE, learning_rate=rate)


def test_a_net_that_has_diverged_is_not_called_an_image(images: Tensor) -> None:
    net = small_net("plain")
    bounded = bounded_module(net, (1, 8, 8))
    with torch.no_grad():
        net[0].weight.fill_(math.nan)
    objective = CureObjective([TrainingSet(PerturbationLpBall(math.inf, 0.1), 0.4), TrainingSet(BALL, 0.4)])
    with pytest.raises(SpecError, match="the net's logits or gradients are not finite: training has diverged"):
        objective(bounded, net, images, LABELS)


@pytest.mark.parametrize("natural_epochs", [0, 1])
def test_a_run_that_has_diverged_blames_the_learning_rate(natural_epochs: int) -> None:
    recipe = replace(RECIPE, epochs=3, natural_epochs=natural_epochs, batch_size=8, learning_rate=1000.0, clip=0.0)
    trainer = Trainer(recipe, load_data("mnist-slice", True).first(64))
    with torch.no_grad():
        for parameter in trainer.net.parameters():
            parameter.mul_(1e30)
    with pytest.raises(SpecError, match=r"lower (the )?learning.rate"):
        trainer.run()
