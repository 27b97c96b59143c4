"""Reading VNNLIB 1.0 and 2.0: whether a point satisfies a file, and box-input files as cases for a verifier."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cure_plugin.errors import DataError
from cure_plugin.vnncomp.property import InputBox

_TOKEN = re.compile(r"[()]|[^\s()]+")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}

_LEAST_SIZE = 1e-3
"""Sums below it are given the tolerance of this one: points are written as float32 numbers."""

_DEEPEST = 100
"""Nesting of parentheses that is read; no file in use comes near it."""

_MOST_VARIABLES, _MOST_CASES = 10_000_000, 100_000
"""Of a network, and of boxes or alternatives that one file may multiply out to."""

Form = str | list[Any]
"""A token, or a list of forms."""


@dataclass(frozen=True)
class Linear:
    """``coefficients`` (variable number -> factor) times the variables, at most ``bound``."""

    coefficients: dict[int, float]
    bound: float


@dataclass(frozen=True)
class Case:
    """Inputs in a box whose outputs satisfy all constraints of one of the ``alternatives``.

    Attributes:
        lower, upper: float64 arrays (d,).
        alternatives: conjunctions over the outputs.
    """

    lower: np.ndarray
    upper: np.ndarray
    alternatives: tuple[tuple[Linear, ...], ...]


class Query:
    """A VNNLIB file: its sizes and assertions.

    Args:
        text: the file's content, without comments or with them.
        source: what to call it in messages.

    Raises:
        DataError: truncated, or not VNNLIB as far as it is understood here.
    """

    def __init__(self, text: str, source: str = "the text") -> None:
        self.source = source
        self._index: dict[str, tuple[str, int]] = {}
        self._assertions: list[Form] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        text = re.sub(r";[^\n]*", "", text)
        for form in self._forms(re.sub(r"\[[^\[\]()]*\]", lambda found: "".join(found[0].split()), text)):
            self._declare(form)
        if {kind for kind, _ in self._index.values()} != {"X", "Y"} or not self._assertions:
            raise self._fault("it declares no inputs X, no outputs Y or asserts nothing")
        numbers = {wanted: {n for kind, n in self._index.values() if kind == wanted} for wanted in "XY"}
        self.inputs, self.outputs = len(numbers["X"]), len(numbers["Y"])
        if any(found != set(range(len(found))) for found in numbers.values()):
            raise self._fault("its variables are not numbered from 0 on")

    def _fault(self, reason: str) -> DataError:
        return DataError(f"{self.source} is no VNNLIB file that can be read: {reason}")

    def _forms(self, text: str) -> Iterator[Form]:
        """The top-level forms."""
        stack: list[list[Any]] = []
        for token in _TOKEN.findall(text):
            if token == "(":
                stack.append([])
                if len(stack) > _DEEPEST:
                    raise self._fault(f"parentheses are nested more than {_DEEPEST} deep")
            elif token != ")":
                if not stack:
                    raise self._fault(f"{token[:40]!r} stands outside parentheses")
                stack[-1].append(token)
            else:
                if not stack:
                    raise self._fault("a parenthesis closes nothing")
                form = stack.pop()
                if stack:
                    stack[-1].append(form)
                else:
                    yield form
        if stack:
            raise self._fault("it is truncated, parentheses are left open")

    def _declare(self, form: Form) -> None:
        """Take in one top-level form."""
        match form:
            case ["assert", body]:
                self._assertions.append(body)
            case ["declare-const", str(name), "Real"] if re.fullmatch(r"[XY]_\d{1,9}", name):
                self._index[name] = (name[0], int(name[2:]))
            case ["declare-network", _, *parts]:
                for part in parts:
                    self._declare_tensor(part)
            case ["vnnlib-version", str(version)] if re.fullmatch(r"<[12]\.\d+>", version):
                pass
            case ["set-logic", _] | ["check-sat"]:
                pass
            case _:
                raise self._fault(f"unknown form {str(form)[:60]}")

    def _declare_tensor(self, form: Form) -> None:
        match form:
            case ["declare-input" | "declare-output" as side, str(name), _, str(size)]:
                kind = "X" if side == "declare-input" else "Y"
                numbers = re.fullmatch(r"\[(\d{1,9}(?:,\d{1,9})*)\]", size)
                if numbers is None or kind in self.shapes:
                    raise self._fault(f"one input and one output of fixed size are supported, got {size} for {name}")
                self.shapes[kind] = tuple(int(n) for n in numbers[1].split(","))
                if math.prod(self.shapes[kind]) > _MOST_VARIABLES:
                    raise self._fault(f"{name} has more than {_MOST_VARIABLES} values: {size}")
                for flat, index in enumerate(np.ndindex(*self.shapes[kind])):
                    self._index[f"{name}[{','.join(map(str, index))}]"] = (kind, flat)
            case _:
                raise self._fault(f"unknown part of a network {str(form)[:60]}")

    # -- points ---------------------------------------------------------------------------------

    def satisfied(self, inputs: np.ndarray, outputs: np.ndarray, tolerance: float = 0.0) -> bool:
        """Whether flattened ``inputs`` and ``outputs`` satisfy every assertion.

        Args:
            tolerance: by how much an inequality over inputs alone may be missed: by this where it bounds one input;
                where it speaks of a term (as the sum of squares of a ball), by that share of its value below 1, which
                is no more than leaves a small ball its size. What speaks of an output, a measured distance too, holds
                exactly or not at all.

        Raises:
            DataError: another number of values than of variables, or an assertion that is not understood.
        """
        if inputs.shape != (self.inputs,) or outputs.shape != (self.outputs,):
            raise self._fault(
                f"it has {self.inputs} inputs and {self.outputs} outputs, the point {inputs.shape}, {outputs.shape}"
            )
        values = {"X": inputs, "Y": outputs}
        return all(self._holds(form, values, tolerance) for form in self._assertions)

    def _holds(self, form: Form, values: dict[str, np.ndarray], tolerance: float) -> bool:
        match form:
            case ["and", *parts]:
                return all(self._holds(part, values, tolerance) for part in parts)
            case ["or", *parts]:
                return any(self._holds(part, values, tolerance) for part in parts)
            case ["<=" | ">=" | "=" | "==" as relation, left, right]:
                one, other = self._value(left, values), self._value(right, values)
                difference, size = one - other, max(abs(one), abs(other))
                kinds = [self._index[name][0] for name in set(self._variables_in(form))]
                slack = tolerance if kinds and "Y" not in kinds else 0.0
                if len(kinds) > 1 or not any(isinstance(side, str) and side in self._index for side in (left, right)):
                    slack *= min(1.0, max(size, _LEAST_SIZE))
                return (relation == ">=" or difference <= slack) and (relation == "<=" or difference >= -slack)
            case _:
                raise self._fault(f"unknown assertion {str(form)[:60]}")

    def _variables_in(self, form: Form) -> Iterator[str]:
        """The inputs and outputs that a term speaks of."""
        if not isinstance(form, str):
            for part in form[1:]:
                yield from self._variables_in(part)
        elif form in self._index:
            yield form

    def _value(self, form: Form, values: dict[str, np.ndarray]) -> float:
        if isinstance(form, str):
            if form in self._index:
                kind, number = self._index[form]
                return float(values[kind][number])
            return self._number(form)
        match form:
            case ["-", only]:
                return -self._value(only, values)
            case [str(operation), first, *rest] if operation in _OPERATIONS and rest:
                result = self._value(first, values)
                for part in rest:
                    result = _OPERATIONS[operation](result, self._value(part, values))
                return result
        raise self._fault(f"unknown term {str(form)[:60]}")

    def _number(self, token: str) -> float:
        if not _NUMBER.fullmatch(token):
            raise self._fault(f"{token[:40]!r} is neither a number nor declared")
        return float(token)

    # -- box-input files --------------------------------------------------------------------------

    def cases(self) -> list[Case]:
        """The file as input boxes with linear conditions on the outputs.

        Raises:
            DataError: inputs that are bound in another way than by boxes, or not at all.
        """
        cases = [Case(np.full(self.inputs, -np.inf), np.full(self.inputs, np.inf), ((),))]
        for form in self._assertions:
            parts = form[1:] if isinstance(form, list) and form[:1] == ["or"] else [form]
            disjuncts = [list(self._atoms(part)) for part in parts]
            of_outputs = all(kind == "Y" for atoms in disjuncts for kind, _ in atoms)
            if len(disjuncts) * (len(cases[0].alternatives) if of_outputs else len(cases)) > _MOST_CASES:
                raise self._fault(f"its disjunctions multiply out to more than {_MOST_CASES} boxes or alternatives")
            if of_outputs:
                added = tuple(tuple(linear for _, linear in atoms) for atoms in disjuncts)
                cases = [_with_alternatives(case, added) for case in cases]
            else:
                cases = [self._narrowed(case, atoms) for case in cases for atoms in disjuncts]
        for case in cases:
            if not (np.isfinite(case.lower).all() and np.isfinite(case.upper).all()):
                raise self._fault("an input has no lower or no upper bound")
        return [
            case for case in cases if case.alternatives and (case.lower <= case.upper).all()
        ]  # the others are empty

    def box(self) -> InputBox:
        """The only input box.

        Raises:
            DataError: see :meth:`cases`, or several boxes.
        """
        cases = self.cases()
        if len(cases) != 1:
            raise self._fault(f"it holds {len(cases)} input boxes, not one")
        return cases[0].lower, cases[0].upper

    def _atoms(self, form: Form) -> Iterator[tuple[str, Linear]]:
        """(X or Y, constraint) for each inequality of a conjunction."""
        match form:
            case ["and", *parts]:
                for part in parts:
                    yield from self._atoms(part)
            case ["=" | "==", left, right]:
                for relation in ("<=", ">="):
                    yield from self._atoms([relation, left, right])
            case ["<=" | ">=" as relation, left, right]:
                sign = 1.0 if relation == "<=" else -1.0
                found: dict[tuple[str, int], float] = {}
                constant = self._collect(left, sign, found) + self._collect(right, -sign, found)
                coefficients = {variable: factor for variable, factor in found.items() if factor}
                kinds = {kind for kind, _ in coefficients}
                if len(kinds) != 1:
                    raise self._fault(f"a constraint on no variable, or on inputs and outputs: {str(form)[:60]}")
                yield kinds.pop(), Linear({number: c for (_, number), c in coefficients.items()}, -constant)
            case _:
                raise self._fault(f"a nested disjunction or an unknown assertion: {str(form)[:60]}")

    def _collect(self, form: Form, factor: float, into: dict[tuple[str, int], float]) -> float:
        """Add ``factor`` times a linear term to ``into``; returns its constant part."""
        if isinstance(form, str):
            if form not in self._index:
                return factor * self._number(form)
            variable = self._index[form]
            into[variable] = into.get(variable, 0.0) + factor
            return 0.0
        match form:
            case ["+", *parts]:
                return sum(self._collect(part, factor, into) for part in parts)
            case ["-", only]:
                return self._collect(only, -factor, into)
            case ["-", first, *rest]:
                return self._collect(first, factor, into) + sum(self._collect(part, -factor, into) for part in rest)
            case ["*", *parts] if parts:
                varying = [part for part in parts if any(self._variables_in(part))]
                scale = math.prod(self._value(part, {}) for part in parts if part not in varying) * factor
                if len(varying) <= 1:
                    return self._collect(varying[0], scale, into) if varying else scale
        raise self._fault(f"{str(form)[:60]} is not linear: only box inputs can be handed to this verifier")

    def _narrowed(self, case: Case, atoms: Sequence[tuple[str, Linear]]) -> Case:
        """``case`` with one disjunct's constraints."""
        lower, upper = case.lower.copy(), case.upper.copy()
        for kind, linear in atoms:
            if kind == "Y":
                continue
            if len(linear.coefficients) != 1:
                raise self._fault("an assertion bounds several inputs together: no box")
            ((number, factor),) = linear.coefficients.items()
            if factor > 0:
                upper[number] = min(upper[number], linear.bound / factor)
            else:
                lower[number] = max(lower[number], linear.bound / factor)
        outputs = tuple(linear for kind, linear in atoms if kind == "Y")
        return _with_alternatives(Case(lower, upper, case.alternatives), (outputs,))


def _with_alternatives(case: Case, added: Sequence[tuple[Linear, ...]]) -> Case:
    """``case`` with a further disjunction over the outputs."""
    return Case(case.lower, case.upper, tuple((*old, *new) for old in case.alternatives for new in added))


def read_query(path: str | Path) -> Query:
    """The query of a VNNLIB file, plain or ``.gz``.

    Raises:
        DataError: missing, truncated, or not understood.
    """
    return Query(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """A text file, plain or ``.gz``.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = Path(path).read_bytes()
        return (gzip.decompress(content) if str(path).endswith(".gz") else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
