"""BatchNorm under bounds: whose statistics auto_LiRPA's nodes normalise with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from auto_LiRPA import BoundedModule
from torch import Tensor, nn

Statistics = list[tuple[Any, Tensor, Tensor]]
"""(node, mean, variance) per BatchNorm."""


def use_batch_statistics(bounded: BoundedModule, model: nn.Module, x: Tensor) -> Statistics:
    """Let ``bounded`` pass gradients to the parameters and normalise as ``model`` does in its present mode.

    In training mode that is by the statistics of the clean batch ``x``, for every set alike (Shi et al. 2021): one
    forward pass, which also moves the running statistics. Gradients reach the statistics.

    Returns:
        The statistics, empty in eval mode and without BatchNorm; :func:`restore_statistics` sets them again.
    """
    bounded.train()  # in eval mode auto_LiRPA switches requires_grad of the parameters off
    nodes = [node for node in bounded.modules() if type(node).__name__ == "BoundBatchNormalization"]
    for node in nodes:
        node.training = model.training
    if not nodes or not model.training:
        return []
    bounded(x)
    return [(node, node.current_mean, node.current_var) for node in nodes]


def restore_statistics(statistics: Statistics) -> None:
    """Normalise by these again, whatever batches ``bounded`` has seen since."""
    for node, mean, variance in statistics:
        node.current_mean, node.current_var = mean, variance


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """For a while, normalise by the batch where ``model`` is in training mode without moving the running statistics."""
    moving = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.track_running_stats]
    moving = [module for module in moving if module.training]
    for module in moving:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in moving:
            module.track_running_stats = True
