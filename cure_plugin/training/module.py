"""Objective and net as one module, which ``DistributedDataParallel`` can wrap."""

from __future__ import annotations

from dataclasses import replace

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor, nn

from cure_plugin.checks import check_type
from cure_plugin.training.epoch import natural_loss
from cure_plugin.training.objective import CureObjective, Outcome
from cure_plugin.training.world import World


class ObjectiveModule(nn.Module):
    """``CureObjective`` with its net: bounds, attacks and the natural loss are made in :meth:`forward`.

    ``DistributedDataParallel(ObjectiveModule(objective, bounded, net))`` trains on several processes: each is given the
    whole batch and a generator of the same seed, works on its share, and knows the whole batch's loss. A step is then
    that of one process, up to rounding.

    Args:
        objective: the loss. bounded: auto_LiRPA's wrapper of ``net``, sharing its parameters.
        net: the only one whose parameters the module has.

    Raises:
        SpecError: what is none of these.
    """

    def __init__(self, objective: CureObjective, bounded: BoundedModule, net: nn.Module) -> None:
        super().__init__()
        check_type("objective", objective, CureObjective, "a CureObjective(sets, ...)")
        check_type("bounded", bounded, BoundedModule, "what bounded_module(net, shape) returns")
        check_type("net", net, nn.Module, "a torch.nn.Module")
        self.objective, self.net = replace(objective, world=World.joined()), net
        self._bounded = (bounded,)  # no part of this module: its parameters are the net's

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        scale: float | None = 1.0,
        generator: torch.Generator | None = None,
        step: int = 0,
    ) -> Outcome:
        """The batch's loss, see :meth:`CureObjective.__call__`; where ``scale`` is None, the natural loss.

        Args:
            x, y: all of the batch, in every process.
            generator: of the same state in every process.

        Raises:
            SpecError: as the objective; BatchNorm on several processes.
        """
        if scale is None:
            return natural_loss(self.net, self.objective.world)(x, y)
        return self.objective(self._bounded[0], self.net, x, y, scale, generator, step)
