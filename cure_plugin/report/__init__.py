"""Results for people: tables as text, one HTML page with plots and example images."""

from cure_plugin.report.html import Example, write_report
from cure_plugin.report.table import text_table

__all__ = ["Example", "text_table", "write_report"]
