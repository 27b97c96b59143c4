"""Verifiers as commands: which to run, where, and how to read what they answer."""

from __future__ import annotations

import contextlib
import os
import signal
import string
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from cure_plugin.errors import DataError, SpecError
from cure_plugin.registry import Registry
from cure_plugin.vnncomp.replay import Answer, read_answer

_PATIENCE = 0.5
"""Seconds between looks at the clock."""

ARGUMENTS = ("{onnx}", "{vnnlib}", "{results}", "{timeout}")
"""What most commands end with."""

_PLACEHOLDERS = ("category", "onnx", "vnnlib", "results", "timeout")


@dataclass(frozen=True)
class Verifier:
    """A tool and its command line.

    Attributes:
        name: what to call it.
        run: the command and its arguments; ``{onnx}``, ``{vnnlib}``, ``{results}`` (file to write), ``{timeout}``
            (seconds) and ``{category}`` are filled in.
        prepare: a command to run before, not counted as running time.
        folder: where to run them; default: where we are.
        environment: variables to set.
        grace: seconds past the timeout until it is stopped, for what a tool needs to start and to end; an answer
            within them counts.

    Raises:
        SpecError: no command, an unknown placeholder, or a grace that is negative or not finite.
    """

    name: str
    run: tuple[str, ...]
    prepare: tuple[str, ...] = ()
    folder: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    grace: float = 10.0

    def __post_init__(self) -> None:
        if not self.name or not self.run:
            raise SpecError("a verifier needs a name and the command to run")
        if not 0 <= self.grace < float("inf"):
            raise SpecError(f"grace must be finite and >= 0 seconds, got {self.grace!r}")
        for part in (*self.run, *self.prepare):
            try:
                found = [field for field in string.Formatter().parse(part) if field[1] is not None]
            except ValueError:
                found = [(part, part, "", None)]
            if any(name not in _PLACEHOLDERS or form or conversion for _, name, form, conversion in found):
                known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
                raise SpecError(f"verifier {self.name}: {part!r} is malformed; placeholders are {known}")


VERIFIERS: Registry[Verifier] = Registry("verifier", "cure_plugin.verifiers")
"""Verifiers by name: subclasses whose fields have defaults; other packages add theirs by ``cure_plugin.verifiers``."""


def find_verifier(name: str) -> Verifier:
    """One of :data:`VERIFIERS`, or the one that a YAML file describes (keys: :class:`Verifier`'s attributes).

    Raises:
        SpecError: an unknown name, unknown keys, values of a wrong kind. DataError: the file cannot be read.
    """
    if not name.endswith((".yaml", ".yml")):
        try:
            return VERIFIERS.make(name)
        except SpecError as error:
            raise SpecError(f"{error}; or give a .yaml file that describes one") from error
    try:
        content = yaml.safe_load(Path(name).read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"cannot read verifier {name}: {' '.join(str(error).split())}") from error
    return _from_mapping(name, content)


def _from_mapping(source: str, content: Any) -> Verifier:
    known = {one.name for one in fields(Verifier)}
    if not isinstance(content, Mapping) or not set(content) <= known or not {"name", "run"} <= set(content):
        raise SpecError(f"{source} must map name and run, and perhaps {', '.join(sorted(known - {'name', 'run'}))}")
    values = dict(content)
    for key in ("run", "prepare"):
        command = values.get(key, [])
        words = isinstance(command, list) and all(isinstance(part, str | int | float) for part in command)
        if not words or any(isinstance(part, bool) for part in command):  # YAML reads true and no as booleans
            raise SpecError(f"{source}: {key} must be a list of words, got {command!r}")
        values[key] = tuple(command)
    if not isinstance(values.get("environment", {}), Mapping):
        raise SpecError(f"{source}: environment must map names to values, got {values['environment']!r}")
    if not isinstance(values.get("grace", 10.0), int | float):
        raise SpecError(f"{source}: grace must be a number of seconds, got {values['grace']!r}")
    try:
        values |= {key: tuple(map(str, values[key])) for key in ("run", "prepare")}
        values |= {key: str(values.get(key) or "") for key in ("name", "folder")}
        values["environment"] = {str(k): str(v) for k, v in values.get("environment", {}).items()}
        return Verifier(**values)
    except ValueError as error:  # also a number with too many digits
        raise SpecError(f"{source}: {error}") from error


@dataclass(frozen=True)
class Attempt:
    """What came of one run: the answer, seconds, and the end of the output where something went wrong."""

    answer: Answer
    prepare_seconds: float
    seconds: float
    message: str = ""


def ask(
    verifier: Verifier,
    category: str,
    onnx: Path,
    vnnlib: Path,
    timeout: float,
    stop: threading.Event | None = None,
) -> Attempt:
    """Run ``verifier`` on one instance.

    It and all that it started are stopped after the timeout and its grace, or once ``stop`` is set.
    """
    stop = stop or threading.Event()
    with tempfile.TemporaryDirectory(prefix="cure-verify-") as scratch:
        results = Path(scratch) / "results.txt"
        values = {
            "category": category,
            "onnx": str(onnx.resolve()),
            "vnnlib": str(vnnlib.resolve()),
            "results": str(results),
            "timeout": f"{timeout:g}",
        }
        prepared = 0.0
        if verifier.prepare:
            status, prepared, output = _execute(verifier, verifier.prepare, values, 600 + verifier.grace, stop)
            if status != 0:
                return Attempt(Answer("error"), prepared, 0.0, f"prepare ended with {status}: {output}")
        status, seconds, output = _execute(verifier, verifier.run, values, timeout + verifier.grace, stop)
        if status is None:
            return Attempt(Answer("timeout"), prepared, seconds)
        try:
            if results.exists() and not results.is_file():
                raise DataError(f"{results} is no plain file")
            return Attempt(read_answer(results), prepared, seconds)
        except DataError as error:
            return Attempt(Answer("error"), prepared, seconds, f"{error}; it ended with {status}: {output}")


def _execute(
    verifier: Verifier, command: tuple[str, ...], values: dict[str, str], limit: float, stop: threading.Event
) -> tuple[int | None, float, str]:
    """(exit status or None where it was stopped, seconds, end of its output)."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                [part.format(**values) for part in command],
                cwd=verifier.folder or None,
                env={**os.environ, **verifier.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # ValueError: a word or variable that no process can be given
            return 127, time.perf_counter() - started, str(error)
        status: int | None = None
        try:
            while status is None and not stop.is_set() and time.perf_counter() - started < limit:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(_PATIENCE)
        finally:
            _stop(process)
        log.seek(max(0, log.seek(0, os.SEEK_END) - 500))
        return status, time.perf_counter() - started, log.read().decode(errors="replace").strip()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
