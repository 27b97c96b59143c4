"""The one loop over certification methods: each works on what those before it left undecided."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cure_plugin.bounds.margins import LayerBounds
from cure_plugin.certification.attack import Attack
from cure_plugin.certification.bound_methods import AlphaCrown, Coupled, Crown, CrownIbpBound, IbpBound, LipschitzBound
from cure_plugin.certification.bounder import Bounder
from cure_plugin.certification.branch_and_bound import BranchAndBound
from cure_plugin.certification.method import METHODS, Method, Work
from cure_plugin.certification.splitting import Splitting
from cure_plugin.certification.verdict import Progress
from cure_plugin.errors import SpecError
from cure_plugin.sets import PerturbationSet

CASCADE: tuple[Method, ...] = (
    IbpBound(),
    Attack(),
    LipschitzBound(),
    CrownIbpBound(),
    Crown(),
    Coupled(),
    BranchAndBound(),
    Splitting(),
    AlphaCrown(),
)
"""What is tried unless something else is asked for: cheap bounds, then the attack, then ever costlier bounds."""


@dataclass(frozen=True)
class _Known:
    """Bounds of layers that a method left behind: of the images ``index`` (ascending) of the batch."""

    index: Tensor
    layers: LayerBounds

    def of(self, left: Tensor) -> LayerBounds:
        """Those of ``left``, some of the images."""
        return self.layers.select(torch.searchsorted(self.index, left))


def applicable(
    methods: Sequence[Method], perturbation: PerturbationSet, bounder: Bounder | None = None
) -> Iterator[Method]:
    """Those of the ``methods`` that are worth trying on ``perturbation``, each asked when it is its turn.

    Args:
        bounder: whose net they must be able to read; default: any.
    """
    superseded: set[str] = set()
    for method in methods:
        fits = method.name not in superseded and method.applies_to(perturbation)
        if fits and (bounder is None or method.reads(bounder)):
            superseded.update(method.supersedes)
            yield method


def _left_to_pieces(method: Method, methods: Sequence[Method], work: Work) -> bool:
    """Whether splitting follows, and begins with the very ``method``, for which the whole set is too wide."""
    followed = any(isinstance(one, Splitting) for one in methods)
    return followed and work.perturbation.split_methods[:1] == (method.name,) and work.perturbation.is_wide(work.x)


def run(methods: Sequence[Method], work: Work, progress: Progress) -> None:
    """Let the ``methods`` that apply work, in their order, each on what is left of a batch.

    Args:
        progress: of the images of ``work``; takes what the methods find.
    """
    known: _Known | None = None
    left = progress.left()
    if left.numel() == 0:
        return
    for method in applicable(methods, work.perturbation, work.bounder):
        if _left_to_pieces(method, methods, work):
            continue
        started = time.perf_counter()
        found = method.run(replace(work.select(left), known=known.of(left) if known else None))
        known = _Known(left, found.layers) if found.layers else known
        progress.take(left, method, found)
        progress.spend(left, time.perf_counter() - started)
        left = progress.left()
        if left.numel() == 0:
            return


def read_methods(methods: Any) -> tuple[Method, ...]:
    """Methods as objects, those given by name made with their defaults, in the cascade's order and with the attack.

    Raises:
        SpecError: no list, an unknown name, or what is neither a method nor a name.
    """
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise SpecError(f"methods must be a list of some of {', '.join(METHODS)}; got {methods!r}")
    if methods and all(isinstance(method, Method) for method in methods):
        return tuple(methods)
    named = [method if isinstance(method, Method) else METHODS.make(method) for method in methods]
    if not any(isinstance(method, Attack) for method in named):
        named.append(Attack())
    order = [type(method) for method in CASCADE]
    return tuple(sorted(named, key=lambda m: order.index(type(m)) if type(m) in order else len(order)))


def timed(methods: Sequence[Method], seconds: float) -> tuple[Method, ...]:
    """The ``methods``, of which those that split neurons may take so many ``seconds`` an image."""
    splits = (BranchAndBound, Splitting)
    return tuple(replace(one, seconds=seconds) if isinstance(one, splits) else one for one in methods)
