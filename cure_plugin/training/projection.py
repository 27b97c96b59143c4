"""Gradient projection (GP): mix an epoch's certified update with what the natural one agrees on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from cure_plugin.checks import check_number

Result = TypeVar("Result")

_WEIGHT = "gradient projection weight"


def projected_epoch(
    model: nn.Module, certified: Callable[[], Result], natural: Callable[[], Result], weight: float
) -> tuple[Result, Result]:
    """Run a certified epoch, then from the same start a natural one, and leave ``model`` at the mixed update.

    Running statistics of BatchNorm are no updates to mix: they stay as the certified epoch leaves them, and
    the natural epoch starts from those before it. Give each epoch an optimiser of its own: its moments then go on
    from epoch to epoch on its own side, though they belong to weights before the mix.

    Args:
        certified, natural: run an epoch on ``model`` and return anything, e.g. its figures.
        weight: see :func:`project_update`.

    Returns:
        What the two returned.

    Raises:
        SpecError: weight outside [0, 1]; nothing has run then.
    """
    check_number(_WEIGHT, weight, 1)
    start, start_buffers = _copy(model.named_parameters()), _copy(model.named_buffers())
    first = certified()
    after, after_buffers = _copy(model.named_parameters()), _copy(model.named_buffers())
    _load(model, start, start_buffers)
    second = natural()
    mixed = project_update(start, after, _copy(model.named_parameters()), weight)
    _load(model, mixed, after_buffers)
    return first, second


def _copy(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in named}


def _load(model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


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
    check_number(_WEIGHT, weight, 1)
    mixed = {}
    for name, theta in start.items():
        towards_certified, towards_natural = certified[name] - theta, natural[name] - theta
        cosine = torch.nn.functional.cosine_similarity(towards_certified.flatten(), towards_natural.flatten(), dim=0)
        mixed[name] = theta + (1 - weight) * towards_certified + weight * cosine.clamp(min=0) * towards_natural
    return mixed
