"""The methods that bound a whole set at once, cheapest first: IBP, CROWN-IBP, CROWN, coupled, alpha-CROWN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.attacks import worst_margin_loss
from cure_plugin.bounds.margins import NodeBox, lower_margins, relu_boxes, start_slopes
from cure_plugin.bounds.memory import alpha_crown_bytes, coupled_bytes, crown_bytes
from cure_plugin.bounds.operators import optimisable
from cure_plugin.bounds.parts import only_relus_bend
from cure_plugin.bounds.radii import Radius
from cure_plugin.bounds.rounding import required_margins
from cure_plugin.certification.bounder import Bounder
from cure_plugin.certification.method import METHODS, BoundMethod, Piece, PieceBounds
from cure_plugin.checks import check_count
from cure_plugin.modes import frozen
from cure_plugin.sets import PerturbationSet

_BEYOND_REACH = 3.0
"""Share of the clean margin: images whose bound lies further below 0 over CROWN's boxes are not tried with
alpha-CROWN's own. On the nets that were measured it proved none beyond 1.5, at ten times the first step's work."""


class _BoxMethod(BoundMethod):
    """Bounds whose layers are bounded by intervals.

    Attributes:
        spelling: what auto_LiRPA calls it.
    """

    spelling: ClassVar[str]

    def bounds(self, bounder: Bounder, piece: Piece) -> PieceBounds:
        with torch.no_grad():
            margins = lower_margins(bounder.bounded, piece.x, piece.y, piece.perturbation, self.spelling)
        return PieceBounds(margins.amin(1).cpu(), relu_boxes(bounder.bounded))


@METHODS.register("IBP")
@dataclass(frozen=True)
class IbpBound(_BoxMethod):
    """Interval bound propagation (Gowal et al. 2018), behind an exact first layer."""

    spelling = "IBP"


@METHODS.register("lipschitz")
@dataclass(frozen=True)
class LipschitzBound(BoundMethod):
    """What the layers' norms leave of the clean margins, see :meth:`~cure_plugin.bounds.radii.GraphRadii.apart`.

    Next to nothing of nets that were not trained for it, and next to no time.
    """

    def applies_to(self, perturbation: PerturbationSet) -> bool:
        return perturbation.shared_budget

    def bounds(self, bounder: Bounder, piece: Piece) -> PieceBounds:
        with torch.no_grad():
            logits = bounder.net(piece.x).double()
        start = Radius(*piece.perturbation.radii(piece.x))
        apart = bounder.coupled.radii.apart(bounder.bounded.final_node(), start)
        index = torch.arange(len(piece.y))
        margins = logits[index, piece.y][:, None] - logits - apart[index, piece.y]
        margins[index, piece.y] = torch.inf
        return PieceBounds(margins.amin(1).to(piece.x).cpu(), {})


@METHODS.register("CROWN-IBP")
@dataclass(frozen=True)
class CrownIbpBound(_BoxMethod):
    """CROWN from the logits over IBP's boxes (Zhang et al. 2020)."""

    spelling = "CROWN-IBP"


class _Dividing(BoundMethod):
    """Backward bounds, of a net that only ReLUs bend within the memory asked for."""

    def divides(self, bounded: BoundedModule) -> bool:
        return only_relus_bend(bounded)


@METHODS.register("CROWN")
@dataclass(frozen=True)
class Crown(_Dividing):
    """CROWN from every layer (Zhang et al. 2018), but for neurons that known boxes show not to bend."""

    def bytes_per_image(self, bounded: BoundedModule, itemsize: int) -> int:
        return crown_bytes(bounded, itemsize)

    def bounds(self, bounder: Bounder, piece: Piece) -> PieceBounds:
        layers = bounder.crown(piece, piece.known.boxes if piece.known else None)
        return PieceBounds(layers.margins.amin(1).cpu(), layers.boxes, layers)


