"""How the losses of several sets become one: Joint, Max, Random (paper, section on multi-norm training)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cure_plugin.errors import SpecError

STRATEGIES = ("joint", "max", "random", "single")


def joint(losses: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Mean over samples of the weighted sum; equal weights that sum to 1 by default.

    Args:
        losses: one tensor (B,) per set.

    Raises:
        SpecError: a different number of weights than losses, or a negative weight.
    """
    weights = weights or [1 / len(losses)] * len(losses)
    if len(weights) != len(losses) or min(weights) < 0:
        raise SpecError(f"weights must be {len(losses)} numbers >= 0, got {list(weights)}")
    return torch.stack([weight * loss.mean() for weight, loss in zip(weights, losses, strict=True)]).sum()


def maximum(losses: Sequence[Tensor]) -> Tensor:
    """Mean over samples of the largest loss; the gradient goes through the winner alone (shared on ties)."""
    return torch.stack(list(losses)).amax(0).mean()


def random_partition(size: int, parts: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Cut a batch at random into ``parts`` disjoint index sets, sizes differing by at most one, none missing."""
    device = generator.device if generator is not None else "cpu"
    return list(torch.randperm(size, generator=generator, device=device).tensor_split(parts))
