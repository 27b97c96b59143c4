"""Names that tell sets apart."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cure_plugin.errors import SpecError
from cure_plugin.sets.base import PerturbationSet
from cure_plugin.sets.lp import PerturbationLpBall


def distinct_names(sets: Sequence[PerturbationSet]) -> tuple[str, ...]:
    """A name for each set: its own, or where several share that, with the radius or range.

    Raises:
        SpecError: no set, or two that say the same of themselves.

    >>> distinct_names([PerturbationLpBall(2, 0.5), PerturbationLpBall(2, 1.0), PerturbationLpBall(1, 1.0)])
    ('l2=0.5', 'l2=1', 'l1')
    """
    own = [one.name for one in sets]
    names = tuple(one.name if own.count(one.name) == 1 else _longer(one) for one in sets)
    if not names or len(set(names)) != len(names):
        raise SpecError(f"sets must be at least one and differ; got {list(names)}")
    return names


def _longer(one: PerturbationSet) -> str:
    if isinstance(one, PerturbationLpBall) and not (isinstance(one.eps, Tensor) and one.eps.ndim):
        return f"{one.name}={float(one.eps):g}"
    return repr(one)
