"""A perturbation set of your own: one whole row of pixels may take any value (a dead sensor line).

Registered under a name, it works in specs (``stripe=1``), training, certification and on the command line.
Name this module in the entry-point group ``cure_plugin.sets`` and it is found without an import.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cure_plugin import PerturbationPatch, PerturbationSet, register_perturbation
from cure_plugin.errors import SpecError
from cure_plugin.sets.rows import Rows


class PerturbationStripe(PerturbationSet):
    """All images that differ from x in ``thickness`` neighbouring rows only: a patch as wide as the image."""

    split_methods = PerturbationPatch.split_methods

    def __init__(self, thickness: int) -> None:
        super().__init__()
        if thickness < 1:
            raise SpecError(f"thickness must be at least 1 row, got {thickness!r}")
        self.thickness = thickness
        self.name = f"stripe{thickness}"

    def _patch(self, x: Tensor) -> PerturbationPatch:
        return PerturbationPatch(self.thickness, x.shape[3])

    def deviation(self, x: Tensor, rows: Rows) -> Tensor:
        return self._patch(x).deviation(x, rows)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._patch(x).box(x)

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        return self._patch(x).project(x, point)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self._patch(x).random_start(x, generator)

    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        return self._patch(x).ascend(x, variable, gradient, step)

    def partition(self, x: Tensor) -> tuple[PerturbationSet, ...]:
        return self._patch(x).partition(x)

    def scaled(self, factor: float) -> PerturbationStripe:
        return PerturbationStripe(max(1, -int(-self.thickness * factor // 1)))

    def small_region(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationSet]:
        return self._patch(x).small_region(x, variable, ratio)

    def __repr__(self) -> str:
        return f"PerturbationStripe({self.thickness})"


@register_perturbation("stripe", "thickness in rows, free in [0, 1], e.g. 1")
def build(text: str) -> PerturbationSet:
    return PerturbationStripe(int(text))
