"""Bounds of the margins z_y - z_j through auto_LiRPA, and the robust loss made of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from auto_LiRPA import BoundedModule, BoundedTensor
from torch import Tensor

from cure_plugin.bounds.module import default_dtype
from cure_plugin.sets import PerturbationSet


def margin_matrix(y: Tensor, classes: int) -> Tensor:
    """Specification C with rows z_y - z_j for j != y in class order, (B, classes - 1, classes)."""
    identity = torch.eye(classes, device=y.device)
    others = (~identity.bool()).nonzero()[:, 1].view(classes, classes - 1)[y]
    return identity[y].unsqueeze(1) - identity[others]


def lower_margins(
    bounded: BoundedModule,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    method: str = "IBP",
    classes: int | None = None,
) -> Tensor:
    """Lower bounds of z_y - z_j for j != y over the set around ``x``, (B, C - 1).

    Args:
        bounded: auto_LiRPA's wrapper of the net.
        method: any of auto_LiRPA's, e.g. IBP, CROWN-IBP, CROWN, alpha-CROWN.
        classes: number of logits; default: the net's own.
    """
    specification = margin_matrix(y, classes or int(bounded.final_shape[-1])).to(x)
    with default_dtype(x.dtype):
        lower, _ = bounded.compute_bounds(
            x=(BoundedTensor(x, perturbation),), C=specification, method=method, bound_upper=False
        )
    return lower


def elided(margins: Tensor) -> Tensor:
    """The elided vector d = (0, -lb_1, ..., -lb_{C-1}): upper bounds on z_j - z_y, true class first; (B, C)."""
    return torch.cat([torch.zeros_like(margins[:, :1]), -margins], dim=1)


def robust_cross_entropy(margins: Tensor) -> Tensor:
    """CE(d, 0) per sample, an upper bound of the worst cross entropy over the set (Wong and Kolter 2018); (B,)."""
    target = torch.zeros(margins.shape[0], dtype=torch.long, device=margins.device)
    return F.cross_entropy(elided(margins), target, reduction="none")
