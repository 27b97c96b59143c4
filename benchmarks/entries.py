"""A run in the ledger: what was measured, at which commit, where and how."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cure_plugin.errors import DataError
from cure_plugin.files import write_text
from cure_plugin.json_files import plain, read_record


@dataclass(frozen=True)
class Hardware:
    """What a run was measured on."""

    cpu: str
    cores: int | None
    python: str


@dataclass(frozen=True)
class Entry:
    """One result file; each benchmark has figures of its own."""

    commit: str
    seed: int
    hardware: Hardware
    command: str
    figures: dict[str, Any]


def read_entry(path: Path) -> Entry:
    """The run in a result file.

    Raises:
        DataError: it holds none. FileNotFoundError: not measured yet.
    """
    try:
        return read_record(path.read_text(), Entry)
    except ValueError as error:
        raise DataError(f"{path} is no result of a benchmark ({error}); measure it again") from error


def write_entry(path: Path, entry: Entry) -> Path:
    """Write the result file and return its path."""
    write_text(path, json.dumps(plain(entry), indent=1) + "\n")
    return path
