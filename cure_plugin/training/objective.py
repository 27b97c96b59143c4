"""The certified loss of one batch over several sets: a loss per set, a strategy, bound alignment."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, cast

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor, nn

from cure_plugin.attacks import Pgd, pgd_variables
from cure_plugin.checks import check_count, check_number, check_type, is_number
from cure_plugin.errors import SpecError
from cure_plugin.folding import AttackNet
from cure_plugin.inputs import all_finite, check_generator, check_pair
from cure_plugin.nets import Normalize
from cure_plugin.sets import PerturbationSet
from cure_plugin.sets.base import check_batch
from cure_plugin.sets.names import distinct_names
from cure_plugin.sets.region import Region
from cure_plugin.training.alignment import bound_alignment, certified
from cure_plugin.training.batch_norm import clean_statistics, normalising_by
from cure_plugin.training.loss import LOSSES, Batch, Loss, Sabr
from cure_plugin.training.losses import SetLoss, clean_loss
from cure_plugin.training.regularizer import warmup_regularizer
from cure_plugin.training.shrinking import relu_shrinking
from cure_plugin.training.strategies import STRATEGIES, Max, Strategy, random_partition
from cure_plugin.training.world import ALONE, Share, World


@dataclass(frozen=True)
class TrainingSet:
    """A set to train for, and how.

    Attributes:
        perturbation: the set.
        loss: an object such as ``Sabr(0.4)``, or the name of one in :data:`LOSSES` that needs no option.
        attack_step: first step of the attack relative to the set's size; default: the set's own.
        every: it is looked at once in so many steps.
        ratio, mix: options of a loss that is given by name, as up to version 0.1; deprecated.

    Raises:
        SpecError: an unknown loss, an option out of range, or a set that the loss does not fit.
    """

    perturbation: PerturbationSet
    loss: Loss | str | float = field(default_factory=Sabr)
    attack_step: float | None = None
    every: int = 1
    ratio: InitVar[float | None] = None
    mix: InitVar[float | None] = None

    def __post_init__(self, ratio: float | None, mix: float | None) -> None:
        check_type("perturbation", self.perturbation, PerturbationSet, "a cure_plugin set")
        try:
            object.__setattr__(self, "loss", _loss(self.loss, ratio, mix))
        except SpecError as error:
            raise SpecError(f"{self.perturbation.name}: {error}") from error
        self.kind.check(self.perturbation)
        if self.attack_step is not None:
            check_number(f"attack_step of {self.perturbation.name}", self.attack_step, zero=False)
        check_count(f"every of {self.perturbation.name}", self.every, 1)

    @property
    def kind(self) -> Loss:
        """The loss as an object."""
        return cast(Loss, self.loss)

    def needs_attack(self) -> bool:
        """Whether the loss depends on an attack at all."""
        return self.kind.needs_attack(self.perturbation)


def _loss(given: Any, ratio: float | None, mix: float | None) -> Loss:
    """The loss that arguments describe, those of version 0.1 included: a number for SABR's ratio, options apart."""
    if is_number(given):
        given, ratio = "sabr", given
    if isinstance(given, Loss):
        if ratio is None and mix is None:
            return given
        if given != Sabr():
            raise SpecError(f"ratio and mix are options of losses that are given by name, got them beside {given!r}")
        given = "sabr"
    options = {key: value for key, value in (("ratio", ratio), ("mix", mix)) if value is not None}
    if ratio == 1 and "ratio" not in LOSSES.options(given):  # said of every loss in version 0.1
        del options["ratio"]
    loss = LOSSES.make(given, options)
    if options:
        warnings.warn(
            f"TrainingSet(..., {', '.join(options)}) will go: give the loss as an object, {loss!r}",
            DeprecationWarning,
            stacklevel=4,
        )
    return loss


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


class _Asked:
    """What a batch asks of one set: the ``whole`` region, and this process's share of it and of the labels."""

    def __init__(self, whole: Region, labels: Tensor, share: Share) -> None:
        self.whole, self.share = whole, share
        self.region, self.labels = share.of_region(whole), share.of(labels)


