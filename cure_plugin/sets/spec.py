"""Perturbation sets as text: frozen specs that validate themselves and keep numbers as written (8/255)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from cure_plugin.errors import SpecError
from cure_plugin.sets.base import PerturbationSet
from cure_plugin.sets.lp import PerturbationLpBall
from cure_plugin.sets.union import PerturbationUnion

_NORMS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


def parse_number(value: str | float, argument: str) -> float:
    """A number from ``8/255``, ``0.1`` or a number.

    Raises:
        SpecError: anything else; the message names ``argument``.
    """
    try:
        number = float(Fraction(value.replace(" ", ""))) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, TypeError) as error:
        raise SpecError(f"{argument} must be a number like 0.1 or 8/255, got {value!r}") from error
    if not math.isfinite(number):
        raise SpecError(f"{argument} must be finite, got {value!r}")
    return number


@dataclass(frozen=True)
class LpBallSpec:
    """An lp ball cut with a domain box, e.g. ``LpBallSpec("linf", "8/255")``.

    Attributes:
        norm: linf, l2 or l1.
        eps: radius as written.
        domain: (lowest, highest) input value, or None.

    Raises:
        SpecError: an unknown norm, an eps that is no number >= 0, an empty domain.
    """

    norm: str
    eps: str
    domain: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2", "l1"):
            raise SpecError(f"unknown norm {self.norm!r}; known: linf, l2, l1")
        self.build()

    @property
    def name(self) -> str:
        return self.norm

    def build(self) -> PerturbationLpBall:
        """The set itself."""
        return PerturbationLpBall(_NORMS[self.norm], parse_number(self.eps, f"eps of {self.norm}"), self.domain)

    def __str__(self) -> str:
        return f"{self.norm}={self.eps}"


@dataclass(frozen=True)
class UnionSpec:
    """The union of the sets that ``members`` describe."""

    members: tuple[SetSpec, ...]

    @property
    def name(self) -> str:
        return "union(" + ",".join(member.name for member in self.members) + ")"

    def build(self) -> PerturbationSet:
        """The set itself."""
        return PerturbationUnion([member.build() for member in self.members])

    def __str__(self) -> str:
        return " + ".join(map(str, self.members))


SetSpec = LpBallSpec | UnionSpec


def set_spec(value: SetSpec | str | Mapping[str, Any] | Sequence[Any]) -> SetSpec:
    """A spec from what YAML or a command line gives.

    Accepted: ``"linf=8/255"``; ``{"norm": "inf", "eps": "8/255", "domain": [0, 1]}``; ``{"union": [...]}``.

    Raises:
        SpecError: anything else.

    >>> set_spec("linf=8/255").build()
    PerturbationLpBall(norm=inf, eps=0.03137254901960784, domain=(0.0, 1.0))
    """
    if isinstance(value, LpBallSpec | UnionSpec):
        return value
    if isinstance(value, str):
        norm, separator, eps = value.partition("=")
        if not separator:
            raise SpecError(f"a set is written norm=eps, e.g. linf=8/255 or l2=0.5; got {value!r}")
        return LpBallSpec(norm.strip(), eps.strip())
    if isinstance(value, Mapping) and set(value) == {"union"}:
        members = value["union"]
        if not isinstance(members, Sequence) or isinstance(members, str) or not members:
            raise SpecError(f"union must list at least one set, got {members!r}")
        return UnionSpec(tuple(set_spec(member) for member in members))
    if isinstance(value, Mapping) and {"norm", "eps"} <= set(value) <= {"norm", "eps", "domain"}:
        norm = str(value["norm"]).removesuffix(".0").removeprefix(".")
        domain = value.get("domain", (0.0, 1.0))
        if domain is not None and (not isinstance(domain, Sequence) or isinstance(domain, str) or len(domain) != 2):
            raise SpecError(f"domain must be [lowest, highest] or null, got {domain!r}")
        return LpBallSpec(
            norm if norm.startswith("l") else f"l{norm}",
            str(value["eps"]),
            None if domain is None else (float(domain[0]), float(domain[1])),
        )
    raise SpecError(f"a set is 'norm=eps', {{norm, eps, domain}} or {{union: [...]}}; got {value!r}")
