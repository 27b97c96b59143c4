"""Decide images one set at a time, each stage on what is left: IBP, attack, CROWN, coupled, alpha-CROWN, splitting."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cure_plugin.attacks import find_counterexample, pgd, worst_margin_loss
from cure_plugin.bounds.margins import LayerBounds
from cure_plugin.bounds.module import LOW_PRECISION
from cure_plugin.certification.bounder import Bounder
from cure_plugin.certification.splitting import SplitResult, prove_by_splitting
from cure_plugin.certification.verdict import Progress, Verdict
from cure_plugin.checks import check_count, check_shape
from cure_plugin.errors import SpecError
from cure_plugin.inputs import check_generator, check_weights, images, labels, like, plain_net
from cure_plugin.sets import PerturbationSet
from cure_plugin.sets.base import check_domain, check_set

METHODS = ("IBP", "CROWN-IBP", "CROWN", "coupled", "alpha-CROWN", "splitting")
"""In the order tried. ``coupled`` is tried on l1 and l2 balls, ``splitting`` on geometric and patch sets in place of
``alpha-CROWN``."""

BOUND_METHODS = METHODS[:-1]
"""Those that bound a whole set at once, see :meth:`Certifier.lower_bound`."""

_PIECE_ATTACK_STEPS = 10
"""Of PGD on the pieces of a split that no method proves."""


@dataclass(frozen=True)
class _Known:
    """What bounds of layers an earlier stage left behind: of the images ``index`` (ascending) of the batch."""

    index: Tensor
    layers: LayerBounds

    def of(self, left: Tensor) -> LayerBounds:
        """Those of ``left``, some of the images."""
        return self.layers.select(torch.searchsorted(self.index, left))


class Certifier:
    """Proves or refutes robustness of images for any set.

    Args:
        net: classifier in eval mode, (B, *input_shape) to (B, C). Of float16 and bfloat16 nets a copy in float64 is
            attacked and bounded, made here and now: verdicts are about the real-number function of the weights, in
            every precision.
        input_shape: without the batch axis.
        methods: which of :data:`METHODS` to try, in that order.
        attack_steps, restarts: of the attack, see :func:`~cure_plugin.attacks.find_counterexample`.
        alpha_iterations: optimisation steps of alpha-CROWN.
        batch_size: images worked on together, at most; bound methods take fewer where memory asks for it.
        pieces: that splitting may bound per image.
        memory: GiB that one bound computation may take, by an estimate for nets all of whose neurons are
            unstable. A single image may need more.

    Raises:
        SpecError: an unknown method, a number below 1, weights that are not finite, or a shape that the net does
            not take.
    """

    def __init__(
        self,
        net: nn.Module,
        input_shape: tuple[int, ...],
        methods: Sequence[str] = METHODS,
        attack_steps: int = 40,
        restarts: int = 2,
        alpha_iterations: int = 20,
        batch_size: int = 20,
        pieces: int = 1000,
        memory: float = 2.0,
    ) -> None:
        if isinstance(methods, str) or not isinstance(methods, Sequence):
            raise SpecError(f"methods must be a list of some of {', '.join(METHODS)}; got {methods!r}")
        for method in methods:
            if method not in METHODS:
                raise SpecError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        for name, value in (
            ("attack_steps", attack_steps),
            ("restarts", restarts),
            ("alpha_iterations", alpha_iterations),
            ("batch_size", batch_size),
            ("pieces", pieces),
        ):
            check_count(name, value, 1)
        if not isinstance(memory, int | float) or not 0 < memory < math.inf:
            raise SpecError(f"memory must be a finite number of GiB above 0, got {memory!r}")
        net = plain_net(net)
        check_weights(net)
        if like(net).dtype in LOW_PRECISION:
            net = copy.deepcopy(net).double()
        self.net = net.eval()
        self.input_shape = check_shape("input_shape", input_shape)
        self.methods = tuple(methods)
        self.attack_steps, self.restarts = attack_steps, restarts
        self.alpha_iterations, self.memory = alpha_iterations, memory
        self.batch_size, self.pieces = batch_size, pieces
        self._bounder = Bounder(self.net, self.input_shape, alpha_iterations, batch_size, memory)

    def decide(
        self, x: Tensor, y: Tensor, perturbation: PerturbationSet, generator: torch.Generator | None = None
    ) -> tuple[list[Verdict], Tensor]:
        """Verdicts for a batch.

        Args:
            x: (B, *input_shape) in the set's domain; y: labels (B,).
            generator: of the attack's random starts.

        Returns:
            (one verdict per image, points (B, *input_shape): the counterexample where falsified, else x).

        Raises:
            SpecError: shapes that do not fit the net, images that the set refuses, or no set of ours.
        """
        x, y = self.checked(x, y, perturbation)
        check_generator(generator)
        progress = Progress(x)
        clean_margin = self._margins(x, y)
        for index in (clean_margin <= 0).nonzero().flatten().tolist():
            progress.falsify(index, "clean", float(clean_margin[index]), x[index])
        known: _Known | None = None
        for step in self._stages(perturbation):
            left = progress.left()
            if left.numel() == 0:
                break
            started = time.perf_counter()
            some = perturbation.select(x, left)
            if step == "pgd":
                self._attack(progress, left, x[left], y[left], some, generator)
            elif step == "splitting":
                for index in left.tolist():
                    one = torch.tensor([index])
                    result = self.split(x[one], y[one], perturbation.select(x, one), generator)
                    progress.bound(index, step, result.margin, result.proved, result.pieces)
                    if result.counterexample is not None:
                        point = result.counterexample
                        progress.falsify(index, step, float(self._margins(point[None], y[one])), point)
            else:
                found = self._bounder.bound(x[left], y[left], some, step, known.of(left) if known else None)
                known = _Known(left, found.layers) if found.layers else known
                for index, bound, proved in zip(
                    left.tolist(), found.lower.tolist(), found.proved.tolist(), strict=True
                ):
                    progress.bound(index, step, bound, proved)
            progress.spend(left, time.perf_counter() - started)
        return progress.verdicts(), progress.points

    def _stages(self, perturbation: PerturbationSet) -> list[str]:
        """What is tried on ``perturbation``, in order."""
        splits = bool(perturbation.split_methods) and "splitting" in self.methods
        useless = {"alpha-CROWN"} if splits else {"splitting"}
        if not perturbation.shared_budget:
            useless.add("coupled")
        bounds = [method for method in METHODS if method in self.methods and method not in useless]
        return [*(method for method in bounds if method == "IBP"), "pgd", *(m for m in bounds if m != "IBP")]

    def checked(self, x: Any, y: Any, perturbation: PerturbationSet) -> tuple[Tensor, Tensor]:
        """(x in the net's dtype, y as whole numbers); see :mod:`cure_plugin.inputs`.

        Raises:
            SpecError: images or labels that do not fit the net, images outside the set's domain, or no set.
        """
        check_set(perturbation)
        x = images(x, self.input_shape, like(self.net).dtype)
        for part in perturbation.parts():
            if getattr(part, "domain", None) is not None:
                check_domain(x, part.domain)
        with torch.no_grad():
            self._bounder.check_outputs(x, self.net(x))
        return x, labels(y, len(x), self._bounder.classes)

    def _attack(
        self,
        progress: Progress,
        left: Tensor,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationSet,
        generator: torch.Generator | None,
    ) -> None:
        """Mark as falsified, with the point found, what the attack breaks of the images ``left`` of the batch."""
        found, candidates = find_counterexample(
            self.net, x, y, perturbation, self.attack_steps, self.restarts, generator
        )
        reached = self._margins(candidates, y)
        for position in found.nonzero().flatten().tolist():
            progress.falsify(int(left[position]), "pgd", float(reached[position]), candidates[position])

    def split(
        self, x: Tensor, y: Tensor, perturbation: PerturbationSet, generator: torch.Generator | None = None
    ) -> SplitResult:
        """Branch and bound over the pieces of a set around one image (1, *input_shape), label (1,).

        Args:
            generator: of the random starts of attacks on pieces; default: a fresh one of seed 0.

        Raises:
            SpecError: more than one image, or a set without pieces.
        """
        x, y = self.checked(x, y, perturbation)
        if x.shape[0] != 1 or not perturbation.split_methods:
            raise SpecError(f"splitting takes one image and a set with pieces, got {tuple(x.shape)}, {perturbation!r}")
        starts = generator or torch.Generator(x.device).manual_seed(0)

        def attack(x: Tensor, y: Tensor, pieces: PerturbationSet) -> Tensor | None:
            points = pgd(self.net, x, y, pieces, _PIECE_ATTACK_STEPS, worst_margin_loss, True, starts)
            margin, worst = self._margins(points, y).min(0)
            return points[worst] if margin <= 0 else None

        return prove_by_splitting(self._prove, attack, x, y, perturbation, self.pieces, self.batch_size)

    def proved(self, x: Tensor, y: Tensor, perturbation: PerturbationSet) -> Tensor:
        """Which images bounds and splitting prove, without any attack; (B,) bool."""
        x, y = self.checked(x, y, perturbation)
        done = torch.zeros(x.shape[0], dtype=torch.bool)
        for method in self._stages(perturbation):
            left = (~done).nonzero().flatten()
            if left.numel() == 0 or method == "pgd":
                continue
            if method == "splitting":
                alone = [(x[i : i + 1], y[i : i + 1], perturbation.select(x, left.new_tensor([i]))) for i in left]
                done[left] = torch.tensor([self.split(*one).proved for one in alone])
            else:
                done[left] = self.proves(x[left], y[left], perturbation.select(x, left), method)
        return done

    def proves(self, x: Tensor, y: Tensor, perturbation: PerturbationSet, method: str) -> Tensor:
        """Which images one of :data:`BOUND_METHODS` proves, rounding errors counted; (B,) bool."""
        _check_method(method)
        return self._bounder.bound(*self.checked(x, y, perturbation), perturbation, method).proved

    def lower_bound(self, x: Tensor, y: Tensor, perturbation: PerturbationSet, method: str) -> Tensor:
        """Lower bound of the smallest margin of each image, (B,), by one of :data:`BOUND_METHODS`, as computed.

        See :meth:`proves` for what it is worth: rounding errors are not taken off.
        """
        _check_method(method)
        return self._bounder.bound(*self.checked(x, y, perturbation), perturbation, method).lower

    def _prove(self, x: Tensor, y: Tensor, perturbation: PerturbationSet, method: str) -> tuple[Tensor, Tensor]:
        found = self._bounder.bound(x, y, perturbation, method)
        return found.lower, found.proved

    def _margins(self, points: Tensor, y: Tensor) -> Tensor:
        """z_y - max over j != y of z_j at ``points`` (B, *input_shape), (B,)."""
        with torch.no_grad():
            return -worst_margin_loss(self.net(points), y)


def _check_method(method: str) -> None:
    if method not in BOUND_METHODS:
        raise SpecError(f"unknown method {method!r}; known: {', '.join(BOUND_METHODS)}")
