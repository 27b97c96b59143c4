"""The search for counterexamples: long steps that shrink, at one class after the other, on what is unbroken only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cure_plugin.attacks.gradient import worst_margin_loss, worst_margins
from cure_plugin.checks import check_count
from cure_plugin.inputs import check_generator, check_pair, evaluated
from cure_plugin.modes import evaluation_mode
from cure_plugin.sets import PerturbationSet, Region
from cure_plugin.sets.base import check_set, per_image

_SHORTEST = 10
"""Steps below which no run is cut."""


@dataclass(frozen=True)
class _Run:
    """One ascent: of how many steps, and towards which runner-up (0 the first); None: untargeted, the worst margin."""

    steps: int
    rank: int | None


def find_counterexample(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    steps: int = 40,
    restarts: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Look for misclassified points in the set: the clean point, then ascents inside the set.

    The first ascent, from the clean point, makes the worst margin large. Those after it start at random and make
    the margin of one runner-up each large, in the order of the logits where the first came closest: many more images
    fall to one of these than to a longer first one (targeted restarts: Croce and Hein 2020). A step is the set's own
    :meth:`~cure_plugin.sets.PerturbationSet.leap`. A sample is left alone once it is broken. A union's members are
    searched one by one.

    Args:
        model: maps (B, *input) to logits (B, C).
        x: clean inputs (B, *input); y: labels (B,).
        steps, restarts: the work, at most that of so many restarts of PGD with so many steps, per member of a union.
        generator: of the random starts.

    Returns:
        (found (B,) bool, points (B, *input)): where found, a point of the set that the model gets wrong; else ``x``.

    Raises:
        SpecError: steps or restarts that are no whole number >= 0, no set, or images, labels and a net that do not fit
            each other.
    """
    check_count("steps", steps)
    check_count("restarts", restarts)
    check_set(perturbation)
    check_pair(x, y, model)
    check_generator(generator)
    with evaluation_mode(model):
        region = perturbation.around(x)
        search = _Search(model, x, y, generator)
        for member in range(len(perturbation.parts())):
            for run in _runs(steps, restarts, search.logits.shape[1]):
                left = search.left()
                if left.numel() == 0:
                    break
                search.ascend(left, region.select(left).parts()[member], run)
        return search.result()


def _runs(steps: int, restarts: int, classes: int) -> Iterator[_Run]:
    """An untargeted run of half the ``steps``, then targeted ones of a quarter as far as the work allows."""
    first, later = (min(steps, max(_SHORTEST, steps // part)) for part in (2, 4))
    yield _Run(first, None)
    work = restarts * (steps + 2) - (first + 1)
    for index in range(work // (later + 1)):
        yield _Run(later, index % (classes - 1))


class _Search:
    """What is known of a batch (B, *input): who is broken and where, and the logits where the others came closest."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> None:
        self.model, self.x, self.y, self.generator = model, x, y, generator
        with torch.no_grad():
            self.logits = evaluated(model, x)
        self.margin = worst_margin_loss(self.logits, y)
        self.found = self.margin >= 0
        self.points = x.clone()

    def left(self) -> Tensor:
        """Indices of the samples still unbroken, ascending."""
        return (~self.found).nonzero().squeeze(1)

    def result(self) -> tuple[Tensor, Tensor]:
        """What was found and stands when the whole batch is evaluated at once, and the points."""
        with torch.no_grad():  # a batch of another size rounds differently
            self.found &= worst_margin_loss(self.model(self.points), self.y) >= 0
        self.points = torch.where(per_image(self.found, self.x), self.points, self.x)
        return self.found, self.points

    def ascend(self, index: Tensor, region: Region, run: _Run) -> None:
        """Climb with the samples ``index``, whose ``region`` it is, from where ``run`` starts."""
        y = self.y[index]
        variable = region.random_start(self.generator)
        if run.rank is None and variable.shape == region.x.shape:
            variable = region.x.clone()
        rival = None if run.rank is None else self._rivals(index, run.rank)
        for step in range(run.steps + 1):
            with torch.enable_grad():
                variable = variable.detach().requires_grad_(step < run.steps)
                image = region.decode(variable)
                logits = self.model(image)
                margin = worst_margins(logits, y)
                value = margin if rival is None else _margin_of(logits, y, rival)
            unbroken = self._note(index, image.detach(), margin.detach())
            if rival is None:
                self._rank(index, logits.detach(), margin.detach())
            if step == run.steps or unbroken.numel() == 0:
                break
            (gradient,) = torch.autograd.grad(value.sum(), variable)
            variable = variable.detach()
            if unbroken.numel() < index.numel():
                region = region.select(unbroken)
                index, y = index[unbroken], y[unbroken]
                variable, gradient = variable[unbroken], gradient[unbroken]
                rival = None if rival is None else rival[unbroken]
            variable = region.leap(variable, gradient, 1 - step / run.steps)

    def _note(self, index: Tensor, image: Tensor, margin: Tensor) -> Tensor:
        """Keep what the samples ``index`` reached; returns the positions in ``index`` of those still unbroken."""
        unbroken = ~(margin >= 0)
        left = unbroken.nonzero().squeeze(1)  # the only wait for the device of a step
        if left.numel() < index.numel():
            self.found[index] |= ~unbroken
            self.points[index] = torch.where(per_image(unbroken, image), self.points[index], image)
        return left

    def _rank(self, index: Tensor, logits: Tensor, margin: Tensor) -> None:
        """Keep the logits of the samples ``index`` that came closer than ever: later runs aim by them."""
        closer = margin > self.margin[index]
        self.margin[index] = torch.where(closer, margin, self.margin[index])
        self.logits[index] = torch.where(closer[:, None], logits, self.logits[index])

    def _rivals(self, index: Tensor, rank: int) -> Tensor:
        """The class of each sample whose logit is the ``rank``-th of the wrong ones, (len(index),)."""
        wrong = self.logits[index].scatter(1, self.y[index, None], -torch.inf)
        return wrong.argsort(dim=1, descending=True)[:, rank]


def _margin_of(logits: Tensor, y: Tensor, rival: Tensor) -> Tensor:
    """z_rival - z_y, (B,)."""
    return (logits.gather(1, rival[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