@METHODS.register("coupled")
@dataclass(frozen=True)
class Coupled(_Dividing):
    """Bounds that keep the budget that all pixels of an l1 or l2 ball share, see :mod:`cure_plugin.bounds.coupled`."""

    def applies_to(self, perturbation: PerturbationSet) -> bool:
        return perturbation.shared_budget

    def bytes_per_image(self, bounded: BoundedModule, itemsize: int) -> int:
        return max(coupled_bytes(bounded, itemsize).values())

    def bounds(self, bounder: Bounder, piece: Piece) -> PieceBounds:
        x, y, perturbation = piece.x, piece.y, piece.perturbation
        known = piece.known or bounder.crown(piece)
        # any margin above 0 will do: rounds that would carry it past rounding cost more than float64 does
        aim = required_margins(bounder.bounded, x, y, perturbation, known.boxes)
        with frozen(bounder.net):
            layers = bounder.coupled.bounds(x, y, perturbation, known=known, aim=aim, skipped=piece.skipped)
        return PieceBounds(layers.margins.amin(1).cpu(), layers.boxes, layers)


@METHODS.register("alpha-CROWN")
@dataclass(frozen=True)
class AlphaCrown(_Dividing):
    """CROWN with optimised slopes (Xu et al. 2021): where boxes are known, of the margins alone; then in full.

    Boxes that coupling made are better than its own, so they stay. What coupling found hopeless keeps its bound, and so
    does what the first step leaves beyond :data:`_BEYOND_REACH`.

    Attributes:
        iterations: optimisation steps.
    """

    iterations: int = 20

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations, 1)

    def bytes_per_image(self, bounded: BoundedModule, itemsize: int) -> int:
        return alpha_crown_bytes(bounded, itemsize)

    def bounds(self, bounder: Bounder, piece: Piece) -> PieceBounds:
        # what the wrapper itself holds is of whatever came before
        return PieceBounds(self._lower(bounder, piece), piece.known.boxes if piece.known else {})

    def _lower(self, bounder: Bounder, piece: Piece) -> Tensor:
        fits = bounder.fits(self)
        known = piece.known if fits else piece.known or bounder.crown(piece)
        if known is None:
            return self._optimised(bounder, piece, None)
        lower = known.margins.amin(1).cpu()
        some = (~known.hopeless.cpu()).nonzero().flatten()
        if some.numel() == 0:
            return lower
        found = self._optimised(bounder, piece.select(some), known.select(some).boxes)
        lower[some] = torch.fmax(lower[some], found)
        if bool(known.rounds.any()) or not fits:  # coupling made the boxes, or there is no room for its own
            return lower
        with torch.no_grad():
            clean = -worst_margin_loss(bounder.net(piece.x), piece.y).cpu()
        left = (~(lower > 0) & ~(lower < -_BEYOND_REACH * clean.clamp(min=0))).nonzero().flatten()
        if left.numel():
            full = self._optimised(bounder, piece.select(left), None)
            lower[left] = torch.fmax(lower[left], full)
        return lower

    def _optimised(self, bounder: Bounder, piece: Piece, boxes: dict[str, NodeBox] | None) -> Tensor:
        """alpha-CROWN over given ``boxes`` of the layers, or with those of its own; (B,)."""
        x, y, perturbation = piece.x, piece.y, piece.perturbation
        if not bounder.bounded.relus or not optimisable(bounder.bounded):  # no slopes to choose, or none that it can
            return bounder.crown(piece).margins.amin(1).cpu()

        def margins(sparse: bool) -> Tensor:
            steps = {"iteration": self.iterations, "enable_beta_crown": False, "init_alpha": boxes is None}
            # sparse: slopes for unstable neurons only, several times faster
            bounded = bounder.fresh({"optimize_bound_args": steps, "sparse_spec_alpha": sparse})
            if boxes is not None:
                start_slopes(bounded, x, y, perturbation, boxes)
            return lower_margins(bounded, x, y, perturbation, "alpha-CROWN", boxes=boxes)

        with frozen(bounder.net):
            try:
                found = margins(sparse=True)
            except AssertionError:  # 0.3, where rounding changes which neurons are unstable from pass to pass
                found = margins(sparse=False)
        return found.detach().amin(1).cpu()
