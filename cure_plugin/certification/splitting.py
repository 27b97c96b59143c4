"""Branch and bound over the pieces of a set: transformation parameters, patch positions."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cure_plugin.errors import SpecError
from cure_plugin.sets import PerturbationSet

Prove = Callable[[Tensor, Tensor, PerturbationSet, str], tuple[Tensor, Tensor]]
"""(x (B, *input), y (B,), set, method) -> (lower bound of each image's smallest margin, whether it is a proof), (B,)
each."""

Attack = Callable[[Tensor, Tensor, PerturbationSet], Tensor | None]
"""(x (B, *input), y (B,), set) -> a misclassified point (*input) of one of the images' sets, or None."""

_COSTLY_PIECES = 4
"""Pieces handed to the later, costly methods at a time: few, as one of them may settle the image."""


@dataclass(frozen=True)
class SplitResult:
    """What splitting found for one image.

    Attributes:
        proved: every piece is proved.
        pieces: how many pieces were bounded in all.
        margin: a lower bound over the whole set: the smallest of the pieces that were not split further.
        counterexample: a misclassified point (*input) of the set, if one was found.
    """

    proved: bool
    pieces: int
    margin: float
    counterexample: Tensor | None = None


@dataclass(frozen=True, order=True)
class _Open:
    """A piece not yet proved: its best bound, the index of the next method, and what makes the order total."""

    bound: float
    method: int
    tie: int
    piece: PerturbationSet = field(compare=False)


def prove_by_splitting(
    prove: Prove,
    attack: Attack,
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
        prove: bounds pieces by one of the set's ``split_methods``, the cheapest of which comes first.
        attack: tried on pieces that no method proves.
        x: one image (1, *input); y: its label (1,).
        budget: pieces to bound at most. batch_size: pieces to bound at a time.

    Raises:
        SpecError: the set's partition is empty.
    """
    methods = perturbation.split_methods
    tie = itertools.count()
    pending = [_Open(-math.inf, 0, next(tie), piece) for piece in perturbation.partition(x)]
    if not pending:
        raise SpecError(f"{perturbation!r} has an empty partition; a partition must cover the set")
    pieces, smallest = 0, math.inf
    while pending:
        method = pending[0].method
        count = batch_size if method == 0 else min(_COSTLY_PIECES, batch_size)
        chosen = [heapq.heappop(pending)]
        while pending and pending[0].method == method and len(chosen) < count:
            chosen.append(heapq.heappop(pending))
        pieces += len(chosen) if method == 0 else 0
        if pieces > budget:
            return SplitResult(False, pieces - len(chosen), chosen[0].bound)
        bounds, proved = _bounds(prove, x, y, chosen, methods[method])
        lowest = min(smallest, *bounds, *(other.bound for other in pending))
        failed = [one.piece for one, done in zip(chosen, proved, strict=True) if not done]
        if failed and method + 1 == len(methods):
            found = attack(*_batch(x, y, failed))
            if found is not None:
                return SplitResult(False, pieces, lowest, found)
        for one, bound, done in zip(chosen, bounds, proved, strict=True):
            if done:
                smallest = min(smallest, bound)
            elif method + 1 < len(methods):
                heapq.heappush(pending, _Open(bound, method + 1, next(tie), one.piece))
            else:
                children = one.piece.split(x)
                if not children:
                    return SplitResult(False, pieces, lowest)
                for child in children:
                    heapq.heappush(pending, _Open(bound, 0, next(tie), child))
    return SplitResult(True, pieces, smallest)


def _bounds(prove: Prove, x: Tensor, y: Tensor, chosen: Sequence[_Open], method: str) -> tuple[list[float], list[bool]]:
    """The best lower margins so far of several pieces of one image's set, and which of the pieces are proved."""
    lower, proved = prove(*_batch(x, y, [one.piece for one in chosen]), method)
    pairs = zip(chosen, lower.tolist(), strict=True)
    return [one.bound if math.isnan(bound) else max(bound, one.bound) for one, bound in pairs], proved.tolist()


def _batch(x: Tensor, y: Tensor, pieces: Sequence[PerturbationSet]) -> tuple[Tensor, Tensor, PerturbationSet]:
    """One image and label repeated for several pieces of its set, and these as one set."""
    stacked = pieces[0].stack(pieces) if len(pieces) > 1 else pieces[0]
    return x.expand(len(pieces), *x.shape[1:]), y.expand(len(pieces)), stacked
