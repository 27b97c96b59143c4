"""README and docs: their code runs, their tables are those of the ledger, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cure_plugin

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import ledger

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
VERDICT = "proved|falsified|undecided"
SCRIPTS = {"README.md": VERDICT, "docs/training.md": "tensor", "docs/usage.md": VERDICT}
"""Page -> what its snippets print, run one after the other."""


def code(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def run_snippets(name: str, folder: Path, times: int) -> None:
    (folder / "script.py").write_text("\n".join(code(ROOT / name, "python")))
    for _ in range(times):
        run = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, "") and re.search(SCRIPTS[name], run.stdout)
    assert name != "README.md" or (folder / "files" / "instances.csv").exists()


def test_no_snippet_is_left_out() -> None:
    """CONTRIBUTING's is a package's tests, which run as such below."""
    assert {str(page.relative_to(ROOT)) for page in PAGES if code(page, "python")} == {*SCRIPTS, "CONTRIBUTING.md"}


def test_every_public_name_and_every_example_has_its_place_in_the_docs() -> None:
    reference, gallery = ((ROOT / "docs" / name).read_text() for name in ("api.md", "gallery.md"))
    assert set(re.findall(r"auto(?:class|function):: (\w+)", reference)) == set(cure_plugin.__all__)
    assert set(re.findall(r"examples/(\w+\.py)", gallery)) == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_snippets_run_as_one_script(name: str, tmp_path: Path) -> None:
    run_snippets(name, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_snippets_run_again(name: str, tmp_path: Path) -> None:
    run_snippets(name, tmp_path, 2)


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


@pytest.fixture
def own_package(tmp_path: Path) -> Path:
    """CONTRIBUTING's package as pip would install it, and its tests."""
    page = ROOT / "CONTRIBUTING.md"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    for example, module in (("dimming", "dimming"), ("logit_pairing", "pairing")):
        (tmp_path / "mine" / f"{module}.py").write_text((ROOT / "examples" / f"{example}.py").read_text())
    (tests,), (toml,) = code(page, "python"), code(page, "toml")
    (tmp_path / "test_mine.py").write_text(tests)
    (tmp_path / "mine-1.dist-info").mkdir()
    (tmp_path / "mine-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    groups = re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", toml).replace('"', "")
    (tmp_path / "mine-1.dist-info" / "entry_points.txt").write_text(groups)
    return tmp_path


def ran(folder: Path, *words: str) -> str:
    """What a command prints that runs in a folder whose package is installed."""
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", *words]
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_a_package_of_your_own_passes_the_inherited_tests_and_is_found(own_package: Path) -> None:
    passed = ran(own_package, "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py")
    assert " failed" not in passed
    assert re.search(r"^dim +largest share", ran(own_package, "cure_plugin", "sets"), re.MULTILINE)


@pytest.mark.slow
def test_a_package_of_your_own_trains_and_certifies_on_the_command_line(own_package: Path) -> None:
    (commands,) = (block for block in code(ROOT / "CONTRIBUTING.md", "") if "cure train" in block)
    for line in commands.splitlines():
        printed = ran(own_package, "cure_plugin", *shlex.split(line, comments=True)[1:])
    assert "dim0.3 cert." in printed


def test_plots_are_small() -> None:
    assert all(path.stat().st_size < 100_000 for path in (ROOT / "docs" / "images").iterdir())
