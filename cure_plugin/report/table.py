"""The table of methods and shares, as plain rows and as text."""

from __future__ import annotations

from collections.abc import Mapping

from cure_plugin.certification.summary import Summary


def rows_of(summaries: Mapping[str, Summary]) -> tuple[list[str], list[list[str]]]:
    """(header, one row per method): percentages, certified / PGD per set, union with interval, kinds of sets."""
    first = next(iter(summaries.values()))
    sets, groups = list(first.certified), list(first.groups)
    columns = [f"{name} cert. / PGD" for name in sets]
    unions = ["union cert. / PGD", "union 95 % interval", *(f"{name} cert. / PGD" for name in groups)]
    header = ["method", "clean", *columns, *unions]
    rows = []
    for method, summary in summaries.items():
        low, high = summary.intervals["union"]
        pairs = [f"{percent(summary.certified[name])} / {percent(summary.pgd[name])}" for name in sets]
        union = f"{percent(summary.union)} / {percent(summary.union_pgd)}"
        wide = [f"{percent(summary.groups[name])} / {percent(summary.groups_pgd[name])}" for name in groups]
        rows.append([method, percent(summary.clean), *pairs, union, f"{percent(low)} to {percent(high)}", *wide])
    return header, rows


def percent(share: float) -> str:
    """0.725 -> "72.5"."""
    return f"{100 * share:.1f}"


def text_table(summaries: Mapping[str, Summary]) -> str:
    """The table in aligned columns, percentages."""
    header, rows = rows_of(summaries)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
