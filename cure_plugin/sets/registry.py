"""Sets by name: the package's own, and those that other packages register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cure_plugin.registry import check_free, check_name, load_installed, unknown
from cure_plugin.sets.base import PerturbationSet


@dataclass(frozen=True)
class Kind:
    """A registered kind of set.

    Attributes:
        name: what stands before the ``=`` in a spec, e.g. ``linf`` in ``linf=8/255``.
        build: makes a set from what stands behind it.
        parameters: what that is, with units, for people.
    """

    name: str
    build: Callable[[str], PerturbationSet]
    parameters: str


_KINDS: dict[str, Kind] = {}


def register_perturbation(
    name: str, parameters: str = ""
) -> Callable[[Callable[[str], PerturbationSet]], Callable[[str], PerturbationSet]]:
    """Decorator: register a function (or class) that builds a set from the text behind ``name=``.

    A package makes its sets known without being imported first by naming the function's module in the
    entry-point group ``cure_plugin.sets``.

    Args:
        name: letters, digits, ``_`` and ``-``.
        parameters: what the text means, with units, shown by ``cure sets``.

    Raises:
        SpecError: a malformed name, or one that is taken.

    >>> @register_perturbation("doctest-ball", "radius")
    ... def build(text):
    ...     from cure_plugin import PerturbationLpBall
    ...     return PerturbationLpBall(2, float(text))
    >>> registered("doctest-ball").build("0.5")
    PerturbationLpBall(norm=2, eps=0.5, domain=(0.0, 1.0))
    """
    check_name("set", name)

    def add(build: Callable[[str], PerturbationSet]) -> Callable[[str], PerturbationSet]:
        check_free("set", name, _KINDS[name].build if name in _KINDS else None, build)
        _KINDS[name] = Kind(name, build, parameters)
        return build

    return add


def kinds() -> dict[str, Kind]:
    """All registered kinds by name, those of installed packages included."""
    load_installed("cure_plugin.sets", former="cure_plugin.perturbations")
    return dict(sorted(_KINDS.items()))


def registered(name: str) -> Kind:
    """The kind of that name.

    Raises:
        SpecError: no such kind; the nearest name is offered.
    """
    if name in _KINDS:
        return _KINDS[name]
    known = kinds()
    if name not in known:
        raise unknown("set", name, known)
    return known[name]
