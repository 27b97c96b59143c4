"""Products with a fixed matrix, by the kernels for sparse ones where it is mostly zeros, as convolutions are."""

from __future__ import annotations

import warnings

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
        self._sparse: tuple[Tensor, Tensor] | None = None
        if matrix.numel() > _SMALL and int(matrix.count_nonzero()) < _DENSE * matrix.numel() and _has_sparse():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls the layout a beta
                self._sparse = matrix.T.to_sparse_csr(), matrix.to_sparse_csr()

    def down(self, rows: Tensor) -> Tensor:
        """``rows`` (R, m) @ matrix, (R, n)."""
        return rows @ self._matrix if self._sparse is None else (self._sparse[0] @ rows.T).T.contiguous()

    def up(self, rows: Tensor) -> Tensor:
        """``rows`` (R, n) @ matrix.T, (R, m); or a single one (n,)."""
        if self._sparse is None or rows.ndim == 1:
            return rows @ self._matrix.T
        return (self._sparse[1] @ rows.T).T.contiguous()


def _has_sparse() -> bool:
    """Whether this build of torch multiplies sparse matrices on the CPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool((torch.eye(2).to_sparse_csr() @ torch.ones(2, 1) == 1).all())
    except RuntimeError:
        return False
