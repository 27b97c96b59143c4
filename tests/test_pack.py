"""Packed benchmark roots: self-contained, the same instances as unpacked ones, and refused where that cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import one_fast

from cure_plugin.cli import main
from cure_plugin.vnncomp.generate import GENERATED
from cure_plugin.vnncomp.pack import VENDOR
from cure_plugin.vnncomp.root import GENERATOR

CHECKOUT = Path(__file__).parents[1]
ROOTS = ("cure_multinorm", "cure_geometric", "cure_patch")
NEEDS = ("numpy", "onnx", "pyyaml")

ISOLATED = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Blocker:
    "Finds cure_plugin in the packed folder only, and nothing that the platform lacks."

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("torch", "auto_LiRPA", "onnxruntime", "tqdm"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        if top == "cure_plugin":
            spec = PathFinder.find_spec(name, path or ["vendor"])
            if spec is None:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
            return spec

sys.meta_path.insert(0, Blocker)
sys.path += {sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})}
sys.argv = ["{GENERATOR}", "3"]
runpy.run_path("{GENERATOR}", run_name="__main__")
"""


def copied(name: str, folder: Path) -> Path:
    """A root of the repository as it is in version control."""
    left = (*GENERATED, VENDOR, "instances.csv", "metadata.json", "*_*.onnx")
    return Path(shutil.copytree(CHECKOUT / "benchmarks" / name, folder / name, ignore=shutil.ignore_patterns(*left)))


def files_of(folder: Path) -> dict[str, bytes]:
    """Path -> content, without the copies of modules."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder): path for path in paths}
    return {str(name): path.read_bytes() for name, path in names.items() if name.parts[0] != VENDOR}


def run(folder: Path, command: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def packed(root: Path, out: Path) -> Path:
    assert main(["bench", "pack", str(root), str(out)]) == 0
    return out


@pytest.mark.parametrize("name", one_fast(ROOTS))
def test_a_packed_generator_needs_nothing_else_and_draws_the_same(name: str, tmp_path: Path) -> None:
    root = copied(name, tmp_path)
    out = packed(root, tmp_path / "deep" / "packed")
    assert files_of(out) == files_of(root) and [path.name for path in out.parent.iterdir()] == ["packed"]
    run(root, [sys.executable, GENERATOR, "3"])
    run(out, [sys.executable, "-I", "-S", "-c", ISOLATED])
    assert "vnnlib" in {Path(path).parts[0] for path in files_of(out)}
    assert files_of(out) == files_of(root)


def test_copies_are_of_the_modules_that_the_generator_runs(tmp_path: Path) -> None:
    out = packed(copied("cure_patch", tmp_path), tmp_path / "packed")
    copies = {path.relative_to(out / VENDOR / "cure_plugin"): path for path in (out / VENDOR).rglob("*.py")}
    for name, path in copies.items():
        assert name == Path("__init__.py") or path.read_text() == (CHECKOUT / "cure_plugin" / name).read_text()
    script = f"import sys\nsys.path.insert(0, '{VENDOR}')\nimport cure_plugin.vnncomp.generate\n"
    script += "print(*sorted(m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'cure_plugin'))"
    loaded = subprocess.run([sys.executable, "-B", "-c", script], cwd=out, capture_output=True, text=True, check=True)
    assert {(out / path).resolve() for path in loaded.stdout.split()} == {path.resolve() for path in copies.values()}


def test_a_packed_root_is_packed_anew_with_what_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = packed(copied("cure_patch", tmp_path), tmp_path / "packed")
    (out / VENDOR / "cure_plugin" / "files.py").write_text("raise ImportError('stale')")
    run(tmp_path / "cure_patch", [sys.executable, GENERATOR, "3"])
    shutil.copytree(tmp_path / "cure_patch", out, dirs_exist_ok=True)
    again = packed(out, tmp_path / "again")
    assert files_of(again) == files_of(out)
    run(again, [sys.executable, "-I", "-S", "-c", ISOLATED])
    assert "needs numpy, onnx and pyyaml alone" in capsys.readouterr().out


def test_what_a_kill_left_is_replaced(tmp_path: Path) -> None:
    root = copied("cure_patch", tmp_path)
    (tmp_path / ".packed.partial").mkdir()
    (tmp_path / ".packed.partial" / "half").touch()
    assert files_of(packed(root, tmp_path / "packed")) == files_of(root)
    assert not (tmp_path / ".packed.partial").exists()


@pytest.mark.parametrize(
    "spoiled, out, message",
    [
        ("", "there", "exists already"),
        ("", "link", "exists already"),
        ("", "cure_patch/packed", "lies in"),
        ("", "file/packed", "cannot create folder"),
        ("spec.yaml", "packed", "is no benchmark root"),
        ("candidates.npz", "packed", "is no benchmark root"),
        (GENERATOR, "packed", "is no benchmark root: generate_properties.py cannot be read"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_a_line(
    spoiled: str, out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied("cure_patch", tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    if spoiled:
        (root / spoiled).write_text("a: b: [\n c")
    before = sorted(tmp_path.rglob("*"))
    assert main(["bench", "pack", str(root), str(tmp_path / out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pack", str(tmp_path / "nowhere"), str(tmp_path / "packed")]) == 2
    assert "is no benchmark root" in capsys.readouterr().err


def test_an_unpacked_generator_without_the_package_says_what_to_do(tmp_path: Path) -> None:
    root = copied("cure_patch", tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", "-S", GENERATOR, "1"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install cure_plugin" in line and "cure bench pack" in line


@pytest.mark.slow
def test_generators_run_with_numpy_onnx_and_pyyaml_alone(tmp_path: Path) -> None:
    """In a virtual environment of their own: packed, and unpacked beside a cure_plugin without torch."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    versions = [f"{name}=={version(name)}" for name in NEEDS]
    install = [str(python), "-m", "pip", "install", "--quiet", *versions]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"{' '.join(versions)} cannot be installed here: {installed.stderr.strip()[-200:]}")
    for name in ROOTS:
        root = copied(name, tmp_path)
        out = packed(root, tmp_path / f"packed {name}")
        bare = packed(root, tmp_path / f"bare {name}")
        shutil.rmtree(bare / VENDOR)
        run(root, [sys.executable, GENERATOR, "3"])
        run(out, [python, "-I", GENERATOR, "3"])
        run(bare, [python, GENERATOR, "3"], {**os.environ, "PYTHONPATH": str(CHECKOUT)})
        assert files_of(out) == files_of(root) == files_of(bare)
