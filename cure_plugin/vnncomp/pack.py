"""A benchmark root packed for VNN-COMP's platform: with copies of the package's modules that its generator runs."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cure_plugin.errors import DataError, OutputError
from cure_plugin.files import make_folder
from cure_plugin.vnncomp.generate import read_root
from cure_plugin.vnncomp.root import GENERATOR

VENDOR = "vendor"
"""Folder of a packed root that holds the copies."""

_PACKAGE = Path(__file__).resolve().parents[1]

_NOT_COPIED = (VENDOR, "__pycache__")


def pack(folder: Path, out: Path) -> None:
    """Copy the root in ``folder`` to ``out``, a new folder, with the modules that its generator runs in ``vendor``.

    What the generator left in ``folder`` is copied with it. ``out`` appears when it is complete.

    Raises:
        DataError: ``folder`` is no benchmark root. CheckpointError: a net of it cannot be read.
        OutputError: ``out`` exists, lies in ``folder`` or cannot be written.
    """
    read_root(folder)
    copies = _copies(folder)
    if os.path.lexists(out):
        raise OutputError(f"{out} exists already; name a folder that does not")
    if folder.resolve() in out.resolve().parents:
        raise OutputError(f"{out} lies in {folder}, which it is to be a copy of; name a folder elsewhere")
    make_folder(out.parent)
    unfinished = out.parent / f".{out.name}.partial"  # always the same: one that a kill left is replaced
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(folder, unfinished, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        for name, content in copies.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_bytes(content)
        unfinished.rename(out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error}; choose a writable place with room") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def missing_copies(folder: Path) -> list[str]:
    """Files in ``vendor`` that the generator of the packed root ``folder`` needs and that are not there.

    Raises:
        DataError: the generator cannot be read.
    """
    return [name for name in _copies(folder) if not (folder / name).is_file()]


def _copies(folder: Path) -> dict[str, bytes]:
    """Path in a packed root -> content of the package that its generator runs."""
    package = f"{VENDOR}/{_PACKAGE.name}"
    copies = {f"{package}/__init__.py": f'"""Copies of those modules that {GENERATOR} runs."""\n'.encode()}
    for path in _modules(folder):
        copies[f"{package}/{path.relative_to(_PACKAGE).as_posix()}"] = path.read_bytes()
    return copies


def _modules(folder: Path) -> list[Path]:
    """Files of this package that a root's generator imports, and those that they import in turn."""
    found: set[Path] = set()
    try:
        asked = list(_imported(folder / GENERATOR))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{folder} is no benchmark root: {GENERATOR} cannot be read: {error}") from error
    while asked:
        for path in _files(asked.pop()):
            if path not in found:
                found.add(path)
                asked += _imported(path)
    return sorted(found)


def _imported(path: Path) -> Iterator[str]:
    """Names, with dots, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(name: str) -> Iterator[Path]:
    """This package's modules on the way to a name, without the package itself; none for a name of another package."""
    top, *parts = name.split(".")
    if top == _PACKAGE.name:
        for depth in range(1, len(parts) + 1):
            path = _PACKAGE.joinpath(*parts[:depth])
            yield from (file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file())
