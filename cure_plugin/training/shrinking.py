"""ReLU shrinking: a training heuristic that makes bounds smaller than they are. Never for certificates."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from auto_LiRPA.operators import BoundRelu

_ATTRIBUTE = "cure_shrink"


@contextmanager
def relu_shrinking(bounded: BoundedModule, factor: float) -> Iterator[None]:
    """For a while, multiply the upper bounds of ReLUs that may be on or off by ``factor`` (SABR, on CIFAR-10).

    It acts on interval bounds computed with this ``bounded``, whatever else is bounded meanwhile.

    Args:
        factor: in (0, 1]; 1 changes nothing.
    """
    if factor == 1:
        yield
        return
    for relu in bounded.relus:
        setattr(relu, _ATTRIBUTE, factor)
    try:
        yield
    finally:
        for relu in bounded.relus:
            delattr(relu, _ATTRIBUTE)


def _install() -> None:
    """Wrap ``BoundRelu.interval_propagate`` once; nodes without the attribute are bounded as ever."""
    original = BoundRelu.interval_propagate
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def interval_propagate(self: Any, *inputs: Any) -> Any:
        bounds = original(self, *inputs)
        factor = getattr(self, _ATTRIBUTE, 1)
        if factor == 1:
            return bounds
        crossing = (inputs[0][0] < 0) & (inputs[0][1] > 0)
        return bounds[0], torch.where(crossing, factor * bounds[1], bounds[1])

    BoundRelu.interval_propagate = interval_propagate


_install()
