"""A loss of your own: interval bounds plus a pull of the attacked logits towards the clean ones (logit pairing).

Registered under a name, it works in training loops, recipes (``loss: logit-pairing``, ``weight: 0.5`` beside it) and
on the command line. Name this module in the entry-point group ``cure_plugin.losses`` and it is found without an import.
"""

from __future__ import annotations

from dataclasses import dataclass

from cure_plugin.checks import check_number
from cure_plugin.training import LOSSES, Batch, Loss, SetLoss, ibp_loss


@LOSSES.register("logit-pairing")
@dataclass(frozen=True)
class LogitPairing(Loss):
    """IBP's loss plus ``weight`` times the squared distance of attacked and clean logits (Kannan et al. 2018)."""

    weight: float = 0.5

    def __post_init__(self) -> None:
        check_number("weight", self.weight)

    def of(self, batch: Batch) -> SetLoss:
        bounds = ibp_loss(batch.bounded, batch.x, batch.y, batch.perturbation)
        attacked = batch.model(batch.perturbation.decode(batch.x, batch.variable).detach())
        apart = (attacked - batch.model(batch.x)).square().sum(1)
        return SetLoss(bounds.values + self.weight * apart, bounds.vector)
