"""A certification method of your own: the better of IBP's and CROWN-IBP's bounds, class by class.

Registered under a name, it works in ``Certifier(net, shape, [ClassByClass()])`` and on the command line
(``cure certify ... --methods class-by-class``). Name this module in the entry-point group ``cure_plugin.methods`` and
it is found without an import.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cure_plugin.bounds.margins import lower_margins, relu_boxes
from cure_plugin.certification import METHODS, BoundMethod, Piece, PieceBounds
from cure_plugin.certification.bounder import Bounder


@METHODS.register("class-by-class")
@dataclass(frozen=True)
class ClassByClass(BoundMethod):
    """One class may be ruled out by the one, another by the other: the smallest of the larger margins is a bound."""

    def bounds(self, bounder: Bounder, piece: Piece) -> PieceBounds:
        with torch.no_grad():
            found = [
                lower_margins(bounder.bounded, piece.x, piece.y, piece.perturbation, method)
                for method in ("IBP", "CROWN-IBP")
            ]
        return PieceBounds(torch.fmax(*found).amin(1).cpu(), relu_boxes(bounder.bounded))
