"""Decide images one set at a time, each stage on what is left: IBP, attack, CROWN, coupled, alpha-CROWN, splitting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cure_plugin.attacks import find_counterexample, worst_margin_loss
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.bounds.margins import lower_margins
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification.splitting import SplitResult, prove_by_splitting
from cure_plugin.errors import SpecError
from cure_plugin.modes import frozen
from cure_plugin.sets import PerturbationSet

METHODS = ("IBP", "CROWN-IBP", "CROWN", "coupled", "alpha-CROWN", "splitting")
"""In the order tried. ``coupled`` is tried on l1 and l2 balls, ``splitting`` on geometric and patch sets in place of
``alpha-CROWN``."""

BOUND_METHODS = METHODS[:-1]
"""Those that bound a whole set at once, see :meth:`Certifier.lower_bound`."""

ROUNDING_MARGIN = 1e-5
"""A margin counts as proved only above this share of max(1, largest clean logit).

Bounds are computed in the net's own precision with rounding to nearest; in float32 the sums of these
nets err by a few 1e-6 of their terms' size. Casting the net and the images to float64 leaves the margin far above
the error.
"""


def required_margin(logits: Tensor) -> Tensor:
    """How large a lower bound must be to count as a proof, (B,), from the clean logits (B, C)."""
    return ROUNDING_MARGIN * logits.abs().amax(1).clamp(min=1).cpu()


@dataclass(frozen=True)
class Verdict:
    """What is known of one image and one set.

    Attributes:
        status: ``proved``, ``falsified`` (the clean image, or a point found in the set, is misclassified) or
            ``undecided``.
        margin: best lower bound of the smallest margin z_y - z_j over the set; for ``falsified`` the margin
            at the counterexample (<= 0).
        stage: what decided, or the last method tried: ``clean``, ``pgd`` or a bound method.
        seconds: this image's share of the time spent.
        pieces: how many pieces splitting bounded.
    """

    status: str
    margin: float
    stage: str
    seconds: float
    pieces: int = 0


class Certifier:
    """Proves or refutes robustness of images for any set.

    Args:
        net: classifier in eval mode, (B, *input_shape) to (B, C).
        input_shape: without the batch axis.
        methods: which of :data:`METHODS` to try, in that order.
        attack_steps, restarts: of the PGD attack.
        alpha_iterations: optimisation steps of alpha-CROWN.
        pieces: that splitting may bound per image.
        batch_size: images bounded at a time (memory).

    Raises:
        SpecError: an unknown method or a number below 1.
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
    ) -> None:
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
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value!r}")
        self.net = net.eval()
        self.input_shape = tuple(input_shape)
        self.methods = tuple(methods)
        self.attack_steps, self.restarts = attack_steps, restarts
        self.alpha_iterations = alpha_iterations
        self.batch_size, self.pieces = batch_size, pieces
        self._bounded = bounded_module(self.net, self.input_shape)
        self._coupled = CoupledBounds(self._bounded)

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
            SpecError: shapes that do not fit the net, or images that the set refuses.
        """
        self._check(x, y)
        count = x.shape[0]
        status, stage = ["undecided"] * count, ["none"] * count
        margin = torch.full((count,), -torch.inf, dtype=x.dtype)
        seconds, pieces = torch.zeros(count), [0] * count
        points = x.clone()
        with torch.no_grad():
            logits = self.net(x)
            needed = required_margin(logits)
            clean_margin = -worst_margin_loss(logits, y).cpu()
        for index in (clean_margin <= 0).nonzero().flatten().tolist():
            status[index], stage[index], margin[index] = "falsified", "clean", clean_margin[index]
        for step in self._stages(perturbation):
            left = torch.tensor([i for i in range(count) if status[i] == "undecided"], dtype=torch.long)
            if left.numel() == 0:
                break
            started = time.perf_counter()
            if step == "pgd":
                self._attack(x, y, left, perturbation, generator, status, stage, margin, points)
            elif step == "splitting":
                for index in left.tolist():
                    one = torch.tensor([index])
                    result = self.split(x[one], y[one], perturbation.select(x, one))
                    stage[index], pieces[index] = step, result.pieces
                    margin[index] = max(float(margin[index]), result.margin)
                    status[index] = "proved" if result.proved else "undecided"
            else:
                bound = self.lower_bound(x[left], y[left], perturbation.select(x, left), step)
                for position, index in enumerate(left.tolist()):
                    margin[index] = torch.fmax(margin[index], bound[position])
                    stage[index] = step
                    if margin[index] > needed[index]:
                        status[index] = "proved"
            seconds[left] += (time.perf_counter() - started) / left.numel()
        verdicts = [
            Verdict(status[i], round(float(margin[i]), 6), stage[i], round(float(seconds[i]), 4), pieces[i])
            for i in range(count)
        ]
        return verdicts, points

    def _stages(self, perturbation: PerturbationSet) -> list[str]:
        """What is tried on ``perturbation``, in order."""
        splits = bool(perturbation.split_methods) and "splitting" in self.methods
        useless = {"alpha-CROWN"} if splits else {"splitting"}
        if not perturbation.shared_budget:
            useless.add("coupled")
        bounds = [method for method in METHODS if method in self.methods and method not in useless]
        return [*(method for method in bounds if method == "IBP"), "pgd", *(m for m in bounds if m != "IBP")]

    def _check(self, x: Tensor, y: Tensor) -> None:
        if tuple(x.shape[1:]) != self.input_shape or y.shape != x.shape[:1]:
            raise SpecError(
                f"x must be (B, {', '.join(map(str, self.input_shape))}) and y (B,), "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        classes = int(self._bounded.final_shape[-1])
        if classes < 2 or bool((y < 0).any() or (y >= classes).any()):
            raise SpecError(f"labels lie in {int(y.min())} .. {int(y.max())}, but the net has {classes} classes")

    def _attack(
        self,
        x: Tensor,
        y: Tensor,
        left: Tensor,
        perturbation: PerturbationSet,
        generator: torch.Generator | None,
        status: list[str],
        stage: list[str],
        margin: Tensor,
        points: Tensor,
    ) -> None:
        """Mark as falsified, with the point found, what PGD breaks."""
        found, candidates = find_counterexample(
            self.net, x[left], y[left], perturbation.select(x, left), self.attack_steps, self.restarts, generator
        )
        with torch.no_grad():
            reached = -worst_margin_loss(self.net(candidates), y[left]).cpu()
        for position, index in enumerate(left.tolist()):
            if found[position]:
                status[index], stage[index], margin[index] = "falsified", "pgd", reached[position]
                points[index] = candidates[position]

    def split(self, x: Tensor, y: Tensor, perturbation: PerturbationSet) -> SplitResult:
        """Branch and bound over the pieces of a set around one image (1, *input_shape), label (1,).

        Raises:
            SpecError: more than one image, or a set without pieces.
        """
        self._check(x, y)
        if x.shape[0] != 1 or not perturbation.split_methods:
            raise SpecError(f"splitting takes one image and a set with pieces, got {tuple(x.shape)}, {perturbation!r}")
        with torch.no_grad():
            needed = float(required_margin(self.net(x)))
        return prove_by_splitting(self.lower_bound, x, y, perturbation, needed, self.pieces, self.batch_size)

    def proved(self, x: Tensor, y: Tensor, perturbation: PerturbationSet) -> Tensor:
        """Which images the bound methods prove, without any attack or splitting; (B,) bool."""
        self._check(x, y)
        with torch.no_grad():
            needed = required_margin(self.net(x))
        done = torch.zeros(x.shape[0], dtype=torch.bool)
        for method in self._stages(perturbation):
            left = (~done).nonzero().flatten()
            if left.numel() and method in BOUND_METHODS:
                done[left] = self.lower_bound(x[left], y[left], perturbation.select(x, left), method) > needed[left]
        return done

    def lower_bound(self, x: Tensor, y: Tensor, perturbation: PerturbationSet, method: str) -> Tensor:
        """Lower bound of the smallest margin of each image, (B,), by one of :data:`BOUND_METHODS`."""
        parts = []
        for start in range(0, x.shape[0], self.batch_size):
            piece = slice(start, start + self.batch_size)
            some = perturbation.select(x, torch.arange(x.shape[0])[piece])
            if method == "coupled":
                with torch.no_grad():
                    needed = required_margin(self.net(x[piece]))
                with frozen(self.net):
                    margins = self._coupled.lower_margins(x[piece], y[piece], some, needed)
            elif method == "alpha-CROWN":
                bounded = bounded_module(  # a fresh one: 0.3 carries alphas over from one batch to the next
                    self.net,
                    self.input_shape,
                    {"optimize_bound_args": {"iteration": self.alpha_iterations, "enable_beta_crown": False}},
                )
                margins = lower_margins(bounded, x[piece], y[piece], some, method)
            else:
                with torch.no_grad():
                    margins = lower_margins(self._bounded, x[piece], y[piece], some, method)
            parts.append(margins.detach().amin(1).cpu())
        return torch.cat(parts)
