"""Projected gradient attacks inside any perturbation set: correct, batched, input gradients only."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_plugin.checks import check_count, check_number, check_type
from cure_plugin.inputs import check_generator, check_labels, check_pair, evaluated
from cure_plugin.modes import evaluation_mode
from cure_plugin.sets import PerturbationSet, Region
from cure_plugin.sets.base import check_set, per_image

P = ParamSpec("P")
R = TypeVar("R")

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, C), labels (B,)) -> value per sample (B,) that the attack makes large."""

Job = tuple[Tensor, Tensor, PerturbationSet]
"""(clean inputs (B, *input), labels (B,), the set around them)."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy per sample, (B,)."""
    check_labels(y, logits.shape[1], len(logits))
    return _cross_entropy(logits, y)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def worst_margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """max over j != y of z_j - z_y, (B,): positive exactly where the sample is misclassified."""
    check_labels(y, logits.shape[1], len(logits))
    return worst_margins(logits, y)


def worst_margins(logits: Tensor, y: Tensor) -> Tensor:
    """:func:`worst_margin_loss` of labels that were checked: to read them, every time, would wait for the device."""
    true = logits.gather(1, y[:, None])
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return others.amax(1) - true.squeeze(1)


_CHECKED: dict[Objective, Objective] = {cross_entropy: _cross_entropy, worst_margin_loss: worst_margins}
"""Objectives that check labels, and what they do then."""


@dataclass(frozen=True)
class Pgd:
    """How projected gradients climb.

    Attributes:
        steps: how many. The step shrinks by 10 after half and after 7/8 of them (SABR's schedule for 8 steps).
        objective: what to make large, per sample.
        random_start: start at a random point of the set, else at the clean input where the variable is the image.
        momentum: share of the last direction kept, of gradients scaled to mean size 1 (Dong et al. 2018).

    Raises:
        SpecError: steps that are no whole number >= 0, or a momentum that is not finite and >= 0.
    """

    steps: int = 8
    objective: Objective = cross_entropy
    random_start: bool = True
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_number("momentum", self.momentum)

    def start(self, region: Region, generator: torch.Generator | None) -> Tensor:
        """The attack variable to climb from."""
        variable = region.random_start(generator)
        return region.x.clone() if not self.random_start and variable.shape == region.x.shape else variable

    def direction(self, gradient: Tensor, last: Tensor | None) -> Tensor:
        """Where to step: the ``gradient``, and the share of the ``last`` direction that is kept."""
        if self.momentum == 0:
            return gradient
        size = gradient.abs().flatten(1).mean(1).clamp(min=torch.finfo(gradient.dtype).tiny)
        scaled = gradient / per_image(size, gradient)
        return scaled if last is None else self.momentum * last + scaled


_DEFAULT = Pgd()

_SPELLED_OUT = ("steps", "objective", "random_start", "generator", "momentum", "best", "first_steps")
"""Options in the order of version 0.1."""


def _also_spelled_out(attack: Callable[P, R]) -> Callable[P, R]:
    """Let, for a release, options one by one stand where ``attack`` takes a :class:`Pgd`."""
    place = list(inspect.signature(attack).parameters).index("search")
    rearranged: Callable[..., R] = attack

    @functools.wraps(attack)
    def call(*given: P.args, **named: P.kwargs) -> R:
        fields = {"steps", "objective", "random_start", "momentum"}
        if (len(given) <= place or isinstance(given[place], Pgd)) and not fields & set(named):
            return attack(*given, **named)
        remedy = "give a Pgd(steps, objective, ...) in their place"
        warnings.warn(f"options of {attack.__name__} will go: {remedy}", DeprecationWarning, stacklevel=2)
        told: dict[str, Any] = {**named, **dict(zip(_SPELLED_OUT, given[place:], strict=False))}
        told["search"] = Pgd(**{key: told.pop(key) for key in fields & set(told)})
        return rearranged(*given[:place], **told)

    return call


