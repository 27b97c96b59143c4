"""Bound alignment (BA): pull the bound distributions of two sets together where one is certified."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def certified(vector: Tensor) -> Tensor:
    """Which samples' elided vectors (B, C) rule every other class out; (B,) bool."""
    return (vector[:, 1:] < 0).all(dim=1)


def bound_alignment(elided_q: Tensor, elided_r: Tensor) -> Tensor:
    """Mean KL(P_q || P_r) over the samples certified for q, P = softmax of the elided vectors; a scalar.

    Only the choice of samples is detached: the gradient reaches both distributions. 0 where no sample
    is certified for q.

    Args:
        elided_q, elided_r: elided vectors of the same samples, (B, C), true class first.
    """
    chosen = certified(elided_q)
    log_q, log_r = F.log_softmax(elided_q, dim=1), F.log_softmax(elided_r, dim=1)
    divergence = (log_q.exp() * (log_q - log_r)).sum(1)
    return torch.where(chosen, divergence, 0).sum() / chosen.sum().clamp(min=1)
