"""README and docs: their code runs, their tables are those of the ledger, their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

sys.path.insert(0, str(ROOT / "benchmarks"))

import ledger


def code(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "docs/usage.md"])
def test_snippets_run_as_one_script_and_again(name: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("\n".join(code(ROOT / name, "python")))
    for _ in range(2):
        run = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, "") and re.search("proved|falsified|undecided", run.stdout)
    assert name != "README.md" or (tmp_path / "files" / "instances.csv").exists()


def test_readme_is_short_and_starts_with_three_snippets() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    assert len(code(ROOT / "README.md", "python")) == 3


@pytest.mark.parametrize("page", ledger.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_ledger(page: Path) -> None:
    """``python benchmarks/ledger.py render`` writes them."""
    assert ledger.rendered(page.read_text()) == page.read_text()


def test_every_table_of_the_ledger_is_shown_once() -> None:
    shown = [name for page in PAGES for name in re.findall(r"<!-- table ([\w-]+) -->", page.read_text())]
    assert sorted(shown) == sorted(ledger.TABLES)


def test_readme_has_no_figure_of_its_own() -> None:
    """Shares, times and memory come from the ledger."""
    text = re.sub(r"<!-- table .*?<!-- end -->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert not re.search(r"\d ?(%|percent|points|s|seconds|minutes|hours|MiB|GiB|times)\b", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


def test_plots_are_small() -> None:
    assert all(path.stat().st_size < 100_000 for path in (ROOT / "docs" / "images").iterdir())
