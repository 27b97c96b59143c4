"""Random flips and crops of training batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cure_plugin.checks import check_count
from cure_plugin.errors import SpecError


def augmented(
    x: Tensor, flip: bool = False, crop: int = 0, pad: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Each image mirrored left to right with probability 1/2, padded with its edge, and cut at a random place.

    Args:
        x: (B, C, H, W).
        flip: whether to mirror.
        crop: side of the square to cut; 0 cuts nothing.
        pad: pixels to repeat on every side before.
        generator: on the CPU, whatever the device of ``x``: the same draws everywhere.

    Returns:
        (B, C, crop, crop), or the shape of ``x`` where ``crop`` is 0.

    Raises:
        SpecError: a crop larger than the padded image, or a crop or pad that is no whole number >= 0.
    """
    check_count("crop", crop)
    check_count("pad", pad)
    if flip:
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(3), x)
    if crop == 0:
        return x
    height, width = x.shape[2] + 2 * pad, x.shape[3] + 2 * pad
    if crop > min(height, width):
        raise SpecError(f"crop {crop} is larger than the padded images, {height} x {width}")
    if pad:
        x = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    top = torch.randint(height - crop + 1, (len(x),), generator=generator).to(x.device)
    left = torch.randint(width - crop + 1, (len(x),), generator=generator).to(x.device)
    span = torch.arange(crop, device=x.device)
    rows, columns = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x[image, :, rows, columns].permute(0, 3, 1, 2).contiguous()
