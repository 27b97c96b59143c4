"""Perturbation sets as text: frozen specs that validate themselves and keep numbers as written (8/255)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from cure_plugin.errors import CureError, SpecError
from cure_plugin.sets.base import PerturbationSet
from cure_plugin.sets.geometric import PerturbationGeometric
from cure_plugin.sets.lp import PerturbationLpBall
from cure_plugin.sets.patch import PerturbationL0, PerturbationPatch
from cure_plugin.sets.registry import kinds, register_perturbation, registered
from cure_plugin.sets.union import PerturbationUnion

_NORMS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}

_TRANSFORMATIONS = re.compile(r"rot|trans|scal|shear|contrast|bright|(r|t|sc|sh|c|b)$")
"""How names begin that people give to geometric sets, or what they are."""


def parse_number(value: str | float, argument: str) -> float:
    """A number from ``8/255``, ``0.1`` or a number.

    Raises:
        SpecError: anything else; the message names ``argument``.
    """
    try:
        fraction = isinstance(value, str) and "/" in value  # not always: 1e999999999 makes a Fraction of a gigabyte
        number = float(Fraction(str(value).replace(" ", "")) if fraction else value)
    except (ValueError, ZeroDivisionError, TypeError, OverflowError) as error:
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
        if self.norm not in _NORMS:
            raise SpecError(f"unknown norm {self.norm!r}; known: {', '.join(_NORMS)}")
        self.build()

    group = "lp"
    """What reports count it under."""

    @property
    def name(self) -> str:
        return self.norm

    def build(self) -> PerturbationLpBall:
        """The set itself."""
        return _ball(self.norm, self.eps, self.domain)

    def __str__(self) -> str:
        return f"{self.norm}={self.eps}"


@dataclass(frozen=True)
class NamedSpec:
    """A registered kind of set with its parameters as text, e.g. ``NamedSpec("patch", "5x5")``.

    Attributes:
        kind: the name it is registered by. parameters: what stands behind it. name: the set's own.

    Raises:
        SpecError: an unknown kind, or parameters that it refuses.
    """

    kind: str
    parameters: str
    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.build().name)

    @property
    def group(self) -> str:
        """What reports count it under: the kind it is registered as, lp balls together."""
        return LpBallSpec.group if self.kind in _NORMS else self.kind

    def build(self) -> PerturbationSet:
        """The set itself."""
        try:
            return registered(self.kind).build(self.parameters)
        except CureError:
            raise
        except (ValueError, TypeError, OverflowError) as error:  # a builder of somebody else
            raise SpecError(f"set {self.kind!r} refuses the parameters {self.parameters!r}: {error}") from error

    def __str__(self) -> str:
        return self.parameters if self.kind == "geometric" else f"{self.kind}={self.parameters}"


@dataclass(frozen=True)
class UnionSpec:
    """The union of the sets that ``members`` describe."""

    members: tuple[SetSpec, ...]

    @property
    def group(self) -> str:
        """What reports count it under: its members' group if they have one in common."""
        groups = {member.group for member in self.members}
        return groups.pop() if len(groups) == 1 else "mixed"

    @property
    def name(self) -> str:
        return "union(" + ",".join(member.name for member in self.members) + ")"

    def build(self) -> PerturbationSet:
        """The set itself."""
        return PerturbationUnion([member.build() for member in self.members])

    def __str__(self) -> str:
        return " + ".join(map(str, self.members))


SetSpec = LpBallSpec | NamedSpec | UnionSpec


def set_spec(value: SetSpec | str | Mapping[str, Any] | Sequence[Any]) -> SetSpec:
    """A spec from what YAML or a command line gives.

    Accepted: ``"linf=8/255"``, ``"patch=5x5"`` and so on for every registered name (``cure sets`` lists
    them); transformations as in DeepG and CGT, ``"R(10)"``, ``"R(2) Sh(2)"``;
    ``{"norm": "inf", "eps": "8/255", "domain": [0, 1]}``; ``{"union": [...]}``.

    Raises:
        SpecError: anything else.

    >>> set_spec("linf=8/255").build()
    PerturbationLpBall(norm=inf, eps=0.03137254901960784, domain=(0.0, 1.0))
    """
    if isinstance(value, LpBallSpec | NamedSpec | UnionSpec):
        return value
    if isinstance(value, str):
        return _from_text(value)
    if isinstance(value, Mapping) and set(value) == {"union"}:
        members = value["union"]
        if not isinstance(members, Sequence) or isinstance(members, str) or not members:
            raise SpecError(f"union must list at least one set, got {members!r}")
        return UnionSpec(tuple(set_spec(member) for member in members))
    if isinstance(value, Mapping) and {"norm", "eps"} <= set(value) <= {"norm", "eps", "domain"}:
        return _lp_from_mapping(value)
    raise SpecError(f"a set is 'name=parameters', {{norm, eps, domain}} or {{union: [...]}}; got {value!r}")


