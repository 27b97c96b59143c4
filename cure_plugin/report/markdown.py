"""Pages in GitHub's Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cure_plugin.certification.compare import Comparison
from cure_plugin.certification.summary import Summary
from cure_plugin.report.results import COMPARISON_CAPTION, comparison_table, stage_table, summary_caption, summary_table


def summary_markdown(title: str, summaries: Mapping[str, Summary], settings: str) -> str:
    """Shares and stages of one or several methods; ``settings`` is a line of plain text."""
    return _page(
        title,
        summary_caption(summaries),
        summary_table(summaries).as_markdown(),
        "Which stage decided:",
        stage_table(summaries).as_markdown(),
        settings,
    )


def comparison_markdown(first: str, second: str, comparisons: Sequence[Comparison]) -> str:
    """Two results files, named ``first`` and ``second``, beside each other."""
    images = comparisons[0].images
    return _page(
        "Certified robustness of two nets",
        f"A: `{first}`, B: `{second}`; {images} images.",
        comparison_table(comparisons).as_markdown(),
        COMPARISON_CAPTION,
    )


def _page(title: str, *blocks: str) -> str:
    return "\n\n".join([f"# {title}", *blocks]) + "\n"
