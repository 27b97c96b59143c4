"""Certified accuracy as the sets grow: per set and for their union."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cure_plugin.certification.certifier import Certifier
from cure_plugin.certification.dataset import check_data, read_specs, set_names
from cure_plugin.checks import check_number
from cure_plugin.datasets import ImageData
from cure_plugin.errors import SpecError
from cure_plugin.inputs import like
from cure_plugin.progress import progress_bar
from cure_plugin.sets import PerturbationSet, SetSpec


def certified_curves(
    certifier: Certifier,
    data: ImageData,
    sets: Sequence[SetSpec | str],
    factors: Sequence[float],
    progress: bool = False,
    label: str = "curves",
) -> dict[str, list[float]]:
    """Share of images certified for each set, scaled by each factor, and for all sets at once.

    The sets are nested, so each image has a largest factor that it is certified for; it is found by
    bisection, all images of a set together.

    Args:
        sets: specs, or their text.
        factors: increasing multiples of the sets' sizes.

    Returns:
        Set name (and ``union``) -> one share per factor.

    Raises:
        SpecError: factors that do not increase, sets that are none, or images that do not fit the net.
    """
    sets = read_specs(sets)
    check_data(data, certifier)
    if isinstance(factors, str) or not isinstance(factors, Sequence) or not factors:
        raise SpecError(f"factors must be a list of increasing numbers >= 0, got {factors!r}")
    for factor in factors:
        check_number("factors", factor)
    if any(one >= other for one, other in pairwise(factors)):
        raise SpecError(f"factors must increase, got {list(factors)}")
    parameter = like(certifier.net)
    x, y = data.batch(slice(0, len(data)), parameter.device)
    x = x.to(parameter.dtype)
    names = set_names(sets)
    reached: dict[str, Tensor] = {}
    with progress_bar(len(factors).bit_length() * len(sets), "step", label, progress) as bar:
        for name, spec in zip(names, sets, strict=True):
            reached[name] = _largest(certifier, x, y, spec.build(), factors, bar.update)
    reached["union"] = torch.stack(list(reached.values())).amin(0)
    counts = torch.arange(1, len(factors) + 1)
    return {name: (last >= counts[:, None]).float().mean(1).tolist() for name, last in reached.items()}


def _largest(
    certifier: Certifier, x: Tensor, y: Tensor, own: PerturbationSet, factors: Sequence[float], step: Callable[[], Any]
) -> Tensor:
    """How many of the leading ``factors`` each image is certified for, (B,) int64."""
    low, high = torch.zeros(len(x), dtype=torch.long), torch.full((len(x),), len(factors))
    for _ in range(len(factors).bit_length()):
        middle = (low + high + 1) // 2
        for number in middle[low < high].unique().tolist():
            chosen = ((middle == number) & (low < high)).nonzero().flatten()
            proved = _proved(certifier, x[chosen], y[chosen], own, factors[number - 1])
            low[chosen] = torch.where(proved, number, low[chosen])
            high[chosen] = torch.where(proved, high[chosen], number - 1)
        step()
    return low


def _proved(certifier: Certifier, x: Tensor, y: Tensor, own: PerturbationSet, factor: float) -> Tensor:
    """Which images are certified, (B,) bool; none for an enlarged set that does not exist (patch beyond the image)."""
    try:
        return certifier.proved(x, y, own.scaled(factor))
    except SpecError:
        if factor <= 1:
            raise
        return torch.zeros(len(x), dtype=torch.bool)
