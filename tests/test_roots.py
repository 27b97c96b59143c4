"""The benchmark roots that ship with the repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import one_fast

from cure_plugin.vnncomp.benchmark import LONGEST, faults
from cure_plugin.vnncomp.generate import STRATA, contents, generate, read_root
from cure_plugin.vnncomp.root import GENERATOR, write_generator

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROOTS = ("cure_multinorm", "cure_geometric", "cure_patch")


@pytest.mark.parametrize("name", one_fast(ROOTS))
def test_roots_repeat_themselves(name: str) -> None:
    root = read_root(BENCHMARKS / name)
    first = contents(root, 1)
    assert contents(root, 1) == first
    rows = first["instances.csv"].decode().splitlines()
    assert len(rows) >= 60 and sum(float(row.split(",")[2]) for row in rows) <= LONGEST
    entries = json.loads(first["metadata.json"])["instances"].values()
    assert {entry["stratum"] for entry in entries} == set(STRATA)
    others = json.loads(contents(root, 2)["metadata.json"])["instances"].values()
    assert {entry["image"] for entry in entries} != {entry["image"] for entry in others}


@pytest.mark.parametrize("name", ROOTS)
def test_generators_and_readmes_are_what_a_root_is_written_with(name: str, tmp_path: Path) -> None:
    """``write_generator`` brings a generator up to date."""
    write_generator(tmp_path)
    assert (BENCHMARKS / name / GENERATOR).read_text() == (tmp_path / GENERATOR).read_text()
    assert (BENCHMARKS / name / "README.md").read_text() == (BENCHMARKS / "roots" / f"{name}.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ROOTS)
def test_roots_are_as_the_platform_wants_them(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BENCHMARKS / name, tmp_path / name))
    generate(folder, 7)
    assert faults(folder) == []
