"""One pass over batches with any loss: what certified and natural epochs have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_plugin.checks import check_number
from cure_plugin.inputs import check_labels, check_pair, evaluated
from cure_plugin.training.objective import Outcome
from cure_plugin.training.world import ALONE, World

Batches = Iterable[tuple[Tensor, Tensor]]
BatchLoss = Callable[[Tensor, Tensor], Outcome]


def natural_loss(model: nn.Module, world: World = ALONE) -> BatchLoss:
    """Cross entropy of the clean batch as a loss for :func:`run_epoch`; ``world``: processes that share batches out."""

    def loss(x: Tensor, y: Tensor) -> Outcome:
        check_pair(x, y, model)
        world.check(model)
        share = world.share(len(x))
        logits = share.all(evaluated(model, share.of(x)))
        check_labels(y, logits.shape[1])
        return Outcome(F.cross_entropy(logits, y), {})

    return loss


def run_epoch(
    model: nn.Module,
    batches: Batches,
    loss: BatchLoss,
    optimizer: torch.optim.Optimizer,
    l1_penalty: float = 0.0,
    clip: float | None = None,
) -> dict[str, float]:
    """Train in training mode on every batch once; gradients of earlier batches or epochs play no part.

    Args:
        batches: (x, y) pairs.
        loss: what to minimise.
        l1_penalty: weight of the parameters' l1 norm, added to the loss.
        clip: largest l2 norm of the gradient; None or 0 for any.

    Raises:
        SpecError: a penalty or clip that is not finite and >= 0.

    Returns:
        Means of the outcomes' figures over the samples that they are of, and of ``loss`` (with the penalty).
    """
    check_number("l1_penalty", l1_penalty)
    check_number("clip", clip or 0.0)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    totals: dict[str, float] = {}
    samples: dict[str, int] = {}
    for x, y in batches:
        optimizer.zero_grad()
        outcome = loss(x, y)
        total = outcome.loss
        if l1_penalty:
            total = total + l1_penalty * torch.stack([p.abs().sum() for p in parameters]).sum()
        total.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        for name, value in {**outcome.figures, "loss": float(total.detach())}.items():
            totals[name] = totals.get(name, 0.0) + value * len(x)
            samples[name] = samples.get(name, 0) + len(x)
    return {name: value / samples[name] for name, value in totals.items()}
