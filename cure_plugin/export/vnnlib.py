"""VNNLIB 1.0 files for box inputs: fixed point, rounded outward, so that a file never shrinks the set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cure_plugin.errors import DataError, SpecError
from cure_plugin.files import write_text
from cure_plugin.sets import PerturbationSet

_DIGITS = Decimal(1).scaleb(-12)
"""Digits after the point: float32 numbers below 1 are that fine, and rounding to them goes outward."""


@dataclass(frozen=True)
class BoxInstance:
    """Is some input of a box classified as another class than ``label``?

    Attributes:
        lower, upper: float64 arrays (d,), the inputs X_0 .. X_{d-1} in the net's flattened order.
        label: the class that should win. classes: number of outputs Y_0 ..
    """

    lower: np.ndarray
    upper: np.ndarray
    label: int
    classes: int


def box_instance(x: Tensor, label: int, classes: int, perturbation: PerturbationSet) -> BoxInstance:
    """The box hull of the set around one image ``x`` (*input), widened to float32 numbers outside it.

    For an linf set the hull is the set; for any other it is larger, so only a proof carries over.

    Raises:
        SpecError: ``label`` is no class, or see the set's ``box``.
    """
    if not 0 <= label < classes:
        raise SpecError(f"label must lie in 0 .. {classes - 1}, got {label}")
    lower, upper = perturbation.box(x.unsqueeze(0).double())
    return BoxInstance(
        _outward(lower.flatten().numpy(), -np.inf), _outward(upper.flatten().numpy(), np.inf), label, classes
    )


def _outward(values: np.ndarray, towards: float) -> np.ndarray:
    """Nearest float32 numbers on the side of ``towards``, as float64."""
    rounded = values.astype(np.float32)
    inside = rounded > values if towards < 0 else rounded < values
    moved = np.nextafter(rounded, np.float32(towards))
    return np.where(inside, moved, rounded).astype(np.float64)


def write_vnnlib(path: str | Path, instance: BoxInstance, comment: str = "") -> None:
    """Write ``instance`` as VNNLIB 1.0: ``sat`` means that some input of the box is misclassified.

    Raises:
        OutputError: the file cannot be written.
    """
    size = len(instance.lower)
    lines = [f"; {line}" for line in comment.splitlines()]
    lines += [f"(declare-const X_{i} Real)" for i in range(size)]
    lines += [f"(declare-const Y_{j} Real)" for j in range(instance.classes)]
    for i in range(size):
        lines.append(f"(assert (>= X_{i} {_fixed(instance.lower[i], ROUND_FLOOR)}))")
        lines.append(f"(assert (<= X_{i} {_fixed(instance.upper[i], ROUND_CEILING)}))")
    rivals = [j for j in range(instance.classes) if j != instance.label]
    lines.append("(assert (or")
    lines += [f"  (and (>= Y_{j} Y_{instance.label}))" for j in rivals]
    lines.append("))")
    write_text(path, "\n".join(lines) + "\n")


def _fixed(value: float, rounding: str) -> str:
    """``value`` in fixed point with a dot, never in scientific notation."""
    text = format(Decimal(float(value)).quantize(_DIGITS, rounding=rounding), "f").rstrip("0")
    return text + "0" if text.endswith(".") else text


_NUMBER = r"(-?\d+(?:\.\d+)?)"
_DECLARED = re.compile(r"\(declare-const ([XY])_(\d+) Real\)")
_BOUND = re.compile(rf"\(assert \((>=|<=) X_(\d+) {_NUMBER}\)\)")
_RIVAL = re.compile(r"\(and \(>= Y_(\d+) Y_(\d+)\)\)")


def read_vnnlib(path: str | Path) -> BoxInstance:
    """Read a VNNLIB 1.0 file of the form that :func:`write_vnnlib` writes.

    Raises:
        DataError: missing, truncated, or of another form.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    text = re.sub(r";[^\n]*", "", text)
    if text.count("(") != text.count(")"):
        raise DataError(f"{path} is truncated: its parentheses do not match")
    declared = {"X": 0, "Y": 0}
    for kind, number in _DECLARED.findall(text):
        declared[kind] = max(declared[kind], int(number) + 1)
    bounds: dict[str, dict[int, float]] = {">=": {}, "<=": {}}
    for relation, number, value in _BOUND.findall(text):
        bounds[relation][int(number)] = float(value)
    rivals = _RIVAL.findall(text)
    labels = {int(label) for _, label in rivals}
    complete = all(sorted(side) == list(range(declared["X"])) for side in bounds.values())
    if not declared["X"] or not complete or len(labels) != 1 or len(rivals) != declared["Y"] - 1:
        raise DataError(f"{path} is no box-input classification property: bounds or outputs are missing")
    lower, upper = (np.array([side[i] for i in range(declared["X"])]) for side in bounds.values())
    return BoxInstance(lower, upper, labels.pop(), declared["Y"])


def counterexample_holds(instance: BoxInstance, x: Tensor, logits: Tensor) -> bool:
    """Whether flattened ``x`` lies in the box (up to 1e-6) and ``logits`` (C,) let another class win or tie."""
    point = x.flatten().double().numpy()
    inside = bool(((point >= instance.lower - 1e-6) & (point <= instance.upper + 1e-6)).all())
    others = torch.cat([logits[: instance.label], logits[instance.label + 1 :]])
    return inside and bool(others.max() >= logits[instance.label])
