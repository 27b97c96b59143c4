"""Branch and bound over the pieces of a set: transformation parameters, patch positions, and at last neurons."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from cure_plugin.attacks import Pgd, pgd, worst_margin_loss
from cure_plugin.bounds.margins import LayerBounds
from cure_plugin.certification.branch_and_bound import BranchAndBound
from cure_plugin.certification.method import METHODS, Found, Method, Work
from cure_plugin.checks import check_count, check_number
from cure_plugin.errors import SpecError
from cure_plugin.progress import Watch, unwatched
from cure_plugin.sets import PerturbationBox, PerturbationSet

Prove = Callable[[Tensor, Tensor, PerturbationSet, str, LayerBounds | None], Found]
"""(x (B, *input), y (B,), set, name of a method, what is known of layers) -> what the method finds."""

Refute = Callable[[Tensor, Tensor, PerturbationSet], Tensor | None]
"""(x (B, *input), y (B,), set) -> a misclassified point (*input) of one of the images' sets, or None."""

Finish = Callable[[Tensor, Tensor, PerturbationSet, LayerBounds | None], "SplitResult"]
"""(x (1, *input), y (1,), a piece without parts, what is known of layers) -> what is found of it."""


@dataclass(frozen=True)
class Steps:
    """What is done with pieces: bound them, attack those that no method proves, decide those that have no parts.

    Attributes:
        watch: told what is going on.
    """

    prove: Prove
    attack: Refute
    finish: Finish
    watch: Watch = unwatched


_COSTLY_PIECES = 4
"""Pieces handed to the later, costly methods at a time: few, as one of them may settle the image."""


_ATTACK = Pgd(10, worst_margin_loss)
"""On the pieces that no method proves."""


@METHODS.register("splitting")
@dataclass(frozen=True)
class Splitting(Method):
    """Branch and bound over the pieces of geometric and patch sets, in place of alpha-CROWN.

    Where a piece has no parts, as a patch at one position, neurons are split over its box, see :class:`BranchAndBound`.

    Attributes:
        pieces: that may be bounded per image.
        seconds: for splits of neurons, an image, at most.
    """

    supersedes: ClassVar[tuple[str, ...]] = ("alpha-CROWN",)

    pieces: int = 1000
    seconds: float = 15.0

    def __post_init__(self) -> None:
        check_count("pieces", self.pieces, 1)
        check_number("seconds", self.seconds, zero=False)

    def applies_to(self, perturbation: PerturbationSet) -> bool:
        return bool(perturbation.split_methods)

    def run(self, work: Work) -> Found:
        results = []
        for index in torch.arange(len(work.x)).split(1):
            results.append(self.split(work.select(index)))
        points, margins = work.x.clone(), [result.margin for result in results]
        for index, result in enumerate(results):
            if result.counterexample is not None:
                points[index] = result.counterexample
                margins[index] = float(_margins(work, points[index : index + 1], work.y[index : index + 1]))
        return Found(
            torch.tensor(margins),
            torch.tensor([result.proved for result in results]),
            torch.tensor([result.counterexample is not None for result in results]),
            points,
            pieces=torch.tensor([result.pieces for result in results]),
            depth=torch.tensor([result.depth for result in results]),
        )

    def split(self, work: Work) -> SplitResult:
        """What splitting finds of a single image, (1, *input)."""
        starts = work.generator or torch.Generator(work.x.device).manual_seed(0)

        def prove(x: Tensor, y: Tensor, pieces: PerturbationSet, method: str, known: LayerBounds | None) -> Found:
            region = pieces.around(x)
            found = METHODS.make(method).run(Work(bounder=work.bounder, region=region, y=y, known=known))
            if found.layers is None or bool(found.proved.all()):  # nothing that parts could use, or no parts
                return found
            return replace(found, layers=work.bounder.widened(region, found.layers))

        def attack(x: Tensor, y: Tensor, pieces: PerturbationSet) -> Tensor | None:
            points = pgd(work.bounder.net, x, y, pieces, _ATTACK, starts)
            margin, worst = _margins(work, points, y).min(0)
            return points[worst] if margin <= 0 else None

        steps = Steps(prove, attack, self._finisher(work), work.watch)
        return prove_by_splitting(steps, work.x, work.y, work.perturbation, self.pieces, work.bounder.batch_size)

    def _finisher(self, work: Work) -> Finish:
        """Splits of neurons over the boxes of pieces, until the seconds for the image are spent."""
        left = self.seconds

        def finish(x: Tensor, y: Tensor, piece: PerturbationSet, known: LayerBounds | None) -> SplitResult:
            nonlocal left
            started = time.monotonic()
            if left <= 0 or work.bounder.affine() is None:
                return SplitResult(False, 0, -math.inf)
            region = PerturbationBox(*piece.box(x.double())).around(x)
            one = Work(bounder=work.bounder, region=region, y=y, known=known, watch=work.watch)
            found, point = BranchAndBound(left).search(one)
            left -= time.monotonic() - started
            if point is not None:
                point = piece.project(x, point[None].to(x))  # the box may be larger
                point = point[0] if _margins(work, point, y) <= 0 else None
            return SplitResult(found.proved, found.nodes, found.margin, point, found.depth)

        return finish


