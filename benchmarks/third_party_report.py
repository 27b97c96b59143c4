"""Table and plot of the runs of bench_third_party.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reproduce_report import save

from cure_plugin.report.plots import load_pyplot

Row = dict[str, Any]

_HEAD = (
    "| net | set | images | by | proved, % | falsified, % | open, % | published, % proved of 200 images | "
    "s an image (longest) |"
)


def table(rows: Sequence[Row]) -> str:
    """As Markdown, and how it was measured."""
    lines = [_HEAD, "|---" * _HEAD.count(" | ") + "|---|"]
    for row in rows:
        published = f"{row['published']} ({row['published_by']})" if row.get("published") else "-"
        shares = [f"{percent(row, key):.1f}" for key in ("proved", "falsified", "open")]
        seconds = f"{row['seconds']:.1f} ({row['longest']:.0f})"
        cells = [row["net"], row["set"], str(row["images"]), row.get("by", "ours"), *shares, published, seconds]
        lines.append(f"| {' | '.join(cells)} |")
    starts = {row["by"]: row["start"] for row in rows if "by" in row}
    others = [
        f" Seconds of {by} do not count the {start:.1f} s that it takes to start." for by, start in starts.items()
    ]
    lines += [
        "",
        f"Falsified: misclassified images too. At most {rows[0]['limit']:.0f} s an image, of ours of branch and bound "
        f"alone.{''.join(others)}",
    ]
    return "\n".join(lines)


def percent(row: Row, key: str) -> float:
    """Of the images."""
    return 100 * float(row[key]) / float(row["images"])


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """Ours that have a published share beside them, of the most images."""
    ours = [row for row in rows if row.get("published")]
    return [row for row in ours if row["images"] == max(one["images"] for one in ours)]


def bars(rows: Sequence[Row], path: Path) -> None:
    """Proved and published shares of each net, as an SVG file; dots: what is not falsified."""
    pyplot = load_pyplot()
    chosen = main_rows(rows)
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    for shift, colour, label in ((-0.2, "#c7c7c7", "published"), (0.2, "#c8503c", "cure_plugin")):
        shares = [row["published"] if label == "published" else percent(row, "proved") for row in chosen]
        axes.bar([place + shift for place in range(len(chosen))], shares, 0.4, color=colour, label=label)
    limits = [100 - percent(row, "falsified") for row in chosen]
    axes.plot([place + 0.2 for place in range(len(chosen))], limits, "k.", markersize=5, label="not falsified")
    names = [row["net"].replace("sdpfo_", "").replace("_", "\n", 1) for row in chosen]
    axes.set_xticks(range(len(chosen)), [f"{name}\n{row['set']}" for name, row in zip(names, chosen, strict=True)])
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel("images, %")
    axes.set_ylim(0, 100)
    axes.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.tight_layout()
    save(figure, "third party", path)
