"""Frozen dataclasses in JSON files: one to a file, or one to a line of a file that an interrupted run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs

from cure_plugin.errors import DataError, OutputError
from cure_plugin.files import write_text

T = TypeVar("T")

CONVERTER = cattrs.Converter(forbid_extra_keys=True)
"""Between dataclasses and what JSON knows; a key that is none of the dataclass's, as of another version, is refused."""


def _only(allowed: type | tuple[type, ...], value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, if it is of a type that is allowed: not all that ``kind(...)`` takes."""
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{repr(value)[:40]} is no {kind.__name__}")
    return kind(value)


def _one_of(value: Any, kind: Any) -> Any:
    if value not in get_args(kind):
        raise ValueError(f"{repr(value)[:40]} is none of {', '.join(get_args(kind))}")
    return value


CONVERTER.register_structure_hook_func(lambda kind: get_origin(kind) is Literal, _one_of)
for _kind, _allowed in ((str, str), (bool, bool), (int, int), (float, (int, float))):
    CONVERTER.register_structure_hook(_kind, partial(_only, _allowed))


def plain(record: Any) -> dict[str, Any]:
    """``record`` as JSON has it."""
    return CONVERTER.unstructure(record)


def read_record(text: str, kind: type[T]) -> T:
    """The record that ``text`` is.

    Raises:
        ValueError: it is none; the message is one line.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"{' '.join(text.split())[:40]!r} is no JSON object")
        return CONVERTER.structure(value, kind)
    except cattrs.BaseValidationError as error:
        raise ValueError("; ".join(cattrs.transform_error(error, "$", _reason))) from error
    except RecursionError as error:
        raise ValueError("too deep") from error


def _reason(error: BaseException, kind: type | None) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return f"keys of another version, {', '.join(sorted(error.extra_fields))}"
    if type(error) is ValueError:
        return str(error)
    return cattrs.v.format_exception(error, kind)


def read_lines(
    path: Path,
    kind: type[T],
    remedy: str,
    check: Callable[[T, list[T]], None] = lambda record, before: None,
    torn: bool = False,
) -> list[T]:
    """The records of a file, one on each line.

    Args:
        remedy: what to do about a line that is none.
        check: refuses, by a ``ValueError``, a record that does not fit those before it.
        torn: pass over a last line that a kill cut short.

    Raises:
        DataError: the file cannot be read, or a line is no such record.
    """
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read results {path}: {error}; {remedy}") from error
    records: list[T] = []
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        try:
            record = read_record(line, kind)
            check(record, records)
        except ValueError as error:
            if torn and number > len(lines):
                break
            raise DataError(f"{path}, line {number}, is no record ({error}); {remedy}") from error
        records.append(record)
    return records


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """The file of ``records``, written atomically.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path, _lines(records))


def start_lines(path: Path, records: Iterable[Any], beside: Path, settings: Mapping[str, Any]) -> None:
    """:func:`write_lines`, and in the file ``beside`` the settings that :func:`resumable` compares.

    Raises:
        OutputError: one of them cannot be written.
    """
    write_text(beside, json.dumps(settings, indent=1) + "\n")
    write_lines(path, records)


def append_lines(path: Path, records: Iterable[Any]) -> None:
    """More records at the end of the file.

    Raises:
        OutputError: they cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_lines(records))
    except OSError as error:
        raise OutputError(f"cannot append to {path}: {error}; make room, then run again to resume") from error


def _lines(records: Iterable[Any]) -> str:
    return "".join(json.dumps(plain(record)) + "\n" for record in records)


def resumable(path: Path, beside: Path, settings: Mapping[str, Any], others: str) -> bool:
    """Whether there is a file ``path`` that a run of these ``settings`` may go on with.

    Args:
        beside: the file that holds the settings of ``path``, as :func:`start_lines` leaves it.
        others: what results of other settings are results of.

    Raises:
        DataError: it is of other settings, or of none that can be read.
    """
    if not path.exists():
        return False
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {beside}, the settings of {path}: {error}; delete both") from error
    wanted = json.loads(json.dumps(settings))
    if found != wanted:
        keys = dict.fromkeys([*found, *wanted]) if isinstance(found, dict) else {}
        differ = ", ".join(key for key in keys if found.get(key) != wanted.get(key))
        raise DataError(
            f"{path} holds results of {others} (what differs: {differ or 'all'}); delete it or choose another output"
        )
    return True
