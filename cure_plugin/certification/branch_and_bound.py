"""Branch and bound over ReLU neurons as a method: lp balls and boxes, nets of linear layers and ReLUs."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from cure_plugin.attacks import worst_margin_loss
from cure_plugin.certification.bounder import Bounder
from cure_plugin.certification.method import METHODS, Found, Method, Work
from cure_plugin.checks import check_count, check_number
from cure_plugin.errors import SpecError
from cure_plugin.relaxation.root import root
from cure_plugin.relaxation.search import Limits, Searched, search
from cure_plugin.relaxation.tighten import tighten, worthwhile
from cure_plugin.relaxation.trace import Trace
from cure_plugin.sets import PerturbationBox, PerturbationLpBall, PerturbationSet

_ROOT, _FIRST, _TIGHTENED = 0.5, 0.15, 0.4
"""Shares of the time: until bounds of wide layers are left as they are; until a search starts again with tighter boxes
of its last layer; until these are made."""

_DESCENT = 60
"""Steps of the attack where a subdomain is convex and still not proved."""


@METHODS.register("branch-and-bound")
@dataclass(frozen=True)
class BranchAndBound(Method):
    """Splits of ReLU neurons, each half bounded by optimised slopes and multipliers (:mod:`cure_plugin.relaxation`).

    It starts from the boxes of layers that earlier methods left, and keeps the budget that pixels share, as
    :class:`Coupled` does. Proofs rest on float64, less what rounding can have added.

    Attributes:
        seconds: an image, at most (what is being bounded then is finished).
        nodes: subdomains bounded an image, at most. batch: subdomains bounded at a time.
    """

    supersedes: ClassVar[tuple[str, ...]] = ("alpha-CROWN",)

    seconds: float = 15.0
    nodes: int = 1_000_000
    batch: int = 128

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, zero=False)
        check_count("nodes", self.nodes, 1)
        check_count("batch", self.batch, 2)

    def applies_to(self, perturbation: PerturbationSet) -> bool:
        return type(perturbation) in (PerturbationBox, PerturbationLpBall)

    def reads(self, bounder: Bounder) -> bool:
        return bounder.affine() is not None

    @torch.no_grad()
    def run(self, work: Work) -> Found:
        count = len(work.y)
        proved, refuted = (torch.zeros(count, dtype=torch.bool) for _ in range(2))
        margins = torch.full((count,), math.nan)
        nodes, depth = torch.zeros(2, count, dtype=torch.long)
        points = work.x.clone()
        for index in range(count):
            one = work.select(torch.tensor([index]))
            found, point = self.search(one)
            proved[index], margins[index] = found.proved, found.margin
            nodes[index], depth[index] = found.nodes, found.depth
            if point is not None:
                points[index], refuted[index] = point, True
                margins[index] = float(-worst_margin_loss(work.bounder.net(points[index : index + 1]), one.y))
        return Found(margins, proved, refuted, points, pieces=nodes, depth=depth)

    @torch.no_grad()
    def search(self, one: Work, trace: Trace | None = None) -> tuple[Searched, Tensor | None]:
        """(what the search finds of a single image, a counterexample (*input) on the CPU if it met one).

        Args:
            trace: takes what a proof rests on.
        """
        one = one.on_cpu()  # of an image's net little is left, of sparse matrices and rows that come and go
        bounder, affine = one.bounder, one.bounder.affine()
        started = time.monotonic()
        try:
            assert affine is not None  # see reads
            hints = one.known.boxes if one.known else {}
            start = root(affine, bounder.bounded, one.region, int(one.y), hints, trace, started + _ROOT * self.seconds)
        except SpecError:  # nothing that could be split is known of it
            return Searched(False, math.nan, 0, 0), None
        reached: list[Tensor] = []

        def is_counterexample(inputs: Tensor, closely: bool) -> bool:
            region = one.region.select(torch.zeros(len(inputs), dtype=torch.long))
            points = region.project(inputs.view(-1, *one.x.shape[1:]).to(one.x))
            for step in range(_DESCENT if closely else 1):
                with torch.enable_grad():
                    points.requires_grad_(closely)
                    losses = worst_margin_loss(bounder.net(points), one.y.expand(len(points)))
                    total = losses.sum()
                worst = int(losses.argmax())
                if losses[worst] >= 0:
                    reached.append(points[worst].detach())
                    return True
                if closely:
                    (gradient,) = torch.autograd.grad(total, points)
                    points = region.ascend(points.detach(), gradient, 0.2 * 0.9**step)
            return False

        def limits(share: float) -> Limits:
            return Limits(share * self.seconds - (time.monotonic() - started), self.nodes, self.batch)

        twice = trace is None and worthwhile(start)
        found = search(start, limits(_FIRST if twice else 1.0), is_counterexample, trace, one.watch)
        if twice and not found.proved and not reached and found.nodes < self.nodes:
            better = tighten(start, limits(_TIGHTENED))
            again = search(better, limits(1.0), is_counterexample, watch=one.watch)
            found = replace(again, nodes=found.nodes + again.nodes, margin=max(found.margin, again.margin))
        return found, reached[-1] if reached else None
