"""Sums over p x q squares inside the window that a row touches: the arithmetic of patch sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_gain(a: Tensor, low: Tensor, high: Tensor, window: tuple[int, ...]) -> Tensor:
    """Minimum of each pixel's part of ``a . d`` over ``low <= d <= high``, all channels: (..., h, w), <= 0.

    Args:
        a, low, high: (..., K), broadcastable. window: (channels, h, w) with product K.
    """
    return torch.minimum(a * low, a * high).unflatten(-1, window).sum(-3)


def smallest_square_sum(gain: Tensor, height: int, width: int) -> Tensor:
    """Smallest sum of ``gain`` (..., h, w) over all height x width squares inside the window; (...)."""
    sums = F.avg_pool2d(gain.flatten(0, -3).unsqueeze(1), (height, width), stride=1) * (height * width)
    return sums.flatten(1).amin(1).view(gain.shape[:-2])


def smallest_overlap_sum(gain: Tensor, height: int, width: int) -> Tensor:
    """As :func:`smallest_square_sum` for ``gain`` <= 0, over squares that reach into the window from outside too."""
    return smallest_square_sum(F.pad(gain, (width - 1, width - 1, height - 1, height - 1)), height, width)


def crop(image: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """The height x width pixels of each ``image`` (B, ..., H, W) from row ``top`` and column ``left``, (B,) each."""
    sample = torch.arange(image.shape[0], device=image.device).view(-1, 1, 1)
    rows = (top[:, None] + torch.arange(height, device=image.device)).unsqueeze(2)
    columns = (left[:, None] + torch.arange(width, device=image.device)).unsqueeze(1)
    return image.movedim((-2, -1), (1, 2))[sample, rows, columns].movedim((1, 2), (-2, -1))
