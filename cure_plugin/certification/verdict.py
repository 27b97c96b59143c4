"""What is known of an image and a set, and of a batch while it is being decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cure_plugin.certification.method import Found, Method

Status = Literal["proved", "falsified", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What is known of one image and one set.

    Attributes:
        status: ``proved``, ``falsified`` (the clean image, or a point found in the set, is misclassified) or
            ``undecided``.
        margin: best lower bound of the smallest margin z_y - z_j over the set; for ``falsified`` the margin
            at the counterexample (<= 0); -inf where none was found.
        stage: what decided, or the last method tried: ``clean``, ``pgd``, a bound method, or ``by <set>`` where a
            larger set's proof or a smaller set's counterexample settled it.
        seconds: this image's share of the time spent; 0 where it was not kept.
        pieces: how many pieces of the set, or subdomains of neurons, were bounded.
        depth: the most splits that one of them took.
    """

    status: Status
    margin: float
    stage: str
    seconds: float = 0.0
    pieces: int = 0
    depth: int = 0


class Progress:
    """The images of one batch on their way to verdicts.

    Args:
        x: the clean images (B, *input).
    """

    def __init__(self, x: Tensor) -> None:
        count = x.shape[0]
        self._status: list[Status] = ["undecided"] * count
        self._stage = ["none"] * count
        self._margin, self._seconds = [float("-inf")] * count, [0.0] * count
        self._pieces, self._depth = [0] * count, [0] * count
        self.points = x.clone()

    def left(self) -> Tensor:
        """Indices (L,) of the undecided images."""
        return torch.tensor([i for i, status in enumerate(self._status) if status == "undecided"], dtype=torch.long)

    def take(self, left: Tensor, method: Method, found: Found) -> None:
        """What a method found of the images ``left``."""
        none = torch.zeros(len(left), dtype=torch.long)
        pieces, depth = (none if counts is None else counts for counts in (found.pieces, found.depth))
        rows = zip(left.tolist(), found.margins.tolist(), found.proved.tolist(), strict=True)
        for position, (index, margin, proved) in enumerate(rows):
            self._pieces[index] = max(self._pieces[index], int(pieces[position]))
            self._depth[index] = max(self._depth[index], int(depth[position]))
            if found.refuted is not None and found.points is not None and bool(found.refuted[position]):
                self.falsify(index, method.name, margin, found.points[position])
            elif method.proves:
                self.bound(index, method.name, margin, proved)

    def falsify(self, index: int, stage: str, margin: float, point: Tensor) -> None:
        """A misclassified ``point`` of the set around image ``index``, with its margin."""
        self._status[index], self._stage[index], self._margin[index] = "falsified", stage, margin
        self.points[index] = point

    def bound(self, index: int, stage: str, margin: float, proved: bool) -> None:
        """A lower bound of image ``index``; NaN says nothing."""
        self._margin[index] = max(self._margin[index], margin)  # max keeps its first argument against NaN
        self._stage[index] = stage
        self._status[index] = "proved" if proved else "undecided"

    def spend(self, indices: Tensor, seconds: float) -> None:
        """Share ``seconds`` between images."""
        for index in indices.tolist():
            self._seconds[index] += seconds / len(indices)

    def verdicts(self) -> list[Verdict]:
        """One per image."""
        margins, seconds = [round(m, 6) for m in self._margin], [round(s, 4) for s in self._seconds]
        values = zip(self._status, margins, self._stage, seconds, self._pieces, self._depth, strict=True)
        return [Verdict(*one) for one in values]
