"""VNNLIB 1.0 and 2.0 out of one writer; what it writes never holds less than the property."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cure_plugin.errors import SpecError
from cure_plugin.files import write_atomically
from cure_plugin.vnncomp.fixed_point import RESOLUTION, float32_above, float32_below, rounded_down, rounded_up
from cure_plugin.vnncomp.property import Ball, Property

VERSIONS = ("1.0", "2.0")


def write_vnnlib(path: str | Path, wanted: Property, version: str = "1.0", comment: str = "") -> None:
    """Write ``wanted`` to ``path``, compressed where the name ends in ``.gz``; the same property gives the same bytes.

    Raises:
        SpecError: an unknown version, or a property that version 1.0 cannot say.
        OutputError: the file cannot be written.
    """
    content = vnnlib_text(wanted, version, comment).encode()
    if str(path).endswith(".gz"):
        content = compressed(content)
    write_atomically(path, lambda file: file.write(content))


def compressed(content: bytes) -> bytes:
    """gzip without name and time, so that the same content gives the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as file:
        file.write(content)
    return buffer.getvalue()


def vnnlib_text(wanted: Property, version: str = "1.0", comment: str = "") -> str:
    """``wanted`` as text. Box ends are rounded outward, to float32 numbers and then in decimals.

    Raises:
        SpecError: see :func:`write_vnnlib`.
    """
    if version not in VERSIONS:
        raise SpecError(f"unknown VNNLIB version {version!r}; known: {', '.join(VERSIONS)}")
    names = _Names(wanted, version)
    lines = [*(f"; {line}" for line in comment.splitlines()), *names.declarations]
    lines += _input_lines(wanted, names.inputs)
    if wanted.ball is not None or wanted.budget is not None:
        if version == "1.0":
            raise SpecError("VNNLIB 1.0 knows no sums of inputs: write version 2.0, or encode the set as boxes")
        lines += _sum_lines(wanted, names.inputs)
    if wanted.limit is not None:
        lines.append(f"(assert (<= {names.outputs[wanted.limit.output]} {rounded_up(wanted.limit.bound)}))")
    own = names.outputs[wanted.label]
    rivals = (j for j in range(wanted.classes) if j != wanted.label)
    lines += ["(assert (or", *(f"  (and (>= {names.outputs[j]} {own}))" for j in rivals), "))"]
    return "\n".join(lines) + "\n"


class _Names:
    """Variables of a version: its declarations, and the names of flattened inputs and outputs."""

    def __init__(self, wanted: Property, version: str) -> None:
        size = int(np.prod(wanted.shape))
        if version == "1.0":
            self.inputs = [f"X_{i}" for i in range(size)]
            self.outputs = [f"Y_{j}" for j in range(wanted.outputs)]
            self.declarations = [f"(declare-const {name} Real)" for name in (*self.inputs, *self.outputs)]
            return
        self.inputs = [f"X[{','.join(map(str, index))}]" for index in np.ndindex(*wanted.shape)]
        self.outputs = [f"Y[0,{j}]" for j in range(wanted.outputs)]
        self.declarations = [
            "(vnnlib-version <2.0>)",
            "(declare-network f",
            f"  (declare-input X float32 [{','.join(map(str, wanted.shape))}])",
            f"  (declare-output Y float32 [1,{wanted.outputs}])",
            ")",
        ]


def _input_lines(wanted: Property, names: list[str]) -> Iterable[str]:
    """The hull of all boxes, and where there are several what each says beyond it."""
    boxes = [(float32_below(lower), float32_above(upper)) for lower, upper in wanted.boxes]
    low, high = np.min([box[0] for box in boxes], axis=0), np.max([box[1] for box in boxes], axis=0)
    for name, lower, upper in zip(names, low, high, strict=True):
        yield f"(assert (>= {name} {rounded_down(lower)}))"
        yield f"(assert (<= {name} {rounded_up(upper)}))"
    if len(boxes) == 1:
        return
    yield "(assert (or"
    for lower, upper in boxes:
        terms = [f"(>= {names[i]} {rounded_down(lower[i])})" for i in np.flatnonzero(lower > low)]
        terms += [f"(<= {names[i]} {rounded_up(upper[i])})" for i in np.flatnonzero(upper < high)]
        # a box that is the whole hull still needs a term
        yield f"  (and {' '.join(terms) or f'(>= {names[0]} {rounded_down(low[0])})'})"
    yield "))"


def _sum_lines(wanted: Property, names: list[str]) -> Iterable[str]:
    if wanted.ball is not None:
        centre, radius = _decimal_ball(wanted.ball)
        squares = (f"(* (- {name} {c}) (- {name} {c}))" for name, c in zip(names, centre, strict=True))
        yield f"(assert (<= (+ {' '.join(squares)}) {rounded_up(radius * radius * (1 + 1e-12))}))"
    if wanted.budget is not None:
        terms = " ".join(names[i] for i in wanted.budget.index)
        yield f"(assert (<= (+ {terms}) {rounded_up(wanted.budget.bound)}))"


def _decimal_ball(ball: Ball) -> tuple[list[str], float]:
    """The centre in decimals, and a radius that makes up for what that moves it."""
    return [rounded_down(c) for c in ball.centre], ball.radius + RESOLUTION * len(ball.centre) ** 0.5
