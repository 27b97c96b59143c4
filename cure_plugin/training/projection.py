"""Gradient projection (GP): mix an epoch's certified update with what the natural one agrees on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cure_plugin.errors import SpecError


def project_update(
    start: Mapping[str, Tensor], certified: Mapping[str, Tensor], natural: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """theta_0 + (1 - w) g_c + w max(cos(g_c, g_n), 0) g_n, tensor by tensor (CURE, gradient projection).

    g_c and g_n are the certified and the natural epoch's updates from the common ``start``. Give it
    parameters only: running statistics of BatchNorm are no gradients and stay as the certified epoch
    left them.

    Args:
        weight: w (the paper's beta) in [0, 1].

    Raises:
        SpecError: weight outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise SpecError(f"gradient projection weight must lie in [0, 1], got {weight!r}")
    mixed = {}
    for name, theta in start.items():
        towards_certified, towards_natural = certified[name] - theta, natural[name] - theta
        cosine = torch.nn.functional.cosine_similarity(towards_certified.flatten(), towards_natural.flatten(), dim=0)
        mixed[name] = theta + (1 - weight) * towards_certified + weight * cosine.clamp(min=0) * towards_natural
    return mixed
