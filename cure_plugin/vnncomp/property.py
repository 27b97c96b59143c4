"""A robustness property of a classifier: the one value that every format is written from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from cure_plugin.errors import SpecError

InputBox = tuple[np.ndarray, np.ndarray]
"""(lower, upper), float64 arrays (d,) over the network's flattened input."""


@dataclass(frozen=True)
class Ball:
    """Inputs within ``radius`` of ``centre`` (d,) in the l2 norm."""

    centre: np.ndarray
    radius: float


@dataclass(frozen=True)
class Budget:
    """Inputs whose entries ``index`` (ints) sum to at most ``bound``."""

    index: np.ndarray
    bound: float


@dataclass(frozen=True)
class Limit:
    """Runs whose output number ``output`` is at most ``bound``."""

    output: int
    bound: float


@dataclass(frozen=True)
class Property:
    """Does some allowed input let another class tie with or beat ``label``? (``sat`` if one does.)

    Attributes:
        shape: of the network's input, with the batch axis of 1.
        boxes: the input lies in one of them.
        label: the class that should win. classes: outputs 0 .. classes - 1 are the logits.
        outputs: how many outputs there are; those after the logits are measures that ``limit`` speaks of.
        ball, budget: further input constraints; only VNNLIB 2.0 can say them.
        limit: a constraint on an output.

    Raises:
        SpecError: parts that do not fit each other, a reversed or non-finite box.
    """

    shape: tuple[int, ...]
    boxes: tuple[InputBox, ...]
    label: int
    classes: int
    outputs: int = field(default=0)
    ball: Ball | None = None
    budget: Budget | None = None
    limit: Limit | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "outputs", self.outputs or self.classes)
        size = math.prod(self.shape)
        if not self.boxes:
            raise SpecError("a property needs at least one input box")
        for lower, upper in self.boxes:
            if lower.shape != (size,) or upper.shape != (size,):
                raise SpecError(f"boxes of an input of shape {self.shape} have {size} entries, got {lower.shape}")
            if not (np.isfinite(lower).all() and np.isfinite(upper).all() and (lower <= upper).all()):
                raise SpecError("input boxes must be finite, with lower <= upper everywhere")
        if not 0 <= self.label < self.classes:
            raise SpecError(f"label must lie in 0 .. {self.classes - 1}, got {self.label}")
        if self.classes < 2 or self.outputs < self.classes:
            raise SpecError(f"needs at least two classes and an output for each, got {self.classes}, {self.outputs}")
        if self.limit is not None and not self.classes <= self.limit.output < self.outputs:
            raise SpecError(f"limit speaks of output {self.limit.output}, no measure of {self.outputs} outputs")

    def hull(self) -> InputBox:
        """The smallest box that holds all boxes."""
        lowers, uppers = zip(*self.boxes, strict=True)
        return np.min(lowers, axis=0), np.max(uppers, axis=0)
