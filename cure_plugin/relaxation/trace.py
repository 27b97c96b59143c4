"""What a search rests on, kept where somebody wants to check it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cure_plugin.relaxation.dual import Duals
from cure_plugin.relaxation.reduced import ReducedNet


@dataclass
class Trace:
    """See above.

    Attributes:
        net: of the image, with the layers' boxes.
        boxes: (layer k, neurons (n,), duals of the neurons' rows and of the same negated, 2n).
        leaves: (which rows of the margins (L,), signs (L, N), duals) of subdomains that are proved.
    """

    net: ReducedNet | None = None
    boxes: list[tuple[int, Tensor, Duals]] = field(default_factory=list)
    leaves: list[tuple[Tensor, Tensor, Duals]] = field(default_factory=list)
