"""Products with a fixed matrix, by the kernels for sparse ones where it is mostly zeros, as convolutions are."""

from __future__ import annotations

import warnings
from functools import cache, cached_property

import torch
from torch import Tensor

_SMALL = 1 << 14
"""Entries below which a dense product takes no time."""

_DENSE = 0.2
"""Share of entries above which a dense product is faster (float32, one thread: break-even at 0.2 to 0.3)."""


class Product:
    """Rows times ``matrix`` (m, n), and times its transpose.

    Sums have as many terms as the dense product's, or fewer.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        small = matrix.numel() <= _SMALL
        self._dense = small or int(matrix.count_nonzero()) >= _DENSE * matrix.numel() or not _has_sparse()

    @cached_property
    def _down(self) -> Tensor:
        return _sparse(self._matrix.T)

    @cached_property
    def _up(self) -> Tensor:
        return _sparse(self._matrix)

    def down(self, rows: Tensor) -> Tensor:
        """``rows`` (R, m) @ matrix, (R, n)."""
        return rows @ self._matrix if self._dense else (self._down @ rows.T).T.contiguous()

    def up(self, rows: Tensor) -> Tensor:
        """``rows`` (R, n) @ matrix.T, (R, m); or a single one (n,)."""
        if self._dense or rows.ndim == 1:
            return rows @ self._matrix.T
        return (self._up @ rows.T).T.contiguous()


def _sparse(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout a beta
        return matrix.to_sparse_csr()


@cache
def _has_sparse() -> bool:
    """Whether this build of torch multiplies sparse matrices on the CPU."""
    try:
        return bool((_sparse(torch.eye(2)) @ torch.ones(2, 1) == 1).all())
    except RuntimeError:
        return False
