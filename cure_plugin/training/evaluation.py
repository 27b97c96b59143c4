"""Figures for the log of a training run, each of what its name says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from auto_LiRPA import BoundedModule
from torch import nn

from cure_plugin.attacks import Pgd, pgd, worst_margin_loss
from cure_plugin.bounds.margins import lower_margins
from cure_plugin.datasets import ImageData
from cure_plugin.folding import AttackNet
from cure_plugin.modes import evaluation_mode
from cure_plugin.sets import PerturbationSet
from cure_plugin.sets.names import distinct_names


def evaluate(
    bounded: BoundedModule,
    model: nn.Module,
    data: ImageData,
    sets: Sequence[PerturbationSet],
    device: torch.device | str = "cpu",
    batch_size: int = 250,
) -> dict[str, float]:
    """Shares of all images: ``clean`` accuracy, and per whole set (no small region) what PGD leaves and IBP certifies.

    Returns:
        ``clean``, and per set ``pgd.<set>`` (8 steps, one start) and ``ibp.<set>``; each in [0, 1]. IBP's share is
        a quick lower bound of the certified accuracy, far below it where training does not aim at IBP.
    """
    names = distinct_names(sets)
    totals: dict[str, float] = {}
    with evaluation_mode(model):
        net = AttackNet(model)
        for start in range(0, len(data), batch_size):
            x, y = data.batch(slice(start, start + batch_size), device)
            with torch.no_grad():
                right = worst_margin_loss(net(x), y) < 0
            counts = {"clean": int(right.sum())}
            generator = torch.Generator(x.device).manual_seed(start)
            for name, perturbation in zip(names, sets, strict=True):
                points = pgd(net, x, y, perturbation, Pgd(8, worst_margin_loss), generator)
                with torch.no_grad():
                    stands = worst_margin_loss(net(points), y) < 0
                    proved = (lower_margins(bounded, x, y, perturbation, "IBP") > 0).all(1)
                counts[f"pgd.{name}"] = int((right & stands).sum())
                counts[f"ibp.{name}"] = int(proved.sum())
            for key, count in counts.items():
                totals[key] = totals.get(key, 0.0) + count / len(data)
    return totals
