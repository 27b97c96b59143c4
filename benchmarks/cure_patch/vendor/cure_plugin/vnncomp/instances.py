"""instances.csv: which networks and properties belong together, and how long a verifier may take."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cure_plugin.errors import DataError
from cure_plugin.files import write_text


@dataclass(frozen=True)
class Instance:
    """One line: paths relative to the file's folder, and seconds."""

    onnx: str
    vnnlib: str
    timeout: float

    @property
    def name(self) -> str:
        """What results go by: the two base names."""
        return f"{base_name(self.onnx)}_{base_name(self.vnnlib)}"


def base_name(path: str) -> str:
    """A file's name without folder and endings."""
    name = Path(path).name
    for ending in (".gz", ".onnx", ".vnnlib"):
        name = name.removesuffix(ending)
    return name


def write_instances(path: str | Path, instances: Sequence[Instance]) -> None:
    """Write the list: onnx,vnnlib,timeout, no header.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, instances_text(instances))


def instances_text(instances: Sequence[Instance]) -> str:
    """What :func:`write_instances` writes."""
    return csv_text([(one.onnx, one.vnnlib, f"{one.timeout:g}") for one in instances])


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Rows as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def read_instances(path: str | Path) -> list[Instance]:
    """The list in a file.

    Raises:
        DataError: missing, empty, or a line that is not onnx,vnnlib,timeout with a timeout > 0; the message names it.
    """
    try:
        rows = list(csv.reader(Path(path).read_text().splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    instances = []
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        try:
            onnx, vnnlib, timeout = (value.strip() for value in row)
            instance = Instance(onnx, vnnlib, float(timeout))
        except ValueError as error:
            raise DataError(f"{path} line {number}: expected onnx,vnnlib,timeout, got {','.join(row)!r}") from error
        if not 0 < instance.timeout < float("inf") or not onnx or not vnnlib:
            raise DataError(f"{path} line {number}: needs two paths and a timeout > 0, got {','.join(row)!r}")
        instances.append(instance)
    if not instances:
        raise DataError(f"{path} lists no instances")
    return instances
