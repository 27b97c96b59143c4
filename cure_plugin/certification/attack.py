"""The attack as a method: what it finds is refuted, and it proves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cure_plugin.attacks import find_counterexample, worst_margin_loss
from cure_plugin.certification.method import METHODS, Found, Method, Work
from cure_plugin.checks import check_count


@METHODS.register("pgd")
@dataclass(frozen=True)
class Attack(Method):
    """See :func:`~cure_plugin.attacks.find_counterexample`.

    Attributes:
        steps, restarts: at least 1 each.
    """

    proves: ClassVar[bool] = False

    steps: int = 40
    restarts: int = 2

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("restarts", self.restarts, 1)

    def run(self, work: Work) -> Found:
        net = work.bounder.net
        found, points = find_counterexample(
            net, work.x, work.y, work.perturbation, self.steps, self.restarts, work.generator
        )
        with torch.no_grad():
            reached = -worst_margin_loss(net(points), work.y)
        margins = torch.where(found, reached, torch.nan).cpu()
        return Found(margins, torch.zeros_like(found).cpu(), found.cpu(), points)
