"""Decide images one set at a time, each method on what is left: IBP, attack, CROWN, coupled, alpha-CROWN, splitting."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cure_plugin.attacks import worst_margin_loss
from cure_plugin.bounds.memory import default_memory
from cure_plugin.bounds.module import LOW_PRECISION
from cure_plugin.certification.bounder import Bounder
from cure_plugin.certification.cascade import CASCADE, read_methods, run
from cure_plugin.certification.method import METHODS, BoundMethod, Method, Piece, Work
from cure_plugin.certification.splitting import SplitResult, Splitting
from cure_plugin.certification.verdict import Progress, Verdict
from cure_plugin.checks import check_count, check_shape
from cure_plugin.errors import SpecError
from cure_plugin.inputs import check_generator, check_weights, images, labels, like, plain_net
from cure_plugin.progress import Watch, unwatched
from cure_plugin.sets import PerturbationSet
from cure_plugin.sets.base import check_set

_SPELLED_BEFORE = {
    "attack_steps": ("pgd", "steps"),
    "restarts": ("pgd", "restarts"),
    "alpha_iterations": ("alpha-CROWN", "iterations"),
    "pieces": ("splitting", "pieces"),
}
"""Arguments of version 0.1: of which method, and what it calls them."""


class Certifier:
    """Proves or refutes robustness of images for any set.

    Args:
        net: classifier in eval mode, (B, *input_shape) to (B, C). Of float16 and bfloat16 nets a copy in float64 is
            attacked and bounded, made here and now: verdicts are about the real-number function of the weights, in
            every precision.
        input_shape: without the batch axis.
        methods: what to try, in that order: objects as ``AlphaCrown(iterations=50)``, or names in
            :data:`~cure_plugin.certification.method.METHODS`, which are tried in the cascade's order, with the attack.
        batch_size: images worked on together, at most; bound methods take fewer where memory asks for it.
        memory: GiB that one bound computation may take, by an estimate for nets all of whose neurons are
            unstable; default: 2, on a GPU half of what is free there now. A single image may need more where something
            else than ReLUs bends (a :class:`MemoryWarning`).
        spelled_before: ``attack_steps``, ``restarts``, ``alpha_iterations`` and ``pieces``, as up to version 0.1;
            deprecated: they are options of the methods.

    Raises:
        SpecError: an unknown method, a number below 1, weights that are not finite, or a shape that the net does
            not take.
    """

    def __init__(
        self,
        net: nn.Module,
        input_shape: tuple[int, ...],
        methods: Sequence[Method | str] = CASCADE,
        batch_size: int = 20,
        memory: float | None = None,
        **spelled_before: int,
    ) -> None:
        self.methods = _told(read_methods(methods), spelled_before)
        check_count("batch_size", batch_size, 1)
        net = plain_net(net)
        check_weights(net)
        memory = default_memory(like(net).device) if memory is None else memory
        if not isinstance(memory, int | float) or not 0 < memory < math.inf:
            raise SpecError(f"memory must be a finite number of GiB above 0, got {memory!r}")
        if like(net).dtype in LOW_PRECISION:
            net = copy.deepcopy(net).double()
        self.net = net.eval()
        self.input_shape = check_shape("input_shape", input_shape)
        self.batch_size, self.memory = batch_size, memory
        self._bounder = Bounder(self.net, self.input_shape, batch_size, memory)

    def decide(
        self,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationSet,
        generator: torch.Generator | None = None,
        watch: Watch = unwatched,
    ) -> tuple[list[Verdict], Tensor]:
        """Verdicts for a batch.

        Args:
            x: (B, *input_shape) in the set's domain; y: labels (B,).
            generator: of the attack's random starts.
            watch: told, while an image is split, how many pieces were bounded so far and their worst bound.

        Returns:
            (one verdict per image, points (B, *input_shape): the counterexample where falsified, else x).

        Raises:
            SpecError: shapes that do not fit the net, images that the set refuses, or no set of ours.
        """
        x, y, logits = self._compared(x, y, perturbation)
        check_generator(generator)
        progress = Progress(x)
        clean_margin = -worst_margin_loss(logits, y)
        for index in (clean_margin <= 0).nonzero().flatten().tolist():
            progress.falsify(index, "clean", float(clean_margin[index]), x[index])
        run(self.methods, replace(self._work(x, y, perturbation, generator), watch=watch), progress)
        return progress.verdicts(), progress.points

    def checked(self, x: Any, y: Any, perturbation: PerturbationSet) -> tuple[Tensor, Tensor]:
        """(x in the net's dtype, y as whole numbers); see :mod:`cure_plugin.inputs`.

        Raises:
            SpecError: images or labels that do not fit the net, images outside the set's domain, or no set.
        """
        check_set(perturbation)
        x = images(x, self.input_shape, like(self.net).dtype)
        perturbation.check(x)
        return x, labels(y, len(x), self._bounder.classes)

    def work(self, x: Any, y: Any, perturbation: PerturbationSet) -> Work:
        """:meth:`checked` images and labels as methods take them.

        Raises:
            SpecError: as there, or the bounded graph's logits are not the net's.
        """
        x, y, _ = self._compared(x, y, perturbation)
        return self._work(x, y, perturbation)

    def _compared(self, x: Any, y: Any, perturbation: PerturbationSet) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`checked` images and labels, and the net's logits (B, C): the bounded graph's too, or it is refused."""
        x, y = self.checked(x, y, perturbation)
        with torch.no_grad():
            logits = self.net(x)
        self._bounder.check_outputs(x, logits)
        return x, y, logits

    def split(
        self, x: Tensor, y: Tensor, perturbation: PerturbationSet, generator: torch.Generator | None = None
    ) -> SplitResult:
        """Branch and bound over the pieces of a set around one image (1, *input_shape), label (1,).

        Args:
            generator: of the random starts of attacks on pieces; default: a fresh one of seed 0.

        Raises:
            SpecError: more than one image, or a set without pieces.
        """
        x, y, _ = self._compared(x, y, perturbation)
        if x.shape[0] != 1 or not perturbation.split_methods:
            raise SpecError(f"splitting takes one image and a set with pieces, got {tuple(x.shape)}, {perturbation!r}")
        method = next((method for method in self.methods if isinstance(method, Splitting)), Splitting())
        return method.split(self._work(x, y, perturbation, generator))

    def proved(self, x: Tensor, y: Tensor, perturbation: PerturbationSet) -> Tensor:
        """Which images bounds and splitting prove, without any attack on the whole set; (B,) bool."""
        x, y, _ = self._compared(x, y, perturbation)
        progress = Progress(x)
        run([method for method in self.methods if method.proves], self._work(x, y, perturbation), progress)
        return torch.tensor([verdict.status == "proved" for verdict in progress.verdicts()])

    def proves(self, x: Tensor, y: Tensor, perturbation: PerturbationSet, method: BoundMethod | str) -> Tensor:
        """Which images one method proves, rounding errors counted; (B,) bool.

        Args:
            method: one that bounds a whole set at once, or its name.
        """
        x, y, _ = self._compared(x, y, perturbation)
        return self._bounder.bound(Piece(region=perturbation.around(x), y=y), self._one(method)).proved

    def lower_bound(self, x: Tensor, y: Tensor, perturbation: PerturbationSet, method: BoundMethod | str) -> Tensor:
        """Lower bound of the smallest margin of each image, (B,), by one method, as computed.

        See :meth:`proves` for what it is worth: rounding errors are not taken off.
        """
        x, y, _ = self._compared(x, y, perturbation)
        return self._bounder.bound(Piece(region=perturbation.around(x), y=y), self._one(method)).lower

    def _work(
        self, x: Tensor, y: Tensor, perturbation: PerturbationSet, generator: torch.Generator | None = None
    ) -> Work:
        return Work(bounder=self._bounder, region=perturbation.around(x), y=y, generator=generator)

    def _one(self, method: Any) -> BoundMethod:
        """A method by name: the certifier's own where it has that, else with its defaults."""
        own = (one for one in self.methods if one.name == method)
        found = method if isinstance(method, Method) else next(own, None) or METHODS.make(method)
        if not isinstance(found, BoundMethod):
            known = [name for name in METHODS if issubclass(METHODS.named(name), BoundMethod)]
            raise SpecError(f"{found.name} bounds no whole set at once; methods that do: {', '.join(known)}")
        return found


def _told(methods: tuple[Method, ...], options: Mapping[str, int]) -> tuple[Method, ...]:
    """``methods`` with options that version 0.1 gave to the certifier."""
    for key, value in options.items():
        if key not in _SPELLED_BEFORE:
            raise SpecError(f"unknown argument {key!r}; known: methods, batch_size, memory")
        check_count(key, value, 1)
        name, option = _SPELLED_BEFORE[key]
        methods = tuple(replace(one, **{option: value}) if one.name == name else one for one in methods)  # type: ignore[type-var]
        remedy = f"{type(METHODS.make(name)).__name__}({option}={value})"
        warnings.warn(f"{key} of Certifier will go: give {remedy} in methods", DeprecationWarning, stacklevel=3)
    return methods
