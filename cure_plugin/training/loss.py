"""Losses of one set as objects: each says what it needs, whom it fits, and what it makes of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from auto_LiRPA import BoundedModule
from torch import Tensor, nn

from cure_plugin.bounds.lipschitz import kept_norms
from cure_plugin.checks import check_count, check_number, check_type
from cure_plugin.errors import SpecError
from cure_plugin.registry import Registry
from cure_plugin.sets import PerturbationLpBall, PerturbationSet, Region
from cure_plugin.sets.region import OfRegion
from cure_plugin.training.losses import (
    SetLoss,
    adversarial_loss,
    blended,
    cc_ibp_loss,
    clean_loss,
    crown_ibp_loss,
    ibp_loss,
    lipschitz_loss,
    mtl_ibp_loss,
    sabr_box_loss,
    sabr_loss,
)


@dataclass(frozen=True)
class Batch(OfRegion):
    """What a loss works on.

    Attributes:
        bounded: auto_LiRPA's wrapper of ``model``, sharing its parameters.
        region: the set, at its present size, around clean inputs (B, *input). y: labels (B,).
        variable: where the attack ended, or a random start where the loss needs none.
    """

    bounded: BoundedModule
    model: nn.Module
    region: Region
    y: Tensor
    variable: Tensor


class Loss(ABC):
    """A loss of one set: a frozen dataclass whose fields are its options, registered in :data:`LOSSES`.

    Attributes:
        bounds: whether it bounds anything (attacks alone do not).
        certifies: whether its elided vector bounds the margins over its region, so that samples can be counted.
    """

    bounds: ClassVar[bool] = True
    certifies: ClassVar[bool] = True

    @abstractmethod
    def of(self, batch: Batch) -> SetLoss:
        """The loss of each sample and the elided vector behind it."""

    def needs_attack(self, perturbation: PerturbationSet) -> bool:
        """Whether it depends on where an attack on the set ends."""
        return True

    def check(self, perturbation: PerturbationSet) -> None:
        """Refuse sets of a kind that it cannot be trained for.

        Raises:
            SpecError: such a set.
        """
        check_type("perturbation", perturbation, PerturbationSet, "a cure_plugin set")

    def try_out(self, perturbation: PerturbationSet, x: Tensor, variable: Tensor) -> None:
        """Refuse a set whose regions cannot be made around inputs like ``x`` (B, *input), before training starts.

        Raises:
            SpecError: such a set.
        """
        perturbation.box(x)

    def restart(self, bounded: BoundedModule) -> None:
        """Forget what was kept from earlier steps with ``bounded``: what follows depends on the weights alone."""
        return


LOSSES: Registry[Loss] = Registry("loss", "cure_plugin.losses")
"""Losses by name; other packages add theirs by the entry-point group ``cure_plugin.losses``."""


@dataclass(frozen=True)
class _OfRegion(Loss):
    """Losses of a region of relative size ``ratio`` in (0, 1] around an attack."""

    ratio: float = 1.0

    def __post_init__(self) -> None:
        try:
            check_number("ratio (lambda)", self.ratio, 1, zero=False)
        except SpecError as error:
            raise SpecError(f"{error}; attacks alone are loss adversarial") from error


@dataclass(frozen=True)
class _Mixed(Loss):
    """Losses mixed of two bounds, or of bounds and an attack; ``mix`` in (0, 1] is the share of the first."""

    mix: float

    def __post_init__(self) -> None:
        check_number("mix", self.mix, 1, zero=False)


@LOSSES.register("sabr")
@dataclass(frozen=True)
class Sabr(_OfRegion):
    """Interval bounds over the set's own small region around an attack, see :func:`sabr_loss`.

    Attributes:
        ratio: lambda, the region's size relative to the set's, in (0, 1]; 1: the whole set.
    """

    def needs_attack(self, perturbation: PerturbationSet) -> bool:
        return perturbation.needs_attack(self.ratio)

    def try_out(self, perturbation: PerturbationSet, x: Tensor, variable: Tensor) -> None:
        perturbation.small_region(x, variable, self.ratio)

    def of(self, batch: Batch) -> SetLoss:
        return sabr_loss(batch.bounded, batch.x, batch.y, batch.perturbation, batch.variable, self.ratio)


@LOSSES.register("sabr-box")
@dataclass(frozen=True)
class SabrBox(_OfRegion):
    """Interval bounds over the paper's box around an attack on an lp ball, see :func:`sabr_box_loss`.

    Attributes:
        ratio: lambda, the box's radius relative to the ball's, in (0, 1].
    """

    def check(self, perturbation: PerturbationSet) -> None:
        if not hasattr(perturbation, "small_box"):
            raise SpecError(f"loss sabr-box takes lp balls, got {perturbation.name}; use sabr")

    def try_out(self, perturbation: PerturbationSet, x: Tensor, variable: Tensor) -> None:
        perturbation.small_box(x, variable, self.ratio)

    def of(self, batch: Batch) -> SetLoss:
        return sabr_box_loss(batch.bounded, batch.x, batch.y, batch.perturbation, batch.variable, self.ratio)


@LOSSES.register("ibp")
@dataclass(frozen=True)
class Ibp(Loss):
    """Interval bounds over the whole set, see :func:`ibp_loss`."""

    def needs_attack(self, perturbation: PerturbationSet) -> bool:
        return False

    def of(self, batch: Batch) -> SetLoss:
        return ibp_loss(batch.bounded, batch.x, batch.y, batch.perturbation)


@LOSSES.register("crown-ibp")
@dataclass(frozen=True)
class CrownIbp(_Mixed):
    """CROWN-IBP's bounds over the whole set, see :func:`crown_ibp_loss`.

    Attributes:
        mix: share of CROWN-IBP's margins in (0, 1], the rest is IBP's.
    """

    mix: float = 1.0

    def needs_attack(self, perturbation: PerturbationSet) -> bool:
        return False

    def of(self, batch: Batch) -> SetLoss:
        return crown_ibp_loss(batch.bounded, batch.x, batch.y, batch.perturbation, self.mix)


@LOSSES.register("mtl-ibp")
@dataclass(frozen=True)
class MtlIbp(_Mixed):
    """A mix of the attack's and the bounds' losses, see :func:`mtl_ibp_loss`.

    Attributes:
        mix: share of the bounds in (0, 1], the rest is adversarial.
    """

    def of(self, batch: Batch) -> SetLoss:
        return mtl_ibp_loss(batch.bounded, batch.model, batch.x, batch.y, batch.perturbation, batch.variable, self.mix)


@LOSSES.register("cc-ibp")
@dataclass(frozen=True)
class CcIbp(_Mixed):
    """The loss of a mix of attacked and bounded elided vectors, see :func:`cc_ibp_loss`.

    Attributes:
        mix: share of the bounds in (0, 1], the rest is adversarial.
    """

    certifies: ClassVar[bool] = False  # the mixed vector lies between the two

    def of(self, batch: Batch) -> SetLoss:
        return cc_ibp_loss(batch.bounded, batch.model, batch.x, batch.y, batch.perturbation, batch.variable, self.mix)


@LOSSES.register("adversarial")
@dataclass(frozen=True)
class Adversarial(Loss):
    """Cross entropy at the attack's point, see :func:`adversarial_loss`."""

    bounds: ClassVar[bool] = False
    certifies: ClassVar[bool] = False

    def try_out(self, perturbation: PerturbationSet, x: Tensor, variable: Tensor) -> None:
        perturbation.decode(x, variable)

    def of(self, batch: Batch) -> SetLoss:
        return adversarial_loss(batch.model, batch.x, batch.y, batch.perturbation, batch.variable)


