"""Sphinx: `make docs` builds these pages, which also read well as they are, into out/docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cure_plugin

project = "cure_plugin"
author = "the cure_plugin developers"
release = version = cure_plugin.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["requirements.txt"]
html_theme = "furo"
html_title = f"cure_plugin {version}"
html_copy_source = False
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False


def _links(_app: object, _name: str, source: list[str]) -> None:
    """Links out of docs/ to a page that is included here lead to that page."""
    source[0] = source[0].replace("](../CONTRIBUTING.md", "](contributing.md")


def _included(_app: object, _path: Path, _parent: str, content: list[str]) -> None:
    """CONTRIBUTING.md is written for the repository's root."""
    content[0] = re.sub(r"\]\(docs/", "](", content[0]).replace("](examples/", "](../examples/")


def _shapes(_app: object, _what: str, _name: str, _of: object, _options: object, lines: list[str]) -> None:
    """``(B, *input)`` in docstrings is a shape, no emphasis."""
    lines[:] = [re.sub(r"(?<=[ (])\*(?=[a-z_]+[),\s])", r"\\*", line) for line in lines]


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _links)  # type: ignore[attr-defined]
    app.connect("include-read", _included)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", _shapes)  # type: ignore[attr-defined]
