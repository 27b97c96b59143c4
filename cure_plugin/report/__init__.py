"""Results for people: tables as text, Markdown and CSV, one HTML page with plots and example images."""

from cure_plugin.report.html import Example, Page, write_report
from cure_plugin.report.markdown import comparison_markdown, summary_markdown
from cure_plugin.report.results import comparison_table, image_table, text_table

__all__ = [
    "Example",
    "Page",
    "comparison_markdown",
    "comparison_table",
    "image_table",
    "summary_markdown",
    "text_table",
    "write_report",
]