@LOSSES.register("lipschitz")
@dataclass(frozen=True)
class LipschitzMargin(Loss):
    """Logits moved as far as the layers' norms let them over an lp ball, see :func:`lipschitz_loss`.

    Attributes:
        steps: of power iteration, a batch.
        ratio: of the ball that is trained for, relative to the set's, in (0, 1]: less for a set that binds less than
            others, whose certificates other bounds than norms complete.
    """

    bounds: ClassVar[bool] = False  # of no layer
    certifies: ClassVar[bool] = False  # power iteration comes from below

    steps: int = 2
    ratio: float = 1.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_number("ratio", self.ratio, 1, zero=False)

    def check(self, perturbation: PerturbationSet) -> None:
        super().check(perturbation)
        if not isinstance(perturbation, PerturbationLpBall):
            raise SpecError(f"loss lipschitz takes lp balls, got {perturbation.name}; take another loss for it")

    def needs_attack(self, perturbation: PerturbationSet) -> bool:
        return False

    def of(self, batch: Batch) -> SetLoss:
        return lipschitz_loss(batch.bounded, batch.model, batch.x, batch.y, batch.perturbation, self.steps, self.ratio)

    def restart(self, bounded: BoundedModule) -> None:
        kept_norms(bounded).restart()


@dataclass(frozen=True)
class Blended(Loss):
    """Any loss with a share of a plain one, see :func:`~cure_plugin.training.losses.blended`.

    Attributes:
        loss: of the set. share: its part, in (0, 1]. attacked: whether the rest is at the attack's point, or else at
            the clean inputs. vectors: whether elided vectors are mixed, or else losses.
    """

    loss: Loss
    share: float
    attacked: bool = False
    vectors: bool = False

    def __post_init__(self) -> None:
        check_type("loss", self.loss, Loss, "a loss such as Sabr(0.4)")
        check_number("share", self.share, 1, zero=False)

    @property
    def bounds(self) -> bool:  # type: ignore[override]
        """Whether the set's loss bounds anything."""
        return self.loss.bounds

    @property
    def certifies(self) -> bool:  # type: ignore[override]
        """Whether the vector is one of bounds: a mixed one lies between."""
        return self.loss.certifies and not self.vectors

    def check(self, perturbation: PerturbationSet) -> None:
        self.loss.check(perturbation)

    def try_out(self, perturbation: PerturbationSet, x: Tensor, variable: Tensor) -> None:
        self.loss.try_out(perturbation, x, variable)

    def needs_attack(self, perturbation: PerturbationSet) -> bool:
        return self.attacked or self.loss.needs_attack(perturbation)

    def restart(self, bounded: BoundedModule) -> None:
        self.loss.restart(bounded)

    def of(self, batch: Batch) -> SetLoss:
        if self.attacked:
            plain = adversarial_loss(batch.model, batch.x, batch.y, batch.perturbation, batch.variable)
        else:
            plain = clean_loss(batch.model, batch.x, batch.y)
        return blended(self.loss.of(batch), plain, self.share, self.vectors)
