"""Attacks on the bounds of random nets: the logits that a set reaches, and nets moved until an attack just wins."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from auto_LiRPA import BoundedTensor
from random_nets import Drawn
from torch import Tensor, nn

from cure_plugin import PerturbationGeometric, PerturbationLpBall, PerturbationPatch, PerturbationSet, PerturbationUnion
from cure_plugin.attacks import Pgd, pgd, worst_margin_loss
from cure_plugin.bounds.module import bounded_module, default_dtype
from cure_plugin.certification import (
    AlphaCrown,
    BranchAndBound,
    Certifier,
    Coupled,
    Crown,
    CrownIbpBound,
    IbpBound,
    LipschitzBound,
    Splitting,
)
from cure_plugin.errors import SpecError

QUICK = (
    IbpBound(),
    LipschitzBound(),
    CrownIbpBound(),
    Crown(),
    Coupled(),
    BranchAndBound(seconds=60, nodes=400),
    Splitting(pieces=40),
    AlphaCrown(iterations=4),
)
"""All that proves, with little work: of splits as much as shows whether they are sound."""

METHODS = ("IBP", "lipschitz", "CROWN-IBP", "CROWN", "coupled", "alpha-CROWN")


def sets_for(shape: tuple[int, ...], seed: int) -> dict[str, PerturbationSet]:
    """Sets around inputs of ``shape``, their sizes drawn by ``seed``."""
    size = (0.02, 0.05, 0.15)[seed % 3]
    sets: dict[str, PerturbationSet] = {
        "linf": PerturbationLpBall(math.inf, size),
        "l2": PerturbationLpBall(2, 6 * size),
        "l1": PerturbationLpBall(1, 15 * size),
    }
    sets["union"] = PerturbationUnion([PerturbationLpBall(1, 10 * size), PerturbationLpBall(math.inf, size / 2)])
    if len(shape) == 3:
        sets["patch"] = PerturbationPatch(2, 2)
        sets["rotation"] = PerturbationGeometric.parse("R(4)")
    return sets


def image(drawn: Drawn) -> Tensor:
    """An input of a drawn net, (1, *shape), with pixels at the ends of the domain as well as inside."""
    x = torch.rand(1, *drawn.shape, generator=torch.Generator().manual_seed(drawn.seed))
    return torch.where(x < 0.1, 0.0, x).to(drawn.dtype)


def reached(net: nn.Module, x: Tensor, perturbation: PerturbationSet, steps: int = 40) -> tuple[Tensor, Tensor]:
    """The lowest and highest logits (C,) that sampling and gradients reach in the set around ``x`` (1, *input)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        clean = net(x)
        found = [clean]
        found += [net(part.sample(x.expand(100, *x.shape[1:]), generator)) for part in perturbation.parts()]
    classes = clean.shape[1]
    directions = torch.cat([torch.eye(classes), -torch.eye(classes)]).repeat(2, 1).to(x)
    y = torch.zeros(len(directions), dtype=torch.long)
    many = x.expand(len(directions), *x.shape[1:])
    points = pgd(net, many, y, perturbation, Pgd(steps, lambda z, _: (z * directions).sum(1)), generator)
    with torch.no_grad():
        values = torch.cat([*found, net(points)])
    return values.amin(0), values.amax(0)


def crossings(drawn: Drawn, names: Sequence[str] = (), methods: Sequence[str] = METHODS) -> Iterator[str]:
    """What breaks a bound of a drawn net, one line each; nothing where all hold.

    Args:
        names: of the sets; default: all of :func:`sets_for`.

    Raises:
        SpecError: the net is refused.
    """
    net, x = drawn.build(), image(drawn)
    exact, wide = copy.deepcopy(net).double(), x.double()
    with default_dtype(drawn.dtype):
        bounded = bounded_module(net, drawn.shape)
    certifier = Certifier(net, drawn.shape, QUICK)
    with torch.no_grad():
        y = net(x).argmax(1)
    sets = sets_for(drawn.shape, drawn.seed)
    for name in names or sets:
        perturbation = sets[name]
        low, high = reached(exact, wide, perturbation)
        slack = (1e-4 if drawn.dtype == torch.float32 else 1e-9) * max(
            1.0, float(high.abs().max()), float(low.abs().max())
        )
        for method in ("IBP", "CROWN-IBP", "CROWN"):
            with torch.no_grad(), default_dtype(drawn.dtype):
                lower, upper = bounded.compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)
            over = max(float((lower[0] - low).max()), float((high - upper[0]).max()))
            if not over <= slack:
                yield f"{name} {method}: a bound of the logits is broken by {over:.3g}"
        point = worst(exact, wide, y, perturbation)
        with torch.no_grad():
            margin = -float(worst_margin_loss(exact(point), y))
        for method in methods:
            if method in ("coupled", "lipschitz") and not perturbation.shared_budget:
                continue
            bound = float(certifier.lower_bound(x, y, perturbation, method))
            if bound > margin + slack:
                yield f"{name} {method}: margin {margin:.6g} lies below its bound {bound:.6g}"