@dataclass(frozen=True)
class CureObjective:
    """CURE's loss as a callable for any training loop: ``objective(bounded, model, x, y).loss.backward()``.

    All attacks are made together, one backward pass a step. Then the sets are bounded one after
    the other.

    Attributes:
        sets: the sets to train for, at least one.
        strategy: an object such as ``Max()`` or ``Joint([1, 2])``, or the name of one in :data:`STRATEGIES`.
        alignment: weight of bound alignment (the paper's lbd); 0 switches it off.
        align_from: name of the set q (``l2``, or ``l2=0.5`` where several are l2 balls) whose certified samples (by the
            elided vectors that the losses are made of) are aligned to the others, the mean over those; ``weaker``
            takes the set with fewer certified samples in the batch, ``both`` the sum over every set in turn.
        regularizer: weight of the warm-up regulariser at the start of annealing; it falls to 0 with it. It watches
            the bounds of the first linf set, of the first set with bounds if there is none.
        natural: share of the natural loss in [0, 1), the rest is that of the sets.
        attack_steps: PGD steps that look for each region.
        relu_shrink: factor on the upper bounds of crossing ReLUs, see :func:`relu_shrinking`.
        amp, channels_last: of the attacks, see :class:`AttackNet`.
        world: processes that share a batch out; each is given all of it, see :class:`ObjectiveModule`.

    Raises:
        SpecError: an unknown strategy or set name, or alignment with a strategy that bounds each sample for one set
            only.
    """

    sets: Sequence[TrainingSet]
    strategy: Strategy | str = field(default_factory=Max)
    weights: InitVar[Sequence[float] | None] = None
    alignment: float = 0.0
    align_from: str = "weaker"
    regularizer: float = 0.0
    natural: float = 0.0
    attack_steps: int = 8
    relu_shrink: float = 1.0
    amp: bool = False
    channels_last: bool = False
    world: World = ALONE
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self, weights: Sequence[float] | None) -> None:
        check_type("sets", self.sets, (list, tuple), "a list of TrainingSet(perturbation, ...)")
        for entry in self.sets:
            check_type("sets", entry, TrainingSet, "a list of TrainingSet(perturbation, ...)")
        object.__setattr__(self, "names", tuple(distinct_names([s.perturbation for s in self.sets])))
        object.__setattr__(self, "strategy", _strategy(self.strategy, weights))
        self.combination.check(self.names)
        if self.align_from not in ("weaker", "both", *self.names):
            raise SpecError(f"align_from must be weaker, both or one of {list(self.names)}, got {self.align_from!r}")
        if not 0 <= self.alignment < math.inf or (self.alignment > 0 and len(self.sets) < 2):
            raise SpecError(f"alignment must be finite, >= 0 and needs two sets, got {self.alignment!r}")
        check_number("regularizer", self.regularizer)
        check_number("natural", self.natural, 1)
        if self.natural == 1:
            raise SpecError("natural must be below 1, or nothing is trained for the sets; leave them out")
        seldom = [name for name, entry in zip(self.names, self.sets, strict=True) if entry.every > 1]
        if seldom and (self.alignment > 0 or self.combination.divides or len(seldom) == len(self.sets)):
            raise SpecError(
                f"every of {', '.join(seldom)}: alignment and strategies that divide the batch need all sets at each "
                "step, and one set must be there at each; leave every out"
            )
        if self.alignment > 0 and self.combination.divides:
            raise SpecError(
                f"alignment needs every sample bounded for every set; {STRATEGIES.name_of(self.combination)} bounds "
                "each for one"
            )
        check_count("attack_steps", self.attack_steps, 1)
        check_number("relu_shrink", self.relu_shrink, 1, zero=False)

    @property
    def combination(self) -> Strategy:
        """The strategy as an object."""
        return cast(Strategy, self.strategy)

    def __call__(
        self,
        bounded: BoundedModule,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        step: int = 0,
    ) -> Outcome:
        """The loss of one batch.

        Args:
            bounded: auto_LiRPA's wrapper of ``model``, sharing its parameters.
            x, y: clean inputs (B, *input) in the sets' domain and labels (B,).
            scale: relative size of all sets, for annealing; in [0, 1].
            generator: of the attacks' random starts and the random partition.
            step: number of the batch, for sets that are not looked at each time.

        Raises:
            SpecError: a scale outside [0, 1], inputs that are no finite float batch, or a net that has diverged.
        """
        check_type("bounded", bounded, BoundedModule, "what bounded_module(model, shape) returns")
        check_number("scale", scale, 1)
        check_batch(x)  # before BatchNorm's running statistics take anything in
        check_pair(x, y, model)
        check_generator(generator)
        self.world.check(model)
        if self.combination.divides:
            parts = random_partition(x.shape[0], len(self.sets), generator)
            chosen = [k for k, part in enumerate(parts) if len(part)]  # a batch may be smaller than the number of sets
            inputs = {k: (x[parts[k].to(x.device)], y[parts[k].to(x.device)]) for k in chosen}
        else:
            inputs = {k: (x, y) for k, entry in enumerate(self.sets) if step % entry.every == 0}
        asked = {
            k: _Asked(self.sets[k].perturbation.scaled(scale).around(some), labels, self.world.share(len(some)))
            for k, (some, labels) in inputs.items()
        }
        variables = self._attack(model, asked, generator)
        statistics = clean_statistics(bounded, model, x)
        watched = self._watched(asked) if self.regularizer > 0 and scale < 1 else None
        results: dict[int, SetLoss] = {}
        penalty = x.new_zeros(())
        for k, one in asked.items():
            with normalising_by(statistics), relu_shrinking(bounded, self.relu_shrink):
                found = self.sets[k].kind.of(Batch(bounded, model, one.region, one.labels, variables[k]))
                results[k] = SetLoss(*map(one.share.all, found))
            if k == watched:
                penalty = warmup_regularizer(bounded, _input_width(bounded, model), one.share)
        penalty = self.regularizer * (1 - scale) * penalty
        aligned = self._alignment(list(results.values()))
        loss = self.combination.combine([result.values for result in results.values()]) + self.alignment * aligned
        if self.natural > 0:
            share = self.world.share(len(x))
            plain = share.all(clean_loss(model, share.of(x), share.of(y)).values)
            loss = (1 - self.natural) * loss + self.natural * plain.mean()
        return Outcome(loss + penalty, self._figures(results, aligned, penalty))

    def restart(self, bounded: BoundedModule) -> None:
        """Forget what losses keep from step to step: what follows depends on the weights alone, as after a resume."""
        for entry in self.sets:
            entry.kind.restart(bounded)

    def _attack(
        self,
        model: nn.Module,
        asked: dict[int, _Asked],
        generator: torch.Generator | None,
    ) -> dict[int, Tensor]:
        """An attack variable per set: where the attacks, made together, ended, or the start where none is needed."""
        attacked = [k for k in asked if self.sets[k].needs_attack()]
        order = [*(k for k in asked if k not in attacked), *attacked]
        variables = {k: asked[k].share.of(asked[k].whole.random_start(generator)) for k in order}
        if attacked:
            jobs = [(asked[k].region.x, asked[k].labels, asked[k].region.perturbation) for k in attacked]
            steps = [self.sets[k].attack_step or self.sets[k].perturbation.attack_step for k in attacked]
            starts = [variables[k] for k in attacked]
            net = AttackNet(model, self.amp, self.channels_last)
            search = Pgd(self.attack_steps)
            found = pgd_variables(net, jobs, search, best=False, first_steps=steps, starts=starts)
            variables.update((k, variable) for k, (variable, _) in zip(attacked, found, strict=True))
            diverged = not all(all_finite(variables[k]) for k in attacked)
            if self.world.any(diverged, jobs[0][0]):
                raise SpecError(
                    "the net's logits or gradients are not finite: training has diverged; lower the learning rate "
                    "(learning_rate of a recipe) or grow the sets more slowly (ramp_epochs)"
                )
        return variables

    def _watched(self, asked: dict[int, _Asked]) -> int | None:
        """The set whose bounds the warm-up regulariser looks at."""
        bounding = [k for k in asked if self.sets[k].kind.bounds]
        return min(bounding, key=lambda k: (self.sets[k].perturbation.name != "linf", k), default=None)

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
            if self.sets[k].kind.certifies:
                means[f"region_certified.{self.names[k]}"] = certified(result.vector).to(aligned).mean()
        values = torch.stack([value.detach() for value in means.values()]).tolist()  # one transfer from the device
        return dict(zip(means, values, strict=True))


def _strategy(given: Any, weights: Sequence[float] | None) -> Strategy:
    """The strategy that arguments describe, those of version 0.1 included: ``weights=`` beside a name."""
    if not weights:
        return given if isinstance(given, Strategy) else STRATEGIES.make(given)
    if isinstance(given, Strategy) or "weights" not in STRATEGIES.options(given):
        raise SpecError(f"weights are for strategy joint, got {weights!r} with {given!r}")
    strategy = STRATEGIES.make(given, {"weights": weights})
    warnings.warn(
        f"CureObjective(..., weights) will go: give the strategy as an object, {strategy!r}",
        DeprecationWarning,
        stacklevel=4,
    )
    return strategy


def _input_width(bounded: BoundedModule, model: nn.Module) -> Tensor:
    """Widths of the box that was last bounded, as the first layer with weights to learn sees it."""
    lower, upper = next(node for node in bounded.modules() if type(node).__name__ == "BoundInput").interval[:2]
    first = next(model.children(), None)
    return first(upper) - first(lower) if isinstance(first, Normalize) else upper - lower
