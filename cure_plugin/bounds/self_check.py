"""Bounds of a freshly wrapped net against what its nodes attain: a violation names the first node that breaks.

Boxes and l2 balls of several sizes around random inputs are bounded by IBP and CROWN; every node that was bounded is
then evaluated at random points, at corners, and where the gradients of some of its entries lead. Small boxes show
wrong coefficients, since nets are linear there and bounds nearly attained; large ones show wrong relaxations.

Where CROWN's rows for every neuron would take long, inner nodes are bounded by IBP, and CROWN's rows start at the
logits alone, or at some of many. What that leaves out is the rows between inner nodes: in matrix mode they are of the
same kind, in patches mode they rest on the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from auto_LiRPA import BoundedModule, BoundedTensor
from torch import Tensor

from cure_plugin.bounds.memory import coefficients
from cure_plugin.sets.base import PerturbationSet
from cure_plugin.sets.lp import PerturbationLpBall

_SIZES = (0.002, 0.03, 0.5)
"""Radii, relative to the domain [0, 1]; of l2 balls times the square root of the number of pixels, times a half."""

_ENTRIES = 4
"""Of a node, whose gradients are followed, per input."""

_RANDOM = 8
"""Random points per input, as many of them inside as at corners."""

_SMALL = 200_000
"""Coefficients over the input and all nodes, per image, up to which a net counts as small: every row is looked at."""

_ROWS = 10
"""Logits that CROWN's rows start at where a net is not small: of two hundred, on large images, all take minutes."""

_MANY = 12
"""Times as many inputs where a node is of a kind that nothing is known of: its relaxation is all there is to go by."""

_SLACK = 2.0**11
"""Units of rounding, relative to the largest value met so far, by which values may lie outside their bounds."""

Bounds = dict[str, tuple[Tensor, Tensor]]
"""Node -> (lower, upper)."""


def violation(bounded: BoundedModule, input_shape: tuple[int, ...], thorough: bool = False) -> str | None:
    """The first node, in the order of evaluation, whose bounds some point breaks, and by how much; None: no node.

    Args:
        bounded: in eval mode; its parameters are left alone.
        input_shape: without the batch axis.
        thorough: look at many more sets.
    """
    parameter = next((p for p in bounded.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator(parameter.device).manual_seed(0)
    sizes = torch.tensor(_SIZES).to(parameter)
    if thorough:
        sizes = torch.logspace(-3, 0, _MANY * len(_SIZES)).to(parameter)
    x = torch.rand(len(sizes), *input_shape, generator=generator, device=parameter.device).to(parameter)
    balls = (
        PerturbationLpBall(math.inf, sizes),
        PerturbationLpBall(2, sizes * math.sqrt(math.prod(input_shape)) / 2, domain=None),
    )
    methods = ("IBP", "CROWN") if coefficients(bounded) <= _SMALL else ("CROWN-IBP",)
    if len(bounded.final_node().output_shape) != 2:  # no logits: auto_LiRPA starts rows at features only
        methods = ("IBP",)
    for ball in balls:
        bounds = {method: _bounds(bounded, x, ball, method) for method in methods}
        nodes = list(bounds.get("CROWN", [bounded.final_node().name]))
        for points in _points(bounded, x, ball, nodes, generator):
            broken = _broken(bounded, points, bounds)
            if broken is not None:
                return f"{broken} over {'boxes' if ball.p == math.inf else 'l2 balls'}"
    return None


def _bounds(bounded: BoundedModule, x: Tensor, ball: PerturbationSet, method: str) -> Bounds:
    """Bounds of all nodes that ``method`` bounds, by name."""
    rows, logits = {}, None
    if method != "IBP":
        classes = int(bounded.final_shape[-1])
        chosen = torch.eye(classes).to(x)
        if method == "CROWN-IBP" and classes > _ROWS:
            logits = torch.linspace(0, classes - 1, _ROWS, device=x.device).long()
            chosen = chosen[logits]
        rows["C"] = chosen.expand(len(x), *chosen.shape)
    with torch.no_grad():
        lower, upper = bounded.compute_bounds(x=(BoundedTensor(x, ball),), method=method, **rows)
    if logits is not None:
        unknown = lower.new_full((len(x), classes), torch.inf)
        lower, upper = (-unknown).index_copy(1, logits, lower), unknown.index_copy(1, logits, upper)
    found: Bounds = {}
    for node in bounded.children():
        ends = getattr(node, "lower", None), getattr(node, "upper", None)
        if getattr(node, "perturbed", False) and isinstance(ends[0], Tensor) and isinstance(ends[1], Tensor):
            found[node.name] = ends[0].detach(), ends[1].detach()
    found[bounded.final_node().name] = lower, upper
    return found


def _points(
    bounded: BoundedModule, x: Tensor, ball: PerturbationSet, nodes: list[str], generator: torch.Generator
) -> Iterator[Tensor]:
    """Points of the sets, (K, B, *input): random ones, corners, and ends of steps along gradients of ``nodes``."""
    inside = [ball.sample(x, generator) for _ in range(_RANDOM // 2)]
    signs = (torch.randint(0, 2, (_RANDOM // 2, *x.shape), generator=generator, device=x.device) * 2 - 1).to(x)
    yield torch.stack([*inside, *(ball.ascend(x, x, sign, 1.0) for sign in signs)])
    many = len(nodes) * _ENTRIES
    with torch.enable_grad():
        start = x.repeat(many, *[1] * (x.ndim - 1)).requires_grad_()
        bounded(start)
        followed = start.new_zeros(())
        for at, name in enumerate(nodes):
            value = bounded[name].forward_value.flatten(1)
            if len(value) == len(start):
                own = value[at * _ENTRIES * len(x) : (at + 1) * _ENTRIES * len(x)]
                entry = torch.randint(own.shape[1], (len(own), 1), generator=generator, device=x.device)
                followed = followed + own.gather(1, entry).sum()
        gradient = torch.autograd.grad(followed, start)[0] if followed.requires_grad else torch.zeros_like(start)
    steps = gradient.view(many, *x.shape)
    yield torch.stack([ball.ascend(x, x, sign * step, 1.0) for step in steps for sign in (1, -1)])


def _broken(bounded: BoundedModule, points: Tensor, bounds: dict[str, Bounds]) -> str | None:
    with torch.no_grad():
        bounded(points.flatten(0, 1))
    largest = 1.0
    for node in bounded.children():
        value = getattr(node, "forward_value", None)
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            continue
        largest = max(largest, float(value.abs().nan_to_num(posinf=0).max()))
        allowed = _SLACK * torch.finfo(value.dtype).eps * largest
        for method, found in bounds.items():
            if node.name in found:
                lower, upper = (end.reshape(1, points.shape[1], *value.shape[1:]) for end in found[node.name])
                at = value.view(len(points), points.shape[1], *value.shape[1:])
                outside = torch.maximum(lower - at, at - upper)
                if bool((outside > allowed).any()):
                    kind = type(node).__name__.removeprefix("Bound")
                    return f"node {node.name} ({kind}): {method}'s bounds are broken by {float(outside.max()):.3g}"
    return None
