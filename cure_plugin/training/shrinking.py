"""ReLUs in training: interval bounds that hold less, and shrinking, a heuristic that must never see a certificate."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from auto_LiRPA.operators import BoundRelu
from torch import Tensor
from torch.autograd.function import once_differentiable

from cure_plugin.checks import check_number


@contextmanager
def relu_shrinking(bounded: BoundedModule, factor: float) -> Iterator[None]:
    """For a while, multiply the upper bounds of ReLUs that may be on or off by ``factor`` (SABR, on CIFAR-10).

    It acts on interval bounds computed with this ``bounded``, whatever else is bounded meanwhile. For the backward pass
    ReLUs keep a byte per entry in place of a float.

    Args:
        factor: in (0, 1]; 1 changes no bound.

    Raises:
        SpecError: another factor.
    """
    check_number("factor", factor, 1, zero=False)
    relus = [relu for relu in bounded.relus if type(relu) is BoundRelu]  # a leaky ReLU is a subclass in 0.7
    for relu in relus:
        relu.interval_propagate = functools.partial(_interval, factor)
    try:
        yield
    finally:
        for relu in relus:
            del relu.interval_propagate  # the instance's; the class's is there again


def _interval(factor: float, *inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lower, upper = inputs[0]
    positive = _Relu.apply(upper)
    if factor < 1:
        positive = torch.where((lower < 0) & (upper > 0), factor * positive, positive)
    return _Relu.apply(lower), positive


class _Relu(torch.autograd.Function):
    """max(x, 0) that remembers where x is positive and not by how much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.clamp(min=0)
        ctx.save_for_backward(result > 0)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]
