"""Certified accuracy as the sets grow: per set and for their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from cure_plugin.certification.certifier import Certifier
from cure_plugin.certification.report import set_names
from cure_plugin.datasets import ImageData
from cure_plugin.sets import SetSpec


def certified_curves(
    certifier: Certifier,
    data: ImageData,
    sets: Sequence[SetSpec],
    factors: Sequence[float],
    progress: bool = False,
    label: str = "curves",
) -> dict[str, list[float]]:
    """Share of images certified for each set, scaled by each factor, and for all sets at once.

    An image counts at a factor only if it counted at every smaller one: the sets are nested.

    Args:
        factors: increasing multiples of the sets' radii.

    Returns:
        Set name (and ``union``) -> one share per factor.
    """
    parameter = next(certifier.net.parameters())
    x, y = data.batch(slice(0, len(data)), parameter.device)
    x = x.to(parameter.dtype)
    names = set_names(sets)
    alive = {name: torch.ones(len(data), dtype=torch.bool) for name in names}
    curves: dict[str, list[float]] = {name: [] for name in [*names, "union"]}
    with tqdm(total=len(factors) * len(sets), disable=not progress, unit="point", desc=label) as bar:
        for factor in factors:
            for name, spec in zip(names, sets, strict=True):
                left = alive[name].nonzero().flatten()
                if left.numel():
                    alive[name][left] = certifier.proved(x[left], y[left], spec.build().scaled(factor))
                curves[name].append(float(alive[name].float().mean()))
                bar.update()
            curves["union"].append(float(torch.stack(list(alive.values())).all(0).float().mean()))
    return curves
