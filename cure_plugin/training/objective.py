"""The certified loss of one batch over several sets: a loss per set, a strategy, bound alignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor, nn

from cure_plugin.attacks import pgd_variables
from cure_plugin.checks import check_count, check_number, check_type, is_number
from cure_plugin.errors import SpecError
from cure_plugin.folding import AttackNet
from cure_plugin.inputs import check_generator, check_pair
from cure_plugin.nets import Normalize
from cure_plugin.sets import PerturbationSet
from cure_plugin.sets.base import check_batch
from cure_plugin.sets.names import distinct_names
from cure_plugin.training.alignment import bound_alignment, certified
from cure_plugin.training.batch_norm import clean_statistics, normalising_by
from cure_plugin.training.losses import (
    SetLoss,
    adversarial_loss,
    cc_ibp_loss,
    crown_ibp_loss,
    ibp_loss,
    mtl_ibp_loss,
)
from cure_plugin.training.regularizer import warmup_regularizer
from cure_plugin.training.shrinking import relu_shrinking
from cure_plugin.training.strategies import STRATEGIES, joint, maximum, random_partition

LOSSES = ("sabr", "sabr-box", "ibp", "crown-ibp", "mtl-ibp", "cc-ibp", "adversarial")
"""Names of the per-set losses of :mod:`cure_plugin.training.losses`."""

_WITH_RATIO = ("sabr", "sabr-box")
_WITH_MIX = ("crown-ibp", "mtl-ibp", "cc-ibp")
_WITHOUT_ATTACK = ("ibp", "crown-ibp")
_NO_BOUNDS = ("cc-ibp", "adversarial")
"""Losses whose elided vector certifies nothing, though bound alignment takes it as it is."""


@dataclass(frozen=True)
class TrainingSet:
    """A set to train for, and how.

    Attributes:
        perturbation: the set.
        ratio: lambda, the relative size of the region of ``sabr`` and ``sabr-box``; 1 with ``sabr``: the whole set.
        loss: one of :data:`LOSSES`.
        mix: share of the bounds in ``mtl-ibp`` and ``cc-ibp`` (the rest is adversarial), of CROWN-IBP's bounds
            in ``crown-ibp`` (the rest is IBP's; default: none).
        attack_step: first step of the attack relative to the set's size; default: the set's own.

    Raises:
        SpecError: an unknown loss, a ratio or mix outside (0, 1], or one that the loss knows nothing of.
    """

    perturbation: PerturbationSet
    ratio: float = 1.0
    loss: str = "sabr"
    mix: float | None = None
    attack_step: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.perturbation, PerturbationSet):
            raise SpecError(f"perturbation must be a cure_plugin set, got {type(self.perturbation).__name__}")
        name = self.perturbation.name
        if not isinstance(self.loss, str) or self.loss not in LOSSES:
            raise SpecError(f"unknown loss {self.loss!r} of {name}; known: {', '.join(LOSSES)}")
        if not is_number(self.ratio) or not 0 < self.ratio <= 1:
            raise SpecError(
                f"ratio (lambda) of {name} must lie in (0, 1], got {self.ratio!r}; attacks alone are loss adversarial"
            )
        if self.ratio != 1 and self.loss not in _WITH_RATIO:
            raise SpecError(f"ratio of {name} means nothing to loss {self.loss!r}; it is for {', '.join(_WITH_RATIO)}")
        if self.mix is None and self.loss in ("mtl-ibp", "cc-ibp"):
            raise SpecError(f"loss {self.loss!r} of {name} needs mix, the share of the bounds in (0, 1]")
        if self.mix is not None and self.loss not in _WITH_MIX:
            raise SpecError(f"mix of {name} means nothing to loss {self.loss!r}; it is for {', '.join(_WITH_MIX)}")
        if self.mix is not None:
            check_number(f"mix of {name}", self.mix, 1, zero=False)
        if self.attack_step is not None:
            check_number(f"attack_step of {name}", self.attack_step, zero=False)
        if self.loss == "sabr-box" and not hasattr(self.perturbation, "small_box"):
            raise SpecError(f"loss sabr-box takes lp balls, got {name}; use sabr")

    def needs_attack(self) -> bool:
        """Whether the loss depends on an attack at all."""
        if self.loss == "sabr":
            return self.perturbation.needs_attack(self.ratio)
        return self.loss not in _WITHOUT_ATTACK


@dataclass(frozen=True)
class Outcome:
    """A batch's loss and what went into it.

    Attributes:
        loss: scalar to call ``backward`` on.
        figures: means over the batch for the log: ``loss.<set>``, ``region_certified.<set>`` (share of
            samples whose training region is certified, with shrunken ReLUs where they are asked for: no certificate
            of the set; not for losses that are made of no bounds), ``alignment`` without its weight, ``regularizer``
            with it.
    """

    loss: Tensor
    figures: dict[str, float]


@dataclass(frozen=True)
class CureObjective:
    """CURE's loss as a callable for any training loop: ``objective(bounded, model, x, y).loss.backward()``.

    All attacks are made together, one forward and one backward pass a step. Then the sets are bounded one after
    the other.

    Attributes:
        sets: the sets to train for, at least one.
        strategy: ``joint``, ``max``, ``random``, or ``single`` for one set.
        weights: of ``joint``; equal and summing to 1 if empty.
        alignment: weight of bound alignment (the paper's lbd); 0 switches it off.
        align_from: name of the set q (``l2``, or ``l2=0.5`` where several are l2 balls) whose certified samples (by the
            elided vectors that the losses are made of) are aligned to the others, the mean over those; ``weaker``
            takes the set with fewer certified samples in the batch, ``both`` the sum over every set in turn.
        regularizer: weight of the warm-up regulariser at the start of annealing; it falls to 0 with it. It watches
            the bounds of the first linf set, of the first set with bounds if there is none.
        attack_steps: PGD steps that look for each region.
        relu_shrink: factor on the upper bounds of crossing ReLUs, see :func:`relu_shrinking`.
        amp, channels_last: of the attacks, see :class:`AttackNet`.

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
    relu_shrink: float = 1.0
    amp: bool = False
    channels_last: bool = False
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        check_type("sets", self.sets, (list, tuple), "a list of TrainingSet(perturbation, ...)")
        check_type("weights", self.weights, (list, tuple), "a list of numbers")
        for entry in self.sets:
            if not isinstance(entry, TrainingSet):
                raise SpecError(f"sets must be TrainingSet(perturbation, ...), got {entry!r}")
        object.__setattr__(self, "names", tuple(distinct_names([s.perturbation for s in self.sets])))
        if self.strategy not in STRATEGIES:
            raise SpecError(f"unknown strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}")
        if self.strategy == "single" and len(self.sets) > 1:
            raise SpecError(f"strategy single takes one set, got {list(self.names)}; choose joint, max or random")
        if self.weights and self.strategy != "joint":
            raise SpecError(f"weights are for strategy joint, got {list(self.weights)} with {self.strategy!r}")
        usable = all(0 <= weight < math.inf for weight in self.weights) and any(self.weights)
        if self.weights and (len(self.weights) != len(self.sets) or not usable):
            raise SpecError(
                f"weights must be one finite number >= 0 per set ({len(self.sets)}), not all 0; "
                f"got {list(self.weights)}"
            )
        if self.align_from not in ("weaker", "both", *self.names):
            raise SpecError(f"align_from must be weaker, both or one of {list(self.names)}, got {self.align_from!r}")
        if not 0 <= self.alignment < math.inf or (self.alignment > 0 and len(self.sets) < 2):
            raise SpecError(f"alignment must be finite, >= 0 and needs two sets, got {self.alignment!r}")
        check_number("regularizer", self.regularizer)
        if self.alignment > 0 and self.strategy == "random":
            raise SpecError("alignment needs every sample bounded for every set; random bounds each for one")
        check_count("attack_steps", self.attack_steps, 1)
        check_number("relu_shrink", self.relu_shrink, 1, zero=False)

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

        Raises:
            SpecError: a scale outside [0, 1], inputs that are no finite float batch, or a net that has diverged.
        """
        check_type("bounded", bounded, BoundedModule, "what bounded_module(model, shape) returns")
        check_number("scale", scale, 1)
        check_batch(x)  # before BatchNorm's running statistics take anything in
        check_pair(x, y, model)
        check_generator(generator)
        if self.strategy == "random":
            parts = random_partition(x.shape[0], len(self.sets), generator)
            chosen = [k for k, part in enumerate(parts) if len(part)]  # a batch may be smaller than the number of sets
            inputs = {k: (x[parts[k].to(x.device)], y[parts[k].to(x.device)]) for k in chosen}
        else:
            inputs = dict.fromkeys(range(len(self.sets)), (x, y))
        scaled = {k: self.sets[k].perturbation.scaled(scale) for k in inputs}
        variables = self._attack(model, inputs, scaled, generator)
        statistics = clean_statistics(bounded, model, x)
        watched = self._watched(inputs) if self.regularizer > 0 and scale < 1 else None
        results: dict[int, SetLoss] = {}
        penalty = x.new_zeros(())
        for k in inputs:
            with normalising_by(statistics), relu_shrinking(bounded, self.relu_shrink):
                results[k] = _loss_of(self.sets[k], bounded, model, *inputs[k], scaled[k], variables[k])
            if k == watched:
                penalty = warmup_regularizer(bounded, _input_width(bounded, model))
        penalty = self.regularizer * (1 - scale) * penalty
        aligned = self._alignment(list(results.values()))
        loss = self._combine([result.values for result in results.values()]) + self.alignment * aligned + penalty
        return Outcome(loss, self._figures(results, aligned, penalty))

    def _attack(
        self,
        model: nn.Module,
        inputs: dict[int, tuple[Tensor, Tensor]],
        scaled: dict[int, PerturbationSet],
        generator: torch.Generator | None,
    ) -> dict[int, Tensor]:
        """An attack variable per set: where the attacks, made together, ended, or the start where none is needed."""
        attacked = [k for k in inputs if self.sets[k].needs_attack()]
        variables = {k: scaled[k].random_start(inputs[k][0], generator) for k in inputs if k not in attacked}
        if attacked:
            jobs = [(*inputs[k], scaled[k]) for k in attacked]
            steps = [self.sets[k].attack_step or self.sets[k].perturbation.attack_step for k in attacked]
            net = AttackNet(model, self.amp, self.channels_last)
            found = pgd_variables(net, jobs, self.attack_steps, generator=generator, best=False, first_steps=steps)
            variables.update((k, variable) for k, (variable, _) in zip(attacked, found, strict=True))
            if not all(bool(variables[k].isfinite().all()) for k in attacked):
                raise SpecError(
                    "the net's logits or gradients are not finite: training has diverged; lower the learning rate "
                    "(learning_rate of a recipe) or grow the sets more slowly (ramp_epochs)"
                )
        return variables

    def _watched(self, inputs: dict[int, tuple[Tensor, Tensor]]) -> int | None:
        """The set whose bounds the warm-up regulariser looks at."""
        bounding = [k for k in inputs if self.sets[k].loss != "adversarial"]
        return min(bounding, key=lambda k: (self.sets[k].perturbation.name != "linf", k), default=None)

    def _combine(self, losses: list[Tensor]) -> Tensor:
        if self.strategy == "joint":
            return joint(losses, self.weights)
        return maximum(losses) if self.strategy == "max" else torch.cat(losses).mean()

    def _alignment(self, results: list[SetLoss]) -> Tensor:
        vectors = [result.vector for result in results]
        if self.alignment == 0:
            return vectors[0].new_zeros(())
        sources = range(len(vectors))
        if self.align_from == "weaker":
            counts = [int(certified(vector).sum()) for vector in vectors]
            sources = [counts.index(min(counts))]  # type: ignore[assignment]
        elif self.align_from != "both":
            sources = [self.names.index(self.align_from)]  # type: ignore[assignment]
        pairs = [(q, r) for q in sources for r in range(len(vectors)) if r != q]
        return torch.stack([bound_alignment(vectors[q], vectors[r]) for q, r in pairs]).sum() / (len(vectors) - 1)

    def _figures(self, results: dict[int, SetLoss], aligned: Tensor, penalty: Tensor) -> dict[str, float]:
        means = {"alignment": aligned, "regularizer": penalty}
        for k, result in results.items():
            means[f"loss.{self.names[k]}"] = result.values.mean()
            if self.sets[k].loss not in _NO_BOUNDS:
                means[f"region_certified.{self.names[k]}"] = certified(result.vector).to(aligned).mean()
        values = torch.stack([value.detach() for value in means.values()]).tolist()  # one transfer from the device
        return dict(zip(means, values, strict=True))


def _loss_of(
    training_set: TrainingSet,
    bounded: BoundedModule,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    variable: Tensor,
) -> SetLoss:
    """The loss that ``training_set`` names, of its set at present size."""
    kind, mix = training_set.loss, 1.0 if training_set.mix is None else training_set.mix
    if kind in ("sabr", "sabr-box"):
        cut = perturbation.small_region if kind == "sabr" else perturbation.small_box
        centre, region = cut(x, variable, training_set.ratio)
        return ibp_loss(bounded, centre, y, region)
    if kind == "ibp":
        return ibp_loss(bounded, x, y, perturbation)
    if kind == "crown-ibp":
        return crown_ibp_loss(bounded, x, y, perturbation, mix)
    if kind == "mtl-ibp":
        return mtl_ibp_loss(bounded, model, x, y, perturbation, variable, mix)
    if kind == "cc-ibp":
        return cc_ibp_loss(bounded, model, x, y, perturbation, variable, mix)
    return adversarial_loss(model, x, y, perturbation, variable)


def _input_width(bounded: BoundedModule, model: nn.Module) -> Tensor:
    """Widths of the box that was last bounded, as the first layer with weights to learn sees it."""
    lower, upper = next(node for node in bounded.modules() if type(node).__name__ == "BoundInput").interval[:2]
    first = next(model.children(), None)
    return first(upper) - first(lower) if isinstance(first, Normalize) else upper - lower
