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
        pieces: how many pieces splitting bounded.
    """

    status: Status
    margin: float
    stage: str
    seconds: float = 0.0
    pieces: int = 0


class Progress:
    """The images of one batch on their way to verdicts.

    Args:
        x: the clean images (B, *input).
    """

    def __init__(self, x: Tensor) -> None:
        count = x.shape[0]
        self._status: list[Status] = ["undecided"] * count
        self._stage = ["none"] * count
        self._margin, self._seconds, self._pieces = [float("-inf")] * count, [0.0] * count, [0] * count
        self.points = x.clone()

    def left(self) -> Tensor:
        """Indices (L,) of the undecided images."""
        return torch.tensor([i for i, status in enumerate(self._status) if status == "undecided"], dtype=torch.long)

    def take(self, left: Tensor, method: Method, found: Found) -> None:
        """What a method found of the images ``left``."""
        pieces = [0] * len(left) if found.pieces is None else found.pieces.tolist()
        rows = zip(left.tolist(), found.margins.tolist(), found.proved.tolist(), pieces, strict=True)
        for position, (index, margin, proved, count) in enumerate(rows):
            if found.refuted is not None and found.points is not None and bool(found.refuted[position]):
                self._pieces[index] = count
                self.falsify(index, method.name, margin, found.points[position])
            elif method.proves:
                self.bound(index, method.name, margin, proved, count)

    def falsify(self, index: int, stage: str, margin: float, point: Tensor) -> None:
        """A misclassified ``point`` of the set around image ``index``, with its margin."""
        self._status[index], self._stage[index], self._margin[index] = "falsified", stage, margin
        self.points[index] = point

    def bound(self, index: int, stage: str, margin: float, proved: bool, pieces: int = 0) -> None:
        """A lower bound of image ``index``; NaN says nothing."""
        self._margin[index] = max(self._margin[index], margin)  # max keeps its first argument against NaN
        self._stage[index], self._pieces[index] = stage, pieces
        self._status[index] = "proved" if proved else "undecided"

    def spend(self, indices: Tensor, seconds: float) -> None:
        """Share ``seconds`` between images."""
        for index in indices.tolist():
            self._seconds[index] += seconds / len(indices)

    def verdicts(self) -> list[Verdict]:
        """One per image."""
        margins, seconds = [round(m, 6) for m in self._margin], [round(s, 4) for s in self._seconds]
        values = zip(self._status, margins, self._stage, seconds, self._pieces, strict=True)
        return [Verdict(*one) for one in values]
