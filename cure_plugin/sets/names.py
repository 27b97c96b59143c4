"""Names that tell sets apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from cure_plugin.errors import SpecError
from cure_plugin.sets.base import PerturbationSet
from cure_plugin.sets.lp import PerturbationLpBall


class Named(Protocol):
    """A set, or a spec of one."""

    @property
    def name(self) -> str:
        """Its short name."""


One = TypeVar("One", bound=Named)


def told_apart(sets: Sequence[One], longer: Callable[[One], str]) -> list[str]:
    """A name for each set: the short one, or the ``longer`` where several share the short one.

    Raises:
        SpecError: no set, or the same one twice.
    """
    short = [one.name for one in sets]
    names = [longer(one) if short.count(one.name) > 1 else one.name for one in sets]
    if not names or len(set(names)) != len(names):
        raise SpecError(f"sets must be at least one and differ; got {[longer(one) for one in sets]}")
    return names


def distinct_names(sets: Sequence[PerturbationSet]) -> list[str]:
    """:func:`told_apart` by the radius, or by all that a set says of itself.

    >>> distinct_names([PerturbationLpBall(2, 0.5), PerturbationLpBall(2, 1.0), PerturbationLpBall(1, 1.0)])
    ['l2=0.5', 'l2=1', 'l1']
    """
    return told_apart(sets, _longer)


def _longer(one: PerturbationSet) -> str:
    if isinstance(one, PerturbationLpBall) and not (isinstance(one.eps, Tensor) and one.eps.ndim):
        return f"{one.name}={float(one.eps):g}"
    return repr(one)