def worst(net: nn.Module, x: Tensor, y: Tensor, perturbation: PerturbationSet, steps: int = 60) -> Tensor:
    """The point of the smallest margin that a long attack with several starts meets, (1, *input)."""
    many = 6
    generator = torch.Generator().manual_seed(1)
    repeated, labels = x.expand(many, *x.shape[1:]), y.expand(many)
    points = torch.cat(
        [
            pgd(net, repeated, labels, perturbation, Pgd(steps, worst_margin_loss), generator),
            pgd(net, x, y, perturbation, Pgd(steps, worst_margin_loss, False, 0.7), generator),
        ]
    )
    with torch.no_grad():
        best = worst_margin_loss(net(points), y.expand(len(points))).argmax()
    return points[best : best + 1]


def lost(drawn: Drawn, perturbation: PerturbationSet, by: float) -> tuple[nn.Module, Tensor, Tensor]:
    """(net, x (1, *shape), y (1,)): the drawn net with one logit moved until a long attack wins by ``by`` and no more.

    The margin at the attack's point is that of the real-number function of the net's weights, up to float64.
    """
    net, x = drawn.build(), image(drawn)
    with torch.no_grad():
        y = net(x).argmax(1)
        exact = copy.deepcopy(net).double()
    point = worst(exact, x.double(), y, perturbation)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.bias[y] -= (-worst_margin_loss(exact(point), y)).to(last.bias) + by
        while float(-worst_margin_loss(copy.deepcopy(net).double()(point), y)) > -by / 2:
            last.bias[y] -= by / 2 + torch.finfo(last.bias.dtype).eps * last.bias[y].abs()
    return net, x, y


def wrongly_proved(drawn: Drawn, name: str, by: float) -> str:
    """What proves a net that :func:`lost`, over the set of that name; empty where nothing does.

    Raises:
        SpecError: the net is refused.
    """
    perturbation = sets_for(drawn.shape, drawn.seed)[name]
    net, x, y = lost(drawn, perturbation, by)
    certifier = Certifier(net, drawn.shape, QUICK)
    return f"{name}: proved, though a point loses by {by:.3g}" if bool(certifier.proved(x, y, perturbation)) else ""


def broken_proof(drawn: Drawn, name: str, steps: int = 60) -> str:
    """What breaks a proof of the drawn net, one logit moved until it is only just proved; empty where nothing does.

    Raises:
        SpecError: the net is refused.
    """
    perturbation = sets_for(drawn.shape, drawn.seed)[name]
    net, x = drawn.build(), image(drawn)
    with torch.no_grad():
        y = net(x).argmax(1)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    certifier = Certifier(net, drawn.shape, QUICK)
    method = "coupled" if perturbation.shared_budget else "CROWN"
    lower = float(certifier.lower_bound(x, y, perturbation, method))
    for by in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1):
        with torch.no_grad():
            last.bias[y] += by * max(1.0, abs(lower)) - lower
        if bool(net(x).argmax(1) == y) and bool(certifier.proved(x, y, perturbation)):
            exact = copy.deepcopy(net).double()
            point = worst(exact, x.double(), y, perturbation, steps)
            with torch.no_grad():
                margin = -float(worst_margin_loss(exact(point), y))
            return f"{name}: proved, though a point loses by {-margin:.3g}" if margin <= 0 else ""
        lower = by * max(1.0, abs(lower))
    return ""


def mode(drawn: Drawn) -> str:
    """``patches``, ``matrix``, or why the net is refused."""
    try:
        return str(bounded_module(drawn.build(), drawn.shape).bound_opts["conv_mode"])
    except SpecError as error:
        return f"refused: {error}"
