"""What soundness tests share: bounds by stock auto_LiRPA, and how far an attack gets beside them."""

from __future__ import annotations

import copy

import torch
from auto_LiRPA import BoundedTensor
from torch import Tensor, nn

from cure_plugin import PerturbationSet
from cure_plugin.attacks import Pgd, pgd
from cure_plugin.bounds.module import bounded_module, default_dtype

_SAMPLES_AT_A_TIME = 1000


def bounds(
    net: nn.Module, x: Tensor, perturbation: PerturbationSet, method: str, alpha_iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """(lower, upper) of the logits, (B, C) each."""
    # auto_LiRPA 0.3 multiplies by a plain constant, and pools, in matrix mode only
    options = {"conv_mode": "matrix", "optimize_bound_args": {"iteration": alpha_iterations}}
    bounded = bounded_module(net, tuple(x.shape[1:]), options, self_check=False)  # what is bounded here is attacked
    with default_dtype(x.dtype):
        lower, upper = bounded.compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)
    return lower.detach(), upper.detach()


def extremes(
    net: nn.Module, x: Tensor, perturbation: PerturbationSet, samples: int, optimised: int
) -> tuple[Tensor, Tensor]:
    """The lowest and highest logits (B, C) that sampling and gradient ascent reach in the set."""
    with torch.no_grad():
        lowest = highest = net(x)
        repeated = x.repeat(_SAMPLES_AT_A_TIME, 1, 1, 1)
        for _ in range(-(-samples // len(repeated))):
            output = net(perturbation.sample(repeated)).view(_SAMPLES_AT_A_TIME, *lowest.shape)
            lowest, highest = torch.minimum(lowest, output.amin(0)), torch.maximum(highest, output.amax(0))
    goals = 2 * lowest.shape[1]  # every logit, up and down, all in one batch
    each = -(-optimised // (2 * lowest.numel()))
    goal = torch.arange(goals).repeat_interleave(each * len(x))
    point = pgd(net, x.repeat(goals * each, 1, 1, 1), goal, perturbation, Pgd(20, _towards))
    with torch.no_grad():
        output = net(point).view(goals * each, *lowest.shape)
    return torch.minimum(lowest, output.amin(0)), torch.maximum(highest, output.amax(0))


def _towards(logits: Tensor, goal: Tensor) -> Tensor:
    """Logit ``goal // 2``, or its negative where the goal is odd."""
    return (1 - 2 * (goal % 2)) * logits.gather(1, (goal // 2)[:, None])[:, 0]


def crossing(lower: Tensor, upper: Tensor, reached: tuple[Tensor, Tensor]) -> float:
    """How far the logits reached cross a bound (not positive: none does)."""
    lowest, highest = reached
    return max(float((lower - lowest).max()), float((highest - upper).max()))


def violation(
    net: nn.Module, x: Tensor, perturbation: PerturbationSet, lower: Tensor, upper: Tensor, samples: int, optimised: int
) -> float:
    """:func:`crossing` of the :func:`extremes`."""
    return crossing(lower, upper, extremes(net, x, perturbation, samples, optimised))


def cancelling(seed: int, size: float) -> tuple[nn.Module, Tensor, Tensor, float]:
    """(net, x (1, 16), label 0, its exact margin): logits of size 1 made of hidden values of size ``size``."""
    torch.manual_seed(seed)
    first, last = nn.Linear(16, 64), nn.Linear(64, 2)
    with torch.no_grad():
        first.bias.fill_(size)
        last.weight[0] -= last.weight[0].mean()
        last.weight[1] = 0
        last.bias.zero_()
        net, x = nn.Sequential(first, nn.ReLU(), last).eval(), torch.rand(1, 16)
        return net, x, torch.tensor([0]), float(copy.deepcopy(net).double()(x.double())[0, 0])
