"""A perturbation set of your own from the ground up: the whole image dimmed by one factor.

Registered under a name, it works in specs (``dim=0.3``), training, certification and on the command line. Attacks move
the factor, one number per image, and ``decode`` makes an image of it. Name this module in the entry-point group
``cure_plugin.sets`` and it is found without an import.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cure_plugin import PerturbationSet, register_perturbation
from cure_plugin.checks import check_number
from cure_plugin.sets.rows import Rows, dot


class PerturbationDimming(PerturbationSet):
    """All images (1 - t) x with t in [0, ``amount``]."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        check_number("amount", amount, 1)
        self.amount = amount
        self.name = f"dim{amount:g}"

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        darkest = (1 - self.amount) * x
        return torch.minimum(x, darkest), torch.maximum(x, darkest)

    def deviation(self, x: Tensor, rows: Rows) -> Tensor:
        return -self.amount * dot(rows, x).clamp(min=0)  # -t (row . x), least at t = 0 or t = amount

    def decode(self, x: Tensor, variable: Tensor) -> Tensor:
        return x * (1 - variable.view(-1, *[1] * (x.ndim - 1)))

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        along, length = ((x * other).flatten(1).sum(1) for other in (x - point, x))
        return self.decode(x, (along / length.clamp(min=1e-12)).clamp(0, self.amount))

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.amount * torch.rand(len(x), generator=generator, dtype=x.dtype).to(x.device)

    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        return (variable + step * self.amount * gradient.sign()).clamp(0, self.amount)

    def scaled(self, factor: float) -> PerturbationDimming:
        return PerturbationDimming(min(1.0, self.amount * factor))

    def small_region(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationSet]:
        width = ratio * self.amount
        return self.decode(x, variable.clamp(max=self.amount - width)), PerturbationDimming(width)

    def __repr__(self) -> str:
        return f"PerturbationDimming({self.amount})"


@register_perturbation("dim", "largest share of the brightness that is lost, 0 to 1, e.g. 0.3")
def build(text: str) -> PerturbationSet:
    return PerturbationDimming(float(text))