def _margins(work: Work, points: Tensor, y: Tensor) -> Tensor:
    """z_y - max over j != y of z_j at ``points`` (B, *input), (B,)."""
    with torch.no_grad():
        return -worst_margin_loss(work.bounder.net(points), y)


@dataclass(frozen=True)
class SplitResult:
    """What splitting found for one image.

    Attributes:
        proved: every piece is proved.
        pieces: how many pieces, and subdomains of neurons, were bounded in all.
        margin: a lower bound over the whole set: the smallest of the pieces that were not split further.
        counterexample: a misclassified point (*input) of the set, if one was found.
        depth: the most splits that a piece took.
    """

    proved: bool
    pieces: int
    margin: float
    counterexample: Tensor | None = None
    depth: int = 0


@dataclass(frozen=True, order=True)
class _Open:
    """A piece not yet proved.

    Attributes:
        bound: its best. method: index of the next one. tie: makes the order total.
        known: bounds of layers over the piece, or over one that it is a part of. depth: splits that led to it.
    """

    bound: float
    method: int
    tie: int
    piece: PerturbationSet = field(compare=False)
    known: LayerBounds | None = field(compare=False, default=None)
    depth: int = field(compare=False, default=0)


def prove_by_splitting(
    steps: Steps,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    budget: int,
    batch_size: int,
) -> SplitResult:
    """Bound the set in pieces; split what no method proves, until all is proved or hope is lost.

    The pieces with the worst bounds come first, so an image that cannot be proved is found out early: at
    a counterexample in a piece that no method proves, or at a piece that cannot be split further.

    Args:
        steps: of which ``prove`` is given one of the set's ``split_methods``, the cheapest of which comes first, and
            what was found of the layers over larger pieces.
        x: one image (1, *input); y: its label (1,).
        budget: pieces to bound at most, beside what ``finish`` bounds. batch_size: pieces to bound at a time.

    Raises:
        SpecError: the set's partition is empty.
    """
    methods = perturbation.split_methods
    tie = itertools.count()
    pending = [_Open(-math.inf, 0, next(tie), piece) for piece in perturbation.partition(x)]
    if not pending:
        raise SpecError(f"{perturbation!r} has an empty partition; a partition must cover the set")
    pieces, nodes, depth, smallest = 0, 0, 0, math.inf

    def result(proved: bool, margin: float, counterexample: Tensor | None = None) -> SplitResult:
        return SplitResult(proved, pieces + nodes, margin, counterexample, depth)

    while pending:
        method = pending[0].method
        count = batch_size if method == 0 else min(_COSTLY_PIECES, batch_size)
        chosen = [heapq.heappop(pending)]
        while pending and pending[0].method == method and len(chosen) < count:
            chosen.append(heapq.heappop(pending))
        if method == 0:
            if pieces + len(chosen) > budget:
                return result(False, chosen[0].bound)
            pieces += len(chosen)
            steps.watch(pieces + nodes, chosen[0].bound)
            depth = max(depth, *(one.depth for one in chosen))
        chosen, proved = _bounded(steps.prove, x, y, chosen, methods[method])
        lowest = min(smallest, *(one.bound for one in (*chosen, *pending)))
        failed = [one.piece for one, done in zip(chosen, proved, strict=True) if not done]
        if failed and method + 1 == len(methods):
            found = steps.attack(*_batch(x, y, failed))
            if found is not None:
                return result(False, lowest, found)
        for one, done in zip(chosen, proved, strict=True):
            if done:
                smallest = min(smallest, one.bound)
            elif method + 1 < len(methods):
                heapq.heappush(pending, replace(one, method=method + 1, tie=next(tie)))
            else:
                children = one.piece.split(x)
                if not children:
                    last = steps.finish(x, y, one.piece, one.known)
                    nodes, depth = nodes + last.pieces, max(depth, one.depth + last.depth)
                    if not last.proved:
                        return result(False, lowest, last.counterexample)
                    smallest = min(smallest, last.margin)
                for child in children:
                    heapq.heappush(pending, _Open(one.bound, 0, next(tie), child, one.known, one.depth + 1))
    return result(True, smallest)


def _bounded(
    prove: Prove, x: Tensor, y: Tensor, chosen: Sequence[_Open], method: str
) -> tuple[list[_Open], list[bool]]:
    """Several pieces of one image's set with what ``method`` found of them, and which of them are proved."""
    before = [one.known for one in chosen if one.known]
    known = LayerBounds.join(before) if len(before) == len(chosen) else None
    found = prove(*_batch(x, y, [one.piece for one in chosen]), method, known)
    bounded = []
    for index, (one, bound) in enumerate(zip(chosen, found.margins.tolist(), strict=True)):
        best = one.bound if math.isnan(bound) else max(bound, one.bound)
        layers = found.layers.select(torch.tensor([index])) if found.layers else one.known
        bounded.append(replace(one, bound=best, known=layers))
    return bounded, found.proved.tolist()


def _batch(x: Tensor, y: Tensor, pieces: Sequence[PerturbationSet]) -> tuple[Tensor, Tensor, PerturbationSet]:
    """One image and label repeated for several pieces of its set, and these as one set."""
    stacked = pieces[0].stack(pieces) if len(pieces) > 1 else pieces[0]
    return x.expand(len(pieces), *x.shape[1:]), y.expand(len(pieces)), stacked
