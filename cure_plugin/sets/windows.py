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
    """Smallest sum of ``gain`` (..., h, w) <= 0 over all height x width squares, also those that stick out; (...).

    A square that sticks out of the window covers no more than one that is moved inside, so it cannot
    be smaller where the window is the whole image; where the window is a part of the image, squares
    that reach into it from outside are the ones that matter.
    """
    padded = F.pad(gain, (width - 1, width - 1, height - 1, height - 1))
    flat = padded.flatten(0, -3).unsqueeze(1)
    sums = F.avg_pool2d(flat, (height, width), stride=1) * (height * width)
    return sums.flatten(1).amin(1).view(gain.shape[:-2])