@_also_spelled_out
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    search: Pgd = _DEFAULT,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent; returns the best point of the set met, (B, *input).

    A union is attacked member by member; the best of all is kept. See :func:`pgd_variables`.
    """
    check_set(perturbation)
    check_pair(x, y, model)
    best_point, best_value = x, torch.full((x.shape[0],), -torch.inf, dtype=x.dtype, device=x.device)
    for part in perturbation.parts():
        variable, value = pgd_variable(model, x, y, part, search, generator)
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        best_point = torch.where(per_image(better, x), part.decode(x, variable).detach(), best_point)
    return best_point


@_also_spelled_out
def pgd_variable(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    search: Pgd = _DEFAULT,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Projected gradient ascent in the set's own attack variable (pixels, or the parameters of a transformation).

    Args:
        model: maps (B, *input) to logits (B, C).
        x: clean inputs (B, *input); y: labels (B,).
        perturbation: the set to stay in.
        generator: of the random start.

    Returns:
        (best variable met, its value (B,)). See :func:`pgd_variables` for the steps.
    """
    return pgd_variables(model, [(x, y, perturbation)], search, generator)[0]


@_also_spelled_out
def pgd_variables(
    model: nn.Module,
    jobs: Sequence[Job],
    search: Pgd = _DEFAULT,
    generator: torch.Generator | None = None,
    best: bool = True,
    first_steps: Sequence[float] | None = None,
    starts: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """:func:`pgd_variable` on several sets at once: every step is one backward pass for all of them.

    Every step is projected onto the set around ``x`` itself, so none can drift away. Gradients are taken for the
    attack variables only. BatchNorm runs on its running statistics during the attack; the model's mode is restored.

    Args:
        jobs: (x, y, perturbation) triples; they may differ in size.
        best: return the best variables met, at the price of one more forward pass, else the last ones.
        first_steps: relative size of each job's first step; default: the sets' own ``attack_step``.
        starts: each job's variable to climb from; default: those of ``search``.

    Returns:
        (variable, its value (B,)) per job; values of the last variables are those before the last step.

    Raises:
        SpecError: a search that is no :class:`Pgd`, a first step that is not finite and >= 0, no set, or images,
            labels, a set and a net that do not fit each other.
    """
    for length in first_steps or ():
        check_number("first_steps", length)
    check_type("search", search, Pgd, "a Pgd(steps, objective, ...)")
    check_generator(generator)
    for x, y, perturbation in jobs:
        check_set(perturbation)
        check_pair(x, y, model)
    steps, objective = search.steps, search.objective
    decay_steps = {steps // 2, steps * 7 // 8}
    sizes = [len(x) for x, _, _ in jobs]
    labels = torch.cat([y for _, y, _ in jobs])
    regions = [perturbation.around(x) for x, _, perturbation in jobs]
    lengths = list(first_steps) if first_steps is not None else [p.attack_step for _, _, p in jobs]
    variables = [search.start(region, generator) for region in regions] if starts is None else list(starts)
    kept = [(v, v.new_full((n,), -torch.inf)) for v, n in zip(variables, sizes, strict=True)]
    directions: list[Tensor | None] = [None] * len(jobs)
    with evaluation_mode(model), torch.enable_grad():
        for index in range(steps + 1 if best else steps):
            variables = [variable.detach().requires_grad_(index < steps) for variable in variables]
            images = [region.decode(variable) for region, variable in zip(regions, variables, strict=True)]
            values = objective(_logits(model, images), labels)
            objective = _CHECKED.get(objective, objective)  # the first step has looked at the labels
            kept = [
                _better(old, (variable.detach(), value.detach())) if best else (variable, value.detach())
                for old, variable, value in zip(kept, variables, values.split(sizes), strict=True)
            ]
            if index == steps:
                break
            gradients = torch.autograd.grad(values.sum(), variables)
            if index > 0 and index in decay_steps:
                lengths = [length / 10 for length in lengths]
            for job, (region, variable, gradient) in enumerate(zip(regions, variables, gradients, strict=True)):
                directions[job] = direction = search.direction(gradient, directions[job])
                variables[job] = region.ascend(variable.detach(), direction, lengths[job])
    if best:
        return kept
    return [(variable, value) for variable, (_, value) in zip(variables, kept, strict=True)]


def _logits(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Of all images together; on a CPU, whose caches hold few, of each set's after the other, a seventh faster."""
    if len(images) > 1 and images[0].device.type != "cpu":
        images = [torch.cat(list(images))]
    logits = [evaluated(model, some) for some in images]
    return logits[0] if len(logits) == 1 else torch.cat(logits)


def _better(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Per sample, the (variable, value) of the larger value."""
    better = new[1] > old[1]
    return torch.where(per_image(better, new[0]), new[0], old[0]), torch.where(better, new[1], old[1])
