"""How the losses of several sets become one: Joint, Max, Random (paper, section on multi-norm training)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cure_plugin.checks import check_number, check_type
from cure_plugin.errors import SpecError
from cure_plugin.registry import Registry


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


class Strategy(ABC):
    """What becomes of the losses of several sets: a frozen dataclass, registered in :data:`STRATEGIES`.

    Attributes:
        divides: whether each sample is bounded for one set only.
    """

    divides: ClassVar[bool] = False

    @abstractmethod
    def combine(self, losses: Sequence[Tensor]) -> Tensor:
        """The batch's loss, a scalar, of one tensor per set: (B,) each, or a part of the batch where it divides."""

    def check(self, names: Sequence[str]) -> None:
        """Refuse sets that it does not combine.

        Args:
            names: of the sets.

        Raises:
            SpecError: too many, or none.
        """
        if not names:
            raise SpecError("at least one set is needed to train for, got none")


STRATEGIES: Registry[Strategy] = Registry("strategy", "cure_plugin.strategies")
"""Strategies by name."""


@STRATEGIES.register("joint")
@dataclass(frozen=True)
class Joint(Strategy):
    """The weighted sum, see :func:`joint`.

    Attributes:
        weights: one a set; equal and summing to 1 if empty.
    """

    weights: Sequence[float] = ()

    def __post_init__(self) -> None:
        check_type("weights", self.weights, (list, tuple), "a list of numbers")
        for weight in self.weights:
            check_number("weights", weight)

    def check(self, names: Sequence[str]) -> None:
        super().check(names)
        if self.weights and (len(self.weights) != len(names) or not any(self.weights)):
            raise SpecError(
                f"weights must be one finite number >= 0 per set ({len(names)}), not all 0; got {list(self.weights)}"
            )

    def combine(self, losses: Sequence[Tensor]) -> Tensor:
        return joint(losses, self.weights)


@STRATEGIES.register("max")
@dataclass(frozen=True)
class Max(Strategy):
    """The largest per sample, see :func:`maximum`."""

    def combine(self, losses: Sequence[Tensor]) -> Tensor:
        return maximum(losses)


@STRATEGIES.register("random")
@dataclass(frozen=True)
class RandomPartition(Strategy):
    """Each sample for one set that is drawn for it, see :func:`random_partition`."""

    divides: ClassVar[bool] = True

    def combine(self, losses: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(losses)).mean()


@STRATEGIES.register("single")
@dataclass(frozen=True)
class Single(Strategy):
    """One set."""

    def check(self, names: Sequence[str]) -> None:
        super().check(names)
        if len(names) > 1:
            raise SpecError(f"strategy single takes one set, got {list(names)}; choose joint, max or random")

    def combine(self, losses: Sequence[Tensor]) -> Tensor:
        return losses[0].mean()
