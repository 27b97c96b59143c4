"""Shares of images proved and unbroken, with confidence intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cure_plugin.certification.record import Record
from cure_plugin.certification.verdict import Verdict


def wilson_interval(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share; 95 % by default (Wilson 1927).

    >>> [round(v, 3) for v in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    centre = share + z * z / (2 * total)
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class Summary:
    """Shares in [0, 1] over ``images`` images.

    Attributes:
        clean: correctly classified. certified: per set, proved robust. pgd: per set, not broken by the
            attack (no net can be certified for more). union: proved for every set at once.
        union_pgd: broken for no set.
        groups, groups_pgd: the same for all sets of a kind at once, and ``universal`` for all sets; empty where
            the sets are of one kind.
        intervals: 95 % confidence intervals, keyed ``clean``, ``certified.<set>``, ``pgd.<set>``, ``union``,
            ``groups.<group>``.
        stages: set -> ``proved`` | ``falsified`` | ``undecided`` -> the stage that decided, or was the last one
            tried -> number of images, most first.
        seconds: time spent per set.
    """

    images: int
    clean: float
    certified: dict[str, float]
    pgd: dict[str, float]
    union: float
    union_pgd: float
    groups: dict[str, float]
    groups_pgd: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    stages: dict[str, dict[str, dict[str, int]]]
    seconds: dict[str, float]


def summarize(records: Sequence[Record]) -> Summary:
    """The shares that a list of certification records amounts to."""
    total = len(records)
    names = list(records[0].sets) if records else []
    counts: dict[str, int] = {"clean": sum(record.prediction == record.label for record in records)}
    for name in names:
        statuses = [record.sets[name].status for record in records]
        counts[f"certified.{name}"] = statuses.count("proved")
        counts[f"pgd.{name}"] = total - statuses.count("falsified")
    unions = [record.union for record in records]
    counts["union"], counts["union_pgd"] = unions.count("proved"), total - unions.count("falsified")
    groups = list(records[0].groups) if records else []
    for group in groups:
        statuses = [record.groups[group] for record in records]
        counts[f"groups.{group}"] = statuses.count("proved")
        counts[f"groups_pgd.{group}"] = total - statuses.count("falsified")
    share = {key: count / total if total else 0.0 for key, count in counts.items()}
    return Summary(
        images=total,
        clean=share["clean"],
        certified={name: share[f"certified.{name}"] for name in names},
        pgd={name: share[f"pgd.{name}"] for name in names},
        union=share["union"],
        union_pgd=share["union_pgd"],
        groups={group: share[f"groups.{group}"] for group in groups},
        groups_pgd={group: share[f"groups_pgd.{group}"] for group in groups},
        intervals={key: wilson_interval(count, total) for key, count in counts.items()},
        stages={name: _stages([record.sets[name] for record in records]) for name in names},
        seconds={name: round(sum(r.sets[name].seconds for r in records), 2) for name in names},
    )


def _stages(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    return {
        status: dict(Counter(one.stage for one in verdicts if one.status == status).most_common())
        for status in ("proved", "falsified", "undecided")
    }
