"""One self-contained HTML page: tables, margins, certified-accuracy curves, example images."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cure_plugin.certification.record import Record
from cure_plugin.certification.summary import Summary
from cure_plugin.files import write_text
from cure_plugin.report.plots import curve_plot, margin_plot, picture
from cure_plugin.report.results import stage_table, summary_caption, summary_table

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0}th,td{border:1px solid #ccc;padding:.35rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}th{background:#f3f3f3}
figure{display:inline-block;margin:.5rem;text-align:center;vertical-align:top;width:13rem}
figure img{width:6rem;image-rendering:pixelated;border:1px solid #ccc}figcaption{font-size:.8rem}
.plot{max-width:100%}code{background:#f3f3f3;padding:0 .2rem}
"""

_MARGINS = (
    "Per image the best lower bound of the smallest margin over the set, or where falsified the margin of the "
    "misclassified point. The outermost bars also hold the 1 % beyond each end."
)
_CURVES = "Proved by bounds and splitting, without attacks; the union is of all sets shown."


@dataclass(frozen=True)
class Example:
    """One image to show.

    Attributes:
        image: (C, H, W) in [0, 1]. attacked: the counterexample, or None.
        caption: plain text below it.
    """

    image: Tensor
    attacked: Tensor | None
    caption: str


@dataclass(frozen=True)
class Page:
    """What a report shows.

    Attributes:
        title: plain text. summaries: method -> shares.
        settings: a line of plain text below the tables.
        records: method -> certification records, for histograms of the margins.
        factors, curves: method -> set -> certified share at each multiple of the sets' sizes; no curves if empty.
        examples: heading -> images.
        notes: paragraphs of plain text, e.g. what outside tools said.
        lead: one sentence, before anything else.
    """

    title: str
    summaries: Mapping[str, Summary]
    settings: str = ""
    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    factors: Sequence[float] = ()
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    lead: str = ""

    def as_html(self) -> str:
        """The whole page.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        parts = [
            f"<h1>{html.escape(self.title)}</h1>",
            *([_paragraph(self.lead)] if self.lead else []),
            _paragraph(summary_caption(self.summaries)),
            summary_table(self.summaries).as_html(),
            "<h2>Which stage decided</h2>",
            stage_table(self.summaries).as_html(),
        ]
        if self.settings:
            parts.append(_paragraph(self.settings))
        if self.records:
            parts += ["<h2>Margins</h2>", _paragraph(_MARGINS)]
            for method, listed in self.records.items():
                parts += [f"<h3>{html.escape(method)}</h3>", _plot(margin_plot(listed), f"Margins of {method}")]
        if self.curves:
            parts += ["<h2>Certified accuracy as the sets grow</h2>", _paragraph(_CURVES)]
            parts.append(_plot(curve_plot(self.factors, self.curves), "Certified accuracy over the sets' sizes"))
        for heading, shown in self.examples.items():
            parts.append(f"<h2>{html.escape(heading)}</h2>")
            parts.append("".join(_figure(example) for example in shown) or "<p>None.</p>")
        if self.notes:
            parts += ["<h2>Outside checks</h2>", *map(_paragraph, self.notes)]
        body = "\n".join(parts)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f"<style>{_STYLE}</style>\n{body}\n</html>\n"
        )


def write_report(path: str | Path, page: Page) -> None:
    """Write a page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    write_text(path, page.as_html())


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _plot(source: str, alt: str) -> str:
    return f'<img class="plot" alt="{html.escape(alt)}" src="{source}">'


def _figure(example: Example) -> str:
    pictures = [example.image] if example.attacked is None else [example.image, example.attacked]
    tags = "".join(f'<img alt="{html.escape(example.caption)}" src="{picture(p)}">' for p in pictures)
    return f"<figure>{tags}<figcaption>{html.escape(example.caption)}</figcaption></figure>"
