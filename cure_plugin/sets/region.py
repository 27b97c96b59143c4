"""A set around given images: what attacks, losses and bounds work on."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from auto_LiRPA import BoundedTensor
from torch import Tensor

from cure_plugin.sets.rows import Rows

if TYPE_CHECKING:
    from cure_plugin.sets.base import PerturbationSet


class OfRegion:
    """What asks something of a region, and is read as if it held images and set itself."""

    region: Region

    @property
    def x(self) -> Tensor:
        """The images (B, *input)."""
        return self.region.x

    @property
    def perturbation(self) -> PerturbationSet:
        """The set."""
        return self.region.perturbation


class Region:
    """The inputs that a set allows around each image of a batch, as ``perturbation.around(x)`` makes it.

    The images were checked then, and are not checked again. Every method is the set's own of that name, see
    :class:`~cure_plugin.sets.PerturbationSet`.

    Attributes:
        perturbation: the set. x: the images (B, *input).
    """

    def __init__(self, perturbation: PerturbationSet, x: Tensor) -> None:
        self.perturbation, self.x = perturbation, x

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def box(self) -> tuple[Tensor, Tensor]:
        return self.perturbation.box(self.x)

    @cached_property
    def radii(self) -> tuple[Tensor, Tensor]:
        return self.perturbation.radii(self.x)

    def bounded_tensor(self) -> BoundedTensor:
        """What auto_LiRPA's ``compute_bounds`` takes."""
        return BoundedTensor(self.x, self.perturbation)

    def deviation(self, rows: Rows) -> Tensor:
        return self.perturbation.deviation(self.x, rows)

    def project(self, point: Tensor) -> Tensor:
        return self.perturbation.project(self.x, point)

    def contains(self, point: Tensor, tolerance: float = 1e-6) -> Tensor:
        return self.perturbation.contains(self.x, point, tolerance)

    def random_start(self, generator: torch.Generator | None = None) -> Tensor:
        return self.perturbation.random_start(self.x, generator)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.perturbation.sample(self.x, generator)

    def decode(self, variable: Tensor) -> Tensor:
        return self.perturbation.decode(self.x, variable)

    def ascend(self, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        return self.perturbation.ascend(self.x, variable, gradient, step)

    def leap(self, variable: Tensor, gradient: Tensor, share: float) -> Tensor:
        return self.perturbation.leap(self.x, variable, gradient, share)

    def small_region(self, variable: Tensor, ratio: float) -> Region:
        centre, inner = self.perturbation.small_region(self.x, variable, ratio)
        return Region(inner, centre)

    def select(self, index: Tensor) -> Region:
        """Of the images ``index`` (int64) alone."""
        return Region(self.perturbation.select(self.x, index), self.x[index])

    def on(self, device: torch.device | str) -> Region:
        """The same on another device."""
        return Region(self.perturbation.on(device), self.x.to(device))

    def parts(self) -> tuple[Region, ...]:
        return tuple(Region(part, self.x) for part in self.perturbation.parts())
