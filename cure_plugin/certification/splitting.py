"""Branch and bound over the pieces of a set: transformation parameters, patch positions."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cure_plugin.certification.certifier import Certifier, required_margin
from cure_plugin.sets import PerturbationSet


@dataclass(frozen=True)
class SplitResult:
    """What splitting found for one image.

    Attributes:
        proved: every piece is proved.
        pieces: how many pieces were bounded in all.
        margin: smallest lower bound among the pieces that were not split further.
    """

    proved: bool
    pieces: int
    margin: float


def prove_by_splitting(
    certifier: Certifier,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    methods: Sequence[str] = ("CROWN",),
    budget: int = 1000,
) -> SplitResult:
    """Bound the set; split what is not proved, worst first, until all is proved or hope is lost.

    Args:
        certifier: bounds up to ``batch_size`` pieces at a time.
        x: one image (1, *input); y: its label (1,).
        methods: bound methods tried on a piece, in this order.
        budget: pieces to bound at most.
    """
    with torch.no_grad():
        needed = float(required_margin(certifier.net(x)))
    tie = itertools.count()
    pending = [(0.0, next(tie), piece) for piece in perturbation.partition(x)]
    bounded, smallest = 0, float("inf")
    while pending:
        count = min(len(pending), certifier.batch_size)
        if bounded + count > budget:
            return SplitResult(False, bounded, pending[0][0])
        pieces = [heapq.heappop(pending)[2] for _ in range(count)]
        bounds = _bounds(certifier, x, y, pieces, methods, needed)
        bounded += count
        for piece, bound in zip(pieces, bounds, strict=True):
            if bound > needed:
                smallest = min(smallest, bound)
                continue
            children = piece.split(x)
            if not children:
                return SplitResult(False, bounded, bound)
            for child in children:
                heapq.heappush(pending, (bound, next(tie), child))
    return SplitResult(True, bounded, smallest)


def _bounds(
    certifier: Certifier,
    x: Tensor,
    y: Tensor,
    pieces: Sequence[PerturbationSet],
    methods: Sequence[str],
    needed: float,
) -> list[float]:
    """The best lower margin of each piece; later methods only see what is not proved yet."""
    best = [-float("inf")] * len(pieces)
    for method in methods:
        left = [i for i, bound in enumerate(best) if bound <= needed]
        if not left:
            break
        chosen = [pieces[i] for i in left]
        stacked = chosen[0].stack(chosen) if len(chosen) > 1 else chosen[0]
        repeated = x.expand(len(left), *x.shape[1:])
        for i, bound in zip(left, certifier.lower_bound(repeated, y.expand(len(left)), stacked, method), strict=True):
            best[i] = max(best[i], float(bound))
    return best
