"""A box of parameters cut into a grid of smaller ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cure_plugin.errors import SpecError

Pieces = int | Sequence[int]
"""Equal sub-intervals per spatial parameter: one number for all, or one per spatial parameter."""


def piece_counts(pieces: Pieces, spatial: list[int]) -> list[int]:
    """One number of sub-intervals per spatial parameter."""
    counts = [pieces] * len(spatial) if isinstance(pieces, int) else list(pieces)
    if len(counts) != len(spatial) or any(count < 1 for count in counts):
        raise SpecError(
            f"pieces must be >= 1, one number or one for each of {len(spatial)} spatial parameters: {pieces!r}"
        )
    return counts


def sub_boxes(lower: Tensor, upper: Tensor, spatial: list[int], counts: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The cells (lower, upper), each (B, D), of the grid over the spatial parameters."""
    for cell in itertools.product(*(range(count) for count in counts)):
        low, high = lower.clone(), upper.clone()
        for column, index, count in zip(spatial, cell, counts, strict=True):
            # Both neighbours compute a shared edge by the same expression, so no gap opens between them.
            low[:, column] = _edge(lower[:, column], upper[:, column], index / count)
            high[:, column] = _edge(lower[:, column], upper[:, column], (index + 1) / count)
        yield low, high


def _edge(lower: Tensor, upper: Tensor, share: float) -> Tensor:
    """The point at ``share`` of the way; exactly ``lower`` at 0 and ``upper`` at 1, and never outside them."""
    return torch.minimum(torch.maximum(lower * (1 - share) + upper * share, lower), upper)
