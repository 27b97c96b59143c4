"""Two nets on the same images and sets: which proves more, and whether chance explains the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cure_plugin.certification.record import Record, read_origin, read_results
from cure_plugin.errors import SpecError


@dataclass(frozen=True)
class Comparison:
    """How many images nets A and B prove robust for one set, or for several at once.

    Attributes:
        name: the set, ``union``, or the kind of sets.
        images: number of images.
        certified_a, certified_b: images that A proves, that B proves.
        only_a, only_b: images that only A proves, that only B proves.
        p_value: see :func:`mcnemar_p_value`.
    """

    name: str
    images: int
    certified_a: int
    certified_b: int
    only_a: int
    only_b: int
    p_value: float


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """McNemar's exact test, two-sided: how likely a split at least this uneven is if A and B are equally good.

    >>> mcnemar_p_value(1, 9)
    0.021484375
    """
    total = only_a + only_b
    tail = sum(math.comb(total, count) for count in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**total)


def compare_records(first: Sequence[Record], second: Sequence[Record]) -> list[Comparison]:
    """Compare two lists of certification records, image by image: per set, for the union and per kind of sets.

    Args:
        first, second: of nets A and B, as :func:`~cure_plugin.certification.certify_dataset` returns them.

    Raises:
        SpecError: other images, labels or sets in the one than in the other, or none.
    """
    if len(first) != len(second) or not first:
        raise SpecError(f"A holds {len(first)} images, B {len(second)}; certify both nets on the same images")
    for a, b in zip(first, second, strict=True):
        if a.label != b.label:
            raise SpecError(
                f"image {a.index} has label {a.label} in A, {b.label} in B; certify both on the same images"
            )
    sets, groups = list(first[0].sets), list(first[0].groups)
    for part, ours, others in (("sets", sets, second[0].sets), ("groups", groups, second[0].groups)):
        if set(ours) != set(others):
            raise SpecError(f"A has the {part} {ours}, B {list(others)}; certify both nets for the same sets")
    pairs = zip(_proved(first, sets, groups), _proved(second, sets, groups), strict=True)
    return [_comparison(name, a, b) for name, (a, b) in zip([*sets, "union", *groups], pairs, strict=True)]


def _proved(records: Sequence[Record], sets: list[str], groups: list[str]) -> list[list[bool]]:
    """Which images are proved: for each set, the union, and each kind of sets."""
    statuses = [
        *([record.sets[name].status for record in records] for name in sets),
        [record.union for record in records],
        *([record.groups[name] for record in records] for name in groups),
    ]
    return [[status == "proved" for status in column] for column in statuses]


def _comparison(name: str, a: list[bool], b: list[bool]) -> Comparison:
    both = sum(x and y for x, y in zip(a, b, strict=True))
    only_a, only_b = sum(a) - both, sum(b) - both
    return Comparison(name, len(a), sum(a), sum(b), only_a, only_b, mcnemar_p_value(only_a, only_b))


def compare_files(first: str | Path, second: str | Path) -> list[Comparison]:
    """:func:`compare_records` on two results files of ``cure certify``.

    Where ``<path>.settings.json`` lies beside both, pixels and sizes of sets are compared too.

    Raises:
        DataError: see :func:`~cure_plugin.certification.record.read_results`.
        SpecError: other images, labels or sets in the one than in the other.
    """
    first, second = Path(first), Path(second)
    comparisons = compare_records(read_results(first), read_results(second))
    a, b = read_origin(first), read_origin(second)
    if a and b and a.images != b.images:
        raise SpecError(f"{first} and {second} are of different pixels; certify both nets on the same images")
    if a and b and sorted(a.sets) != sorted(b.sets):
        raise SpecError(f"{first} is for {a.sets}, {second} for {b.sets}; certify both nets for the same sets")
    return comparisons
