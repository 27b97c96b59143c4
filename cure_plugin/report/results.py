"""Tables of results: shares, stages, single images, two nets compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cure_plugin.certification.compare import Comparison
from cure_plugin.certification.record import Record
from cure_plugin.certification.summary import Summary
from cure_plugin.report.table import Table

COMPARISON_CAPTION = (
    "Percent of images certified; only A, only B: how many images just that net proves; p: McNemar's exact test, "
    "two-sided."
)


def summary_caption(summaries: Mapping[str, Summary]) -> str:
    """What the numbers of :func:`summary_table` mean."""
    images = next(iter(summaries.values())).images
    return (
        f"Percent of {images} test images: certified by bounds (95 % interval) / not broken by the attack (an upper "
        "limit)."
    )


def summary_table(summaries: Mapping[str, Summary]) -> Table:
    """One row per method (the mapping's keys), a column per set, for the union and per kind of sets."""
    first = next(iter(summaries.values()))
    names = [*first.certified, "union", *first.groups]
    rows = [[method, _share(s.clean, s.intervals["clean"]), *_shares(s)] for method, s in summaries.items()]
    return Table(["method", "clean", *(f"{name} cert. / attack leaves" for name in names)], rows)


def text_table(summaries: Mapping[str, Summary]) -> str:
    """:func:`summary_table` with a column per method, as text, and what its numbers mean."""
    return f"{summary_table(summaries).transposed().as_text()}\n{summary_caption(summaries)}"


def stage_table(summaries: Mapping[str, Summary]) -> Table:
    """One row per method and set: how many images each stage decided, and the time spent."""
    rows = [
        [method, name, *map(_counts, stages.values()), f"{summary.seconds[name]:.1f}"]
        for method, summary in summaries.items()
        for name, stages in summary.stages.items()
    ]
    return Table(["method", "set", "proved", "falsified", "undecided", "seconds"], rows)


def image_table(records: Sequence[Record]) -> Table:
    """One row per image and set of certification records; an empty margin where none was found."""
    rows = [
        [
            *map(str, (record.index, record.label, record.prediction)),
            name,
            one.status,
            str(one.margin) if math.isfinite(one.margin) else "",
            one.stage,
            str(one.pieces),
            str(one.seconds),
        ]
        for record in records
        for name, one in record.sets.items()
    ]
    header = ["index", "label", "prediction", "set", "status", "margin", "stage", "pieces", "seconds"]
    return Table(header, rows)


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One row per set, for the union and per kind of sets."""
    rows = [
        [
            one.name,
            _percent(one.certified_a / one.images),
            _percent(one.certified_b / one.images),
            f"{100 * (one.certified_b - one.certified_a) / one.images:+.1f}",
            str(one.only_a),
            str(one.only_b),
            f"{one.p_value:.3g}",
        ]
        for one in comparisons
    ]
    return Table(["set", "A certified", "B certified", "B - A", "only A", "only B", "p"], rows)


def _shares(summary: Summary) -> list[str]:
    """Certified with its interval / not broken: per set, for the union and per kind of sets."""
    shares = [
        *((f"certified.{name}", share, summary.pgd[name]) for name, share in summary.certified.items()),
        ("union", summary.union, summary.union_pgd),
        *((f"groups.{name}", share, summary.groups_pgd[name]) for name, share in summary.groups.items()),
    ]
    return [f"{_share(share, summary.intervals[key])} / {_percent(limit)}" for key, share, limit in shares]


def _share(share: float, interval: tuple[float, float]) -> str:
    return f"{_percent(share)} ({_percent(interval[0])} to {_percent(interval[1])})"


def _percent(share: float) -> str:
    """0.725 -> "72.5"."""
    return f"{100 * share:.1f}"


def _counts(by_stage: Mapping[str, int]) -> str:
    """{"IBP": 3, "CROWN": 1} -> "4: IBP 3, CROWN 1"."""
    total = str(sum(by_stage.values()))
    return f"{total}: {', '.join(f'{stage} {count}' for stage, count in by_stage.items())}" if by_stage else total
