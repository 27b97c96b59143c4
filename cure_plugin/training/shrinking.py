"""ReLU shrinking: a training heuristic that makes bounds smaller than they are. Never for certificates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from auto_LiRPA.operators import BoundRelu


@contextmanager
def relu_shrinking(factor: float) -> Iterator[None]:
    """For a while, multiply the upper bounds of ReLUs that may be on or off by ``factor`` (SABR, on CIFAR-10).

    Args:
        factor: in (0, 1]; 1 changes nothing.
    """
    if factor == 1:
        yield
        return
    original = BoundRelu.interval_propagate

    def shrunk(self: Any, *inputs: Any) -> Any:
        lower, upper = original(self, *inputs)
        before = inputs[0]
        crossing = (before[0] < 0) & (before[1] > 0)
        return lower, torch.where(crossing, factor * upper, upper)

    BoundRelu.interval_propagate = shrunk
    try:
        yield
    finally:
        BoundRelu.interval_propagate = original
