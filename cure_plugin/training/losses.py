"""Losses for one perturbation set, as plain functions of bounds and attack points; any registered set will do.

Each takes clean inputs ``x`` (B, *input) and labels ``y`` (B,) and returns a :class:`SetLoss`. Attack variables come
from :func:`cure_plugin.attacks.pgd_variable`. In training mode with BatchNorm, call
them inside :func:`cure_plugin.training.batch_norm.batch_statistics`: bounds then normalise as the batch does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor, nn

from cure_plugin.bounds.lipschitz import kept_norms
from cure_plugin.bounds.margins import elided, elided_cross_entropy, lower_margins, margin_matrix
from cure_plugin.checks import check_number
from cure_plugin.errors import SpecError
from cure_plugin.sets import PerturbationLpBall, PerturbationSet
from cure_plugin.training.batch_norm import running_statistics_kept


class SetLoss(NamedTuple):
    """What one set contributes.

    Attributes:
        values: loss per sample, (B,).
        vector: the elided vector (0, upper bounds on z_j - z_y) behind it, (B, C): bound alignment compares these.
    """

    values: Tensor
    vector: Tensor


def ibp_loss(bounded: BoundedModule, x: Tensor, y: Tensor, perturbation: PerturbationSet) -> SetLoss:
    """Interval bounds over the whole set (Gowal et al. 2018)."""
    return _of(elided(lower_margins(bounded, x, y, perturbation, "IBP")))


def crown_ibp_loss(
    bounded: BoundedModule, x: Tensor, y: Tensor, perturbation: PerturbationSet, mix: float = 1.0
) -> SetLoss:
    """``mix`` times CROWN-IBP's margins plus (1 - ``mix``) times IBP's, over the whole set (Zhang et al. 2020)."""
    check_number("mix", mix, 1)
    interval = lower_margins(bounded, x, y, perturbation, "IBP") if mix < 1 else None
    margins = lower_margins(bounded, x, y, perturbation, "CROWN-IBP")
    return _of(elided(margins if interval is None else mix * margins + (1 - mix) * interval))


def sabr_loss(
    bounded: BoundedModule, x: Tensor, y: Tensor, perturbation: PerturbationSet, variable: Tensor, ratio: float
) -> SetLoss:
    """Interval bounds over the set's own small region around an attack (SABR: Mueller et al. 2023).

    The region lies inside the set: a box for linf, a small ball for l1 and l2 (through the first layer's dual norm;
    inside the ball, not cut with the domain), a small box of parameters for a geometric set, the attacked position
    with a small box of contents for a patch.

    Args:
        ratio: lambda in [0, 1], the region's size relative to the set's.
    """
    centre, region = perturbation.small_region(x, variable, ratio)
    return ibp_loss(bounded, centre, y, region)


def sabr_box_loss(
    bounded: BoundedModule, x: Tensor, y: Tensor, perturbation: PerturbationSet, variable: Tensor, ratio: float
) -> SetLoss:
    """The paper's region for any norm: a linf box of radius lambda eps around the attack, kept inside the ball.

    Raises:
        SpecError: the set is no lp ball, or a box of that size does not fit into it.
    """
    if not hasattr(perturbation, "small_box"):
        raise SpecError(f"sabr-box takes lp balls, got {perturbation!r}; use sabr")
    centre, region = perturbation.small_box(x, variable, ratio)
    return ibp_loss(bounded, centre, y, region)


def adversarial_loss(
    model: nn.Module, x: Tensor, y: Tensor, perturbation: PerturbationSet, variable: Tensor
) -> SetLoss:
    """Cross entropy at the attack's point, no bounds (Madry et al. 2018).

    BatchNorm in training mode normalises by the attacked batch; running statistics stay those of clean ones.
    """
    with running_statistics_kept(model):
        logits = model(perturbation.decode(x, variable).detach())
    return _of(_elided_logits(logits, y))


def clean_loss(model: nn.Module, x: Tensor, y: Tensor) -> SetLoss:
    """Cross entropy at the clean inputs; BatchNorm's running statistics are not moved a second time."""
    with running_statistics_kept(model):
        return _of(_elided_logits(model(x), y))


def blended(loss: SetLoss, plain: SetLoss, share: float, vectors: bool) -> SetLoss:
    """``share`` of a loss and the rest of a ``plain`` one: of their values, or the loss of their mixed ``vectors``.

    With attacks and interval bounds these are MTL-IBP and CC-IBP (De Palma et al. 2024).
    """
    if vectors:
        return _of(share * loss.vector + (1 - share) * plain.vector)
    return SetLoss(share * loss.values + (1 - share) * plain.values, loss.vector)


def mtl_ibp_loss(
    bounded: BoundedModule,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    variable: Tensor,
    mix: float,
) -> SetLoss:
    """(1 - ``mix``) times the adversarial loss plus ``mix`` times IBP's (MTL-IBP: De Palma et al. 2024).

    The vector is that of the bounds.
    """
    check_number("mix", mix, 1)
    attacked = adversarial_loss(model, x, y, perturbation, variable)
    return blended(ibp_loss(bounded, x, y, perturbation), attacked, mix, vectors=False)


def cc_ibp_loss(
    bounded: BoundedModule,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    variable: Tensor,
    mix: float,
) -> SetLoss:
    """Loss of (1 - ``mix``) times the attacked elided logits plus ``mix`` times IBP's (CC-IBP, the same paper)."""
    check_number("mix", mix, 1)
    attacked = adversarial_loss(model, x, y, perturbation, variable)
    return blended(ibp_loss(bounded, x, y, perturbation), attacked, mix, vectors=True)


def lipschitz_loss(
    bounded: BoundedModule,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    steps: int = 2,
    ratio: float = 1.0,
) -> SetLoss:
    """Cross entropy of logits that move as far as the layers' norms let them (see :mod:`cure_plugin.bounds.lipschitz`).

    For l2 balls it is what coupled bounds start from, for l1 balls the first layer's columns count, for linf rows.

    Args:
        steps: of power iteration. ratio: of the radius that logits move over, relative to the set's.

    Raises:
        SpecError: the set is no lp ball, or the net has a node that no norm is known of.
    """
    if not isinstance(perturbation, PerturbationLpBall):
        raise SpecError(f"lipschitz takes lp balls, got {perturbation!r}; take another loss")
    clean = clean_loss(model, x, y).vector
    distances = kept_norms(bounded).distances(bounded, perturbation.p, steps)
    eps = torch.as_tensor(perturbation.eps).to(clean).reshape(-1, 1)
    others = margin_matrix(y, clean.shape[1]) < 0
    moved = (others * distances[y].unsqueeze(1)).sum(2)
    return _of(clean + ratio * eps * torch.cat([torch.zeros_like(moved[:, :1]), moved], 1))


def _of(vector: Tensor) -> SetLoss:
    return SetLoss(elided_cross_entropy(vector), vector)


def _elided_logits(logits: Tensor, y: Tensor) -> Tensor:
    """(0, z_j - z_y for j != y), the elided vector of a single point."""
    margins = torch.einsum("bmc,bc->bm", margin_matrix(y, logits.shape[1]).to(logits), logits)
    return elided(margins)