def read_sets(path: str | Path) -> list[SetSpec]:
    """The sets that a YAML file lists, at its top or under ``sets``; each as :func:`set_spec` takes it.

    Raises:
        SpecError: unreadable, no YAML, or no list of sets.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"cannot read sets from {path}: {reason}; give a list such as [linf=0.1, R(10)]") from error
    listed = content.get("sets") if isinstance(content, Mapping) else content
    if not isinstance(listed, list) or not listed:
        raise SpecError(f"{path} must list at least one set, at its top or under 'sets'; got {type(listed).__name__}")
    return [set_spec(one) for one in listed]


def perturbation_from_spec(value: SetSpec | str | Mapping[str, Any]) -> PerturbationSet:
    """The set that a spec describes; see :func:`set_spec`."""
    return set_spec(value).build()


def _from_text(text: str) -> SetSpec:
    if "=" not in text and "(" in text:
        return NamedSpec("geometric", text.strip())
    kind, separator, parameters = (part.strip() for part in text.partition("="))
    if not separator:
        raise SpecError(f"a set is written name=parameters, e.g. linf=8/255, l2=0.5, patch=5x5 or R(10); got {text!r}")
    if _TRANSFORMATIONS.match(kind.lower()) and kind not in kinds():
        raise SpecError(f"geometric sets are written without name=, e.g. R(10) or Sc(1) R(1) T(2,2); got {text!r}")
    return LpBallSpec(kind, parameters) if kind in _NORMS else NamedSpec(kind, parameters)


def _lp_from_mapping(value: Mapping[str, Any]) -> LpBallSpec:
    norm = str(value["norm"]).removesuffix(".0").removeprefix(".")
    domain = value.get("domain", (0.0, 1.0))
    if domain is not None and (not isinstance(domain, Sequence) or isinstance(domain, str) or len(domain) != 2):
        raise SpecError(f"domain must be [lowest, highest] or null, got {domain!r}")
    return LpBallSpec(
        norm if norm.startswith("l") else f"l{norm}",
        str(value["eps"]),
        None if domain is None else (parse_number(domain[0], "domain"), parse_number(domain[1], "domain")),
    )


def _ball(norm: str, eps: str, domain: tuple[float, float] | None = (0.0, 1.0)) -> PerturbationLpBall:
    return PerturbationLpBall(_NORMS[norm], parse_number(eps, f"eps of {norm}"), domain)


def _lp_builder(norm: str) -> None:
    @register_perturbation(norm, "eps: radius in pixel units, e.g. 0.1 or 8/255; the ball is cut with [0, 1]")
    def build(text: str) -> PerturbationSet:
        return _ball(norm, text)


for _norm in _NORMS:
    _lp_builder(_norm)


@register_perturbation("patch", "HEIGHTxWIDTH in pixels, anywhere, all channels free in [0, 1], e.g. 5x5")
def _patch(text: str) -> PerturbationSet:
    sides = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", text)
    if sides is None:
        raise SpecError(f"a patch is written HEIGHTxWIDTH, e.g. 5x5, got {text!r}")
    return PerturbationPatch(int(sides[1]), int(sides[2]))


@register_perturbation(
    "geometric",
    "R degrees, T pixels right and up, Sc Sh C percent, B added, in this order, e.g. R(10) or Sc(1) R(1) T(2,2)",
)
def _geometric(text: str) -> PerturbationSet:
    return PerturbationGeometric.parse(text)


@register_perturbation("l0", "number of pixels free in [0, 1], all channels of each, e.g. 3")
def _l0(text: str) -> PerturbationSet:
    if not text.isdigit():
        raise SpecError(f"l0 takes a whole number of pixels, got {text!r}")
    return PerturbationL0(int(text))
