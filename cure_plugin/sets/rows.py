"""One view of the linear functions that auto_LiRPA asks a set to bound: rows over local coordinates.

auto_LiRPA hands ``concretize`` a dense matrix, a ``Patches`` object (each row touches one window of the
image) or a lazy identity; the exact first layer adds "the rows of a convolution". Each becomes
coefficients (..., K) plus a way to pick the K input values that a row touches. Padding picks 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from auto_LiRPA.patches import Patches, inplace_unfold
from torch import Tensor

from cure_plugin.compat import patch_bounds_are_flat

Pair = tuple[int, int]


def pair(values: Sequence[int]) -> Pair:
    """Two whole numbers, as (vertical, horizontal), of what may be a list, a tensor's shape or numpy integers."""
    first, second = values
    return int(first), int(second)


@dataclass(frozen=True)
class Rows:
    """Linear functions of the input.

    Attributes:
        coefficients: (..., K), broadcastable against what ``pick`` returns.
        pick: maps an image-shaped tensor (B, *input) to the values each row touches, (..., K).
        per_sample: maps a tensor (B,) to (..., 1), broadcastable against the coefficients.
        restore: maps a result (...) to the layout that auto_LiRPA expects.
        window: the input shape whose product is K: the whole input, or the (c, kh, kw) a row sees.
        extent: how many neighbouring window entries a run of so many pixels covers at most.
        whole: every row sees the whole input, entry by entry in its order.
    """

    coefficients: Tensor
    pick: Callable[[Tensor], Tensor]
    per_sample: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]
    window: tuple[int, ...]
    extent: Callable[[int], int] = int
    whole: bool = False

    def negated(self) -> Rows:
        """The rows times -1: a maximum is minus their minimum."""
        return replace(self, coefficients=-self.coefficients)


def rows_of_matrix(matrix: Tensor, input_shape: tuple[int, ...]) -> Rows:
    """Rows of a dense matrix (B, S, *input) or (B, S, K); results have shape (B, S)."""
    return Rows(
        matrix.flatten(2),
        pick=lambda image: image.flatten(1).unsqueeze(1),
        per_sample=lambda value: value.view(-1, 1, 1),
        restore=lambda result: result,
        window=input_shape,
        whole=True,
    )


def rows_of_patches(patches: Patches) -> Rows:
    """Rows of auto_LiRPA's ``Patches``: dense (out_c, B, h, w, c, kh, kw) or sparse (rows, B, c, kh, kw)."""
    values = patches.patches

    def unfold(image: Tensor) -> Tensor:
        return inplace_unfold(
            image.contiguous(),
            kernel_size=values.shape[-2:],
            stride=patches.stride,
            padding=patches.padding,
            inserted_zeros=patches.inserted_zeros,
            output_padding=patches.output_padding,
        )

    window = tuple(values.shape[-3:])

    def extent(pixels: int) -> int:
        return (pixels - 1) * (patches.inserted_zeros + 1) + 1

    if patches.unstable_idx is None:
        flat = patch_bounds_are_flat()
        return Rows(
            values.flatten(-3),
            pick=lambda image: unfold(image).flatten(-3).unsqueeze(0),
            per_sample=lambda value: value.view(1, -1, 1, 1, 1),
            restore=lambda result: result.transpose(0, 1).flatten(1) if flat else result.transpose(0, 1),
            window=window,
            extent=extent,
        )
    _, across, down = patches.unstable_idx
    return Rows(
        values.flatten(-3),
        pick=lambda image: unfold(image)[:, across, down].flatten(-3).transpose(0, 1),
        per_sample=lambda value: value.view(1, -1, 1),
        restore=lambda result: result.transpose(0, 1),
        window=window,
        extent=extent,
    )


def rows_of_convolution(weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, output_size: Pair) -> Rows:
    """Rows of a convolution with kernel ``weight`` (M, c, kh, kw); results have shape (B, M, h, w)."""

    def pick(image: Tensor) -> Tensor:
        columns = F.unfold(image, weight.shape[-2:], dilation, padding, stride)
        return columns.transpose(1, 2).unsqueeze(0)

    def restore(result: Tensor) -> Tensor:
        return result.transpose(0, 1).unflatten(2, output_size)

    return Rows(
        weight.flatten(1)[:, None, None, :],
        pick=pick,
        per_sample=lambda value: value.view(1, -1, 1, 1),
        restore=restore,
        window=tuple(weight.shape[1:]),
        extent=lambda pixels: -(-pixels // min(dilation)),
    )


def rows_of_linear(weight: Tensor, input_shape: tuple[int, ...]) -> Rows:
    """Rows of a fully connected layer with ``weight`` (M, K) over the flattened input; results have shape (B, M)."""
    return rows_of_matrix(weight.unsqueeze(0), input_shape)


def dot(rows: Rows, image: Tensor) -> Tensor:
    """``coefficients . pick(image)`` for every row, without the product's temporary where that is easy."""
    picked = rows.pick(image)
    if rows.coefficients.ndim == 3 and picked.shape[-2] == 1:
        return torch.matmul(rows.coefficients, picked.transpose(-1, -2)).squeeze(-1)
    return (rows.coefficients * picked).sum(-1)
