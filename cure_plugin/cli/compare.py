"""``cure compare``."""

from __future__ import annotations

import argparse

from cure_plugin.certification.compare import compare_files
from cure_plugin.files import write_text
from cure_plugin.report import comparison_markdown, comparison_table
from cure_plugin.report.results import COMPARISON_CAPTION


def compare(options: argparse.Namespace) -> None:
    """Compare two results files; written to a folder where one is given."""
    comparisons = compare_files(options.first, options.second)
    table = comparison_table(comparisons)
    print(f"A: {options.first}\nB: {options.second}\n{table.as_text()}\n{COMPARISON_CAPTION}")
    if options.out is not None:
        page = comparison_markdown(str(options.first), str(options.second), comparisons)
        write_text(options.out / "compare.md", page)
        write_text(options.out / "compare.csv", table.as_csv())
