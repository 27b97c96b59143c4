"""Which encodings there are for which sets: registered by exact type, those of other packages included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from torch import Tensor

from cure_plugin.errors import SpecError
from cure_plugin.registry import load_installed, unknown
from cure_plugin.sets import PerturbationSet

if TYPE_CHECKING:
    from cure_plugin.export.encodings import Encoding

Make = Callable[[onnx.ModelProto, Tensor, int, Any], "Encoding"]
"""(classifier, image (1, *input), label, set) -> the encoding."""


@dataclass(frozen=True)
class Encoder:
    """How to make one encoding of some sets.

    Attributes:
        name: of the encoding. sets: their exact types, as a subclass may be another set; none: any set.
        words: what these are, for messages.
        preferred: whether it is the tightest of a set that a version of VNNLIB can say.
    """

    name: str
    sets: tuple[type[PerturbationSet], ...]
    words: str
    make: Make
    preferred: Callable[[Any, str], bool]

    def takes(self, perturbation: PerturbationSet) -> bool:
        """Whether it is for sets of that type."""
        return not self.sets or type(perturbation) in self.sets


_ENCODERS: list[Encoder] = []


def encodes(
    name: str,
    *sets: type[PerturbationSet],
    words: str = "such sets",
    preferred: Callable[[Any, str], bool] = lambda own, version: False,
) -> Callable[[Make], Make]:
    """Decorator: a function that makes the encoding ``name`` of sets of exactly these types (none: of any set).

    A package makes its encodings known by naming their module in the entry-point group ``cure_plugin.encodings``.

    Args:
        words: what these sets are, for messages.
        preferred: (set, version of VNNLIB) -> whether no other encoding is to be taken unless asked for.
    """

    def add(make: Make) -> Make:
        _ENCODERS[:] = [one for one in _ENCODERS if (one.name, one.sets) != (name, sets)]
        _ENCODERS.append(Encoder(name, sets, words, make, preferred))
        return make

    return add


def encoders() -> list[Encoder]:
    """All of them, those of installed packages included."""
    load_installed("cure_plugin.encodings")
    return list(_ENCODERS)


def encoding_names() -> list[str]:
    """Names of encodings, each once."""
    return list(dict.fromkeys(one.name for one in encoders()))


def default_encoding(perturbation: PerturbationSet, version: str = "1.0") -> str:
    """The tightest encoding of a set that a version of VNNLIB can say: ``box``, its pixel hull, where none is known."""
    fitting = (one for one in encoders() if one.takes(perturbation) and one.preferred(perturbation, version))
    return next((one.name for one in fitting), "box")


def encoder(name: str, perturbation: PerturbationSet) -> Encoder:
    """That of an encoding for a set.

    Raises:
        SpecError: an unknown encoding, or one that is for other sets.
    """
    named = [one for one in encoders() if one.name == name]
    if not named:
        raise unknown("encoding", name, encoding_names())
    for one in named:
        if one.takes(perturbation):
            return one
    raise refused(name, perturbation, f"it is for {' or '.join(one.words for one in named)}")


def refused(name: str, perturbation: PerturbationSet, reason: str) -> SpecError:
    """The error for an encoding that does not fit a set."""
    return SpecError(f"encoding {name!r} does not fit {perturbation!r}: {reason}")
