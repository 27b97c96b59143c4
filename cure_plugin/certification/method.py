"""What a certification method is: it says which sets it is for, and works on what is left of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.bounds.margins import LayerBounds, NodeBox
from cure_plugin.progress import Watch, unwatched
from cure_plugin.registry import Registry
from cure_plugin.sets import PerturbationSet, Region
from cure_plugin.sets.region import OfRegion

if TYPE_CHECKING:
    from typing_extensions import Self

    from cure_plugin.certification.bounder import Bounder


@dataclass(frozen=True, kw_only=True)
class _Question(OfRegion):
    """Are these images classified as ``y`` all over the set?

    Attributes:
        region: the set around images (L, *input). y: their labels (L,).
        known: bounds of layers that an earlier method left, of the same images.
    """

    region: Region
    y: Tensor
    known: LayerBounds | None = None

    def select(self, index: Tensor) -> Self:
        """The same of the images ``index`` alone."""
        known = self.known.select(index) if self.known else None
        return replace(self, region=self.region.select(index), y=self.y[index], known=known)


@dataclass(frozen=True, kw_only=True)
class Work(_Question):
    """The images of a batch that nothing has decided yet.

    Attributes:
        bounder: bounds of the net.
        generator: of random starts.
        watch: of splits.
    """

    bounder: Bounder
    generator: torch.Generator | None = None
    watch: Watch = unwatched

    def on_cpu(self) -> Work:
        """The same on the CPU, without the generator."""
        if self.x.device.type == "cpu":
            return self
        known = self.known.on("cpu") if self.known else None
        bounder, region = self.bounder.on_cpu(), self.region.on("cpu")
        return Work(bounder=bounder, region=region, y=self.y.cpu(), known=known, watch=self.watch)


@dataclass(frozen=True)
class Found:
    """What a method found of the images it was given.

    Attributes:
        margins: lower bounds of the smallest margins, (L,), NaN where there are none; where refuted, the margin at the
            point.
        proved, refuted: (L,) bool. points: (L, *input), misclassified points of the sets where refuted.
        layers: bounds of layers that later methods can use. pieces: how many were bounded, (L,). depth: the most splits
            that one of them took, (L,).
    """

    margins: Tensor
    proved: Tensor
    refuted: Tensor | None = None
    points: Tensor | None = None
    layers: LayerBounds | None = None
    pieces: Tensor | None = None
    depth: Tensor | None = None


class Method(ABC):
    """A step of the cascade: a frozen dataclass whose fields are its options, registered in :data:`METHODS`.

    Attributes:
        proves: whether it can prove anything (attacks cannot).
        supersedes: names of methods that are not tried after this one.
    """

    proves: ClassVar[bool] = True
    supersedes: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """What verdicts call it."""
        return METHODS.name_of(self)

    def __str__(self) -> str:
        options = [f"{key} {getattr(self, key)}" for key in METHODS.options(self.name)]
        return self.name + (f" ({', '.join(options)})" if options else "")

    @abstractmethod
    def run(self, work: Work) -> Found:
        """What it finds of the images that are left."""

    def applies_to(self, perturbation: PerturbationSet) -> bool:
        """Whether it is worth trying on sets of that kind."""
        return True

    def reads(self, bounder: Bounder) -> bool:
        """Whether it can work on that net; asked when it is its turn."""
        return True


METHODS: Registry[Method] = Registry("method", "cure_plugin.methods")
"""Methods by name, in the order that they are tried; other packages add theirs by the group ``cure_plugin.methods``."""


@dataclass(frozen=True, kw_only=True)
class Piece(_Question):
    """Images that are bounded at a time; ``skipped``: rounds of coupled bounds that are known not to be enough."""

    skipped: int = 0


@dataclass(frozen=True)
class PieceBounds:
    """Bounds of a :class:`Piece`.

    Attributes:
        lower: of the smallest margins, (B,). boxes: bounds of the ReLUs' inputs that they rest on, by name.
        layers: what later methods can use.
    """

    lower: Tensor
    boxes: dict[str, NodeBox]
    layers: LayerBounds | None = None


class BoundMethod(Method):
    """A method that bounds whole sets at once: :meth:`bounds` is all that it needs to say."""

    @abstractmethod
    def bounds(self, bounder: Bounder, piece: Piece) -> PieceBounds:
        """Bounds of images that fit memory, as computed: rounding errors are counted by who asks."""

    def bytes_per_image(self, bounded: BoundedModule, itemsize: int) -> int:
        """Upper estimate of what it allocates per image, of numbers of ``itemsize`` bytes; 0: next to nothing."""
        return 0

    def divides(self, bounded: BoundedModule) -> bool:
        """Whether it keeps to the memory asked for where that estimate for a single image is above it."""
        return False

    def run(self, work: Work) -> Found:
        found = work.bounder.bound(Piece(region=work.region, y=work.y, known=work.known), self)
        return Found(found.lower, found.proved, layers=found.layers)
