"""Writing files so that nothing half-written ever stands under its name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cure_plugin.errors import OutputError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place.

    Args:
        path: the file to create or replace; its folder is created.
        write: receives the open binary file.

    Raises:
        OutputError: the folder or the file cannot be written (permissions, disk full ...).
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.partial"  # always the same: one that a kill left is replaced
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise OutputError(f"cannot write {path}: {error}; choose a writable place with room") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path`` atomically.

    Raises:
        OutputError: see :func:`write_atomically`.
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def make_folder(path: Path) -> None:
    """Create the folder where there is none.

    Raises:
        OutputError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create folder {path}: {error}; choose a writable place") from error
