"""Upper bounds of operator norms of linear layers: never below the true norm, unlike power iteration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cure_plugin.sets.rows import Pair

_OUTWARD = 1 + 1e-9
"""Relative widening of norms computed in float64."""


def matrix_norm(matrix: Tensor) -> float:
    """Spectral norm of a matrix, rounded outward."""
    wide = matrix.detach().double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()) * _OUTWARD


def convolution_norm(weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, input_size: Pair) -> float:
    """Upper bound of the spectral norm of a zero-padded convolution.

    Cut into its stride's phases, the convolution has stride 1 and more input channels. With zeros all round
    it is a part of a circular convolution on a grid large enough that nothing wraps, whose norm is the
    largest of one small matrix per frequency (Sedghi, Gupta, Long 2019).

    Args:
        weight: (M, C, kh, kw), ungrouped.
        input_size: (H, W).
    """
    taps = [_phases(weight.shape[2 + axis], stride[axis], padding[axis], dilation[axis]) for axis in (0, 1)]
    sizes = []
    for axis in (0, 1):
        blocks = [block for block, _ in taps[axis]]
        first = min(blocks)
        taps[axis] = [(block - first, phase) for block, phase in taps[axis]]
        sizes.append(-(-input_size[axis] // stride[axis]) + max(blocks) - first + 1)
    outputs, inputs = weight.shape[:2]
    phased = torch.zeros(outputs, inputs, *stride, *sizes, dtype=torch.float64, device=weight.device)
    for (i, (row, row_phase)), (j, (column, column_phase)) in itertools.product(*(enumerate(axis) for axis in taps)):
        phased[:, :, row_phase, column_phase, row, column] += weight[:, :, i, j].detach().double()
    transfer = torch.fft.fft2(phased).flatten(1, 3).permute(2, 3, 0, 1)
    if outputs > transfer.shape[3]:
        transfer = transfer.mH
    gram = transfer @ transfer.mH
    return float(torch.linalg.eigvalsh(gram)[..., -1].max().clamp(min=0).sqrt()) * _OUTWARD


def _phases(size: int, stride: int, padding: int, dilation: int) -> list[Pair]:
    """(block, phase) of each tap's offset along one axis."""
    return [divmod(tap * dilation - padding, stride) for tap in range(size)]


def meeting_taps(weight: Tensor, strides: Sequence[int], dilations: Sequence[int]) -> list[Tensor]:
    """The taps of a convolution's ``weight`` (M, C, *kernel), in groups (taps, M, C) that meet the same input pixel.

    Those are taps whose offsets differ by a multiple of the stride; padding only drops some.
    """
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for tap in itertools.product(*(range(size) for size in weight.shape[2:])):
        key = tuple((i * dilation) % stride for i, dilation, stride in zip(tap, dilations, strides, strict=True))
        index: tuple[Any, ...] = (..., *tap)
        groups.setdefault(key, []).append(weight[index])
    return [torch.stack(group) for group in groups.values()]


def column_norms(weight: Tensor, stride: Pair, dilation: Pair) -> tuple[float, float]:
    """(largest l1, largest l2) norm of what one input pixel contributes to all outputs of a convolution."""
    stacked = meeting_taps(weight.detach().double().abs(), stride, dilation)
    largest = max(float(group.sum((0, 1)).max()) for group in stacked)
    euclidean = max(float(group.square().sum((0, 1)).max()) for group in stacked) ** 0.5
    return largest * _OUTWARD, euclidean * _OUTWARD
