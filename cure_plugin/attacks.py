"""Projected gradient attacks inside any perturbation set: correct, batched, input gradients only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_plugin.modes import evaluation_mode
from cure_plugin.sets import PerturbationSet
from cure_plugin.sets.base import per_image

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, C), labels (B,)) -> value per sample (B,) that the attack makes large."""

_MOMENTUM = 0.5
"""Of every second restart in the search for counterexamples."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy per sample, (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def worst_margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """max over j != y of z_j - z_y, (B,): positive exactly where the sample is misclassified."""
    true = logits.gather(1, y[:, None])
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return others.amax(1) - true.squeeze(1)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    steps: int = 8,
    objective: Objective = cross_entropy,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    momentum: float = 0.0,
) -> Tensor:
    """Projected gradient ascent; returns the best point of the set met, (B, *input).

    A union is attacked member by member; the best of all is kept. See :func:`pgd_variable`.
    """
    best_point, best_value = x, torch.full((x.shape[0],), -torch.inf, dtype=x.dtype, device=x.device)
    for part in perturbation.parts():
        variable, value = pgd_variable(model, x, y, part, steps, objective, random_start, generator, momentum)
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        best_point = torch.where(per_image(better, x), part.decode(x, variable).detach(), best_point)
    return best_point


def pgd_variable(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    steps: int = 8,
    objective: Objective = cross_entropy,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Projected gradient ascent in the set's own attack variable (pixels, or the parameters of a transformation).

    The step shrinks by 10 after half and after 7/8 of the steps (SABR's schedule for 8 steps). Every
    step is projected onto the set around ``x`` itself, so none can drift away. BatchNorm runs on its
    running statistics during the attack; the model's mode is restored.

    Args:
        model: maps (B, *input) to logits (B, C).
        x: clean inputs (B, *input); y: labels (B,).
        perturbation: the set to stay in.
        objective: what to make large, per sample.
        random_start: start at a random point of the set, else at ``x`` where the variable is the image.
        momentum: share of the last direction kept, of gradients scaled to mean size 1 (Dong et al. 2018).

    Returns:
        (best variable met, its value (B,)).
    """
    decay_steps = {steps // 2, steps * 7 // 8}
    step = perturbation.attack_step
    variable = perturbation.random_start(x, generator)
    if not random_start and variable.shape == x.shape:
        variable = x.clone()
    best_variable, best_value = variable, torch.full((x.shape[0],), -torch.inf, dtype=x.dtype, device=x.device)
    direction: Tensor | None = None
    with evaluation_mode(model), torch.enable_grad():
        for index in range(steps + 1):
            variable = variable.detach().requires_grad_(index < steps)
            value = objective(model(perturbation.decode(x, variable)), y)
            better = value.detach() > best_value
            best_value = torch.where(better, value.detach(), best_value)
            best_variable = torch.where(per_image(better, variable), variable.detach(), best_variable)
            if index == steps:
                break
            (gradient,) = torch.autograd.grad(value.sum(), variable)
            if index > 0 and index in decay_steps:
                step /= 10
            direction = gradient if momentum == 0 else _with_momentum(gradient, direction, momentum)
            variable = perturbation.ascend(x, variable.detach(), direction, step)
    return best_variable, best_value


def _with_momentum(gradient: Tensor, last: Tensor | None, momentum: float) -> Tensor:
    """``gradient``, scaled to mean size 1 per sample, plus a share of the ``last`` direction."""
    size = gradient.abs().flatten(1).mean(1).clamp(min=torch.finfo(gradient.dtype).tiny)
    scaled = gradient / per_image(size, gradient)
    return scaled if last is None else momentum * last + scaled


def find_counterexample(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    steps: int = 40,
    restarts: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Look for misclassified points in the set: the clean point, then PGD on the worst margin.

    Each restart works on the samples still unbroken only; every second one has momentum, which breaks more
    patches and rotations and fewer boxes.

    Returns:
        (found (B,) bool, points (B, *input)): where found, a point of the set that the model gets wrong.
    """
    points = x.clone()
    with evaluation_mode(model), torch.no_grad():
        found = worst_margin_loss(model(x), y) >= 0
    for restart in range(restarts):
        left = (~found).nonzero().squeeze(1)
        if left.numel() == 0:
            break
        some = perturbation.select(x, left)
        momentum = _MOMENTUM if restart % 2 else 0.0
        candidate = pgd(model, x[left], y[left], some, steps, worst_margin_loss, restart > 0, generator, momentum)
        with evaluation_mode(model), torch.no_grad():
            broken = worst_margin_loss(model(candidate), y[left]) >= 0
        points[left[broken]] = candidate[broken]
        found[left[broken]] = True
    return found, points
