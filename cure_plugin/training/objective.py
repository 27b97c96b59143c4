"""The certified loss of one batch over several sets: SABR regions, a strategy, bound alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor, nn

from cure_plugin.attacks import pgd_variable
from cure_plugin.bounds.margins import elided, lower_margins, robust_cross_entropy
from cure_plugin.errors import SpecError
from cure_plugin.sets import PerturbationSet
from cure_plugin.training.alignment import bound_alignment
from cure_plugin.training.regularizer import warmup_regularizer
from cure_plugin.training.strategies import STRATEGIES, joint, maximum, random_partition


@dataclass(frozen=True)
class TrainingSet:
    """A set to train for, and the relative size lambda of its SABR region (1: plain IBP on the whole set).

    Raises:
        SpecError: ratio outside (0, 1]; a zero ratio would train on nothing but the attack point.
    """

    perturbation: PerturbationSet
    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise SpecError(f"ratio (lambda) of {self.perturbation.name} must lie in (0, 1], got {self.ratio!r}")


@dataclass(frozen=True)
class Outcome:
    """A batch's loss and what went into it.

    Attributes:
        loss: scalar to call ``backward`` on.
        figures: means over the batch for the log: ``loss.<set>``, ``region_certified.<set>`` (share of
            samples whose small training region is certified: no certificate of the set), ``alignment``,
            ``regularizer``.
    """

    loss: Tensor
    figures: dict[str, float]


@dataclass(frozen=True)
class CureObjective:
    """CURE's loss as a callable for any training loop: ``objective(bounded, model, x, y).loss.backward()``.

    Attributes:
        sets: the sets to train for, at least one.
        strategy: ``joint``, ``max`` or ``random``.
        weights: of ``joint``; equal if empty.
        alignment: weight of bound alignment (the paper's lbd); 0 switches it off.
        align_from: name of the set q whose certified samples are aligned to the others; ``weaker``
            takes the set with fewer certified samples in the batch, ``both`` every set in turn.
        regularizer: weight of the warm-up regulariser at the start of annealing; it falls to 0 with it.
        attack_steps: PGD steps that look for each region.

    Raises:
        SpecError: an unknown strategy or set name, or ``random`` with alignment (it bounds each sample
            for one set only).
    """

    sets: Sequence[TrainingSet]
    strategy: str = "max"
    weights: Sequence[float] = ()
    alignment: float = 0.0
    align_from: str = "weaker"
    regularizer: float = 0.0
    attack_steps: int = 8
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(s.perturbation.name for s in self.sets))
        if not self.sets or len(set(self.names)) != len(self.names):
            raise SpecError(f"sets must be at least one, each with a name of its own; got {list(self.names)}")
        if self.strategy not in STRATEGIES:
            raise SpecError(f"unknown strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}")
        if self.weights and (len(self.weights) != len(self.sets) or min(self.weights) < 0):
            raise SpecError(f"weights must be one number >= 0 per set ({len(self.sets)}), got {list(self.weights)}")
        if self.align_from not in ("weaker", "both", *self.names):
            raise SpecError(f"align_from must be weaker, both or one of {list(self.names)}, got {self.align_from!r}")
        if self.alignment < 0 or (self.alignment > 0 and len(self.sets) < 2):
            raise SpecError(f"alignment must be >= 0 and needs two sets, got {self.alignment!r}")
        if self.alignment > 0 and self.strategy == "random":
            raise SpecError("alignment needs every sample bounded for every set; random bounds each for one")

    def __call__(
        self,
        bounded: BoundedModule,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Outcome:
        """The loss of one batch.

        Args:
            bounded: auto_LiRPA's wrapper of ``model``, sharing its parameters.
            x, y: clean inputs (B, *input) in the sets' domain and labels (B,).
            scale: relative size of all sets, for annealing; in [0, 1].
            generator: of the attacks' random starts and the random partition.
        """
        _follow_mode(bounded, model)
        if self.strategy == "random":
            parts = random_partition(x.shape[0], len(self.sets), generator)
        else:
            parts = [torch.arange(x.shape[0])] * len(self.sets)
        vectors, losses = [], []
        penalty = x.new_zeros(())
        for index, (training_set, part) in enumerate(zip(self.sets, parts, strict=True)):
            if len(part) == 0:
                continue  # a batch smaller than the number of sets
            chosen = part.to(x.device)
            margins, width = self._margins(bounded, model, x[chosen], y[chosen], training_set, scale, generator)
            if index == 0 and self.regularizer > 0 and scale < 1:
                penalty = self.regularizer * (1 - scale) * warmup_regularizer(bounded, width)
            vectors.append(elided(margins))
            losses.append(robust_cross_entropy(margins))
        aligned = self._alignment(vectors)
        figures = {"alignment": float(aligned.detach()), "regularizer": float(penalty.detach())}
        shown = [name for name, part in zip(self.names, parts, strict=True) if len(part)]
        for name, vector, loss in zip(shown, vectors, losses, strict=True):
            figures[f"loss.{name}"] = float(loss.detach().mean())
            figures[f"region_certified.{name}"] = float((vector.detach()[:, 1:] < 0).all(1).float().mean())
        return Outcome(self._combine(losses) + self.alignment * aligned + penalty, figures)

    def _combine(self, losses: list[Tensor]) -> Tensor:
        if self.strategy == "max":
            return maximum(losses)
        if self.strategy == "joint":
            return joint(losses, self.weights)
        return torch.cat(losses).mean()

    def _margins(
        self,
        bounded: BoundedModule,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        training_set: TrainingSet,
        scale: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """(IBP margins (B, C - 1), input box widths) of one set's region around its attack points."""
        perturbation = training_set.perturbation.scaled(scale)
        if self.attack_steps > 0 and perturbation.needs_attack(training_set.ratio):
            variable, _ = pgd_variable(model, x, y, perturbation, self.attack_steps, generator=generator)
        else:
            variable = perturbation.random_start(x, generator)
        centre, region = perturbation.small_region(x, variable, training_set.ratio)
        if model.training and any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules()):
            bounded(centre)  # auto_LiRPA's interval uses the batch statistics of the last forward pass
        margins = lower_margins(bounded, centre, y, region, "IBP")
        return margins, region.x_U - region.x_L

    def _alignment(self, vectors: list[Tensor]) -> Tensor:
        if self.alignment == 0:
            return vectors[0].new_zeros(())
        sources = range(len(vectors))
        if self.align_from == "weaker":
            certified = [int((vector.detach()[:, 1:] < 0).all(1).sum()) for vector in vectors]
            sources = [certified.index(min(certified))]  # type: ignore[assignment]
        elif self.align_from != "both":
            sources = [self.names.index(self.align_from)]  # type: ignore[assignment]
        pairs = [(q, r) for q in sources for r in range(len(vectors)) if r != q]
        return torch.stack([bound_alignment(vectors[q], vectors[r]) for q, r in pairs]).sum()


def _follow_mode(bounded: BoundedModule, model: nn.Module) -> None:
    """Let ``bounded`` pass gradients to the parameters, and normalise as ``model`` does in its present mode."""
    bounded.train()  # in eval mode auto_LiRPA switches requires_grad of the parameters off
    for node in bounded.modules():
        if type(node).__name__ == "BoundBatchNormalization":
            node.training = model.training
