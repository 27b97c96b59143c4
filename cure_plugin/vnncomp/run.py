"""Ask a verifier about every line of an instances.csv: in parallel, resumable, its counterexamples replayed."""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx as onnx_files
from google.protobuf.message import DecodeError

from cure_plugin.errors import CheckpointError, DataError, OutputError, SpecError
from cure_plugin.files import write_text
from cure_plugin.json_files import append_lines, read_lines, resumable, start_lines
from cure_plugin.progress import progress_bar
from cure_plugin.vnncomp.instances import Instance, base_name, csv_text, read_instances
from cure_plugin.vnncomp.query import read_query
from cure_plugin.vnncomp.replay import Answer, Network, answer_text, fault_of, read_answer
from cure_plugin.vnncomp.verifiers import Attempt, Verifier, ask
from cure_plugin.vnncomp.vnnlib import VERSIONS

OURS = {"robust": "unsat", "violated": "sat"}
"""What our verdict in a root's ``metadata.json`` is called by verifiers."""


@dataclass(frozen=True)
class Run:
    """One line of results.

    Attributes:
        onnx, vnnlib: as in the list of instances.
        result: sat, unsat, unknown, timeout or error.
        fault: why the counterexample of a ``sat`` does not count; empty where it does.
        ours: our own verdict as a result, where it is known.
        message: the end of a failed tool's output, or why a counterexample could not be replayed.
    """

    name: str
    onnx: str
    vnnlib: str
    prepare_seconds: float
    result: str
    seconds: float
    fault: str = ""
    ours: str = ""
    message: str = ""

    @property
    def contradicts(self) -> bool:
        """Whether this result and our verdict cannot both be true, or its counterexample is none."""
        opposite = {self.result, self.ours} == {"sat", "unsat"}
        return bool(self.fault) or opposite


def verify(
    path: Path, verifier: Verifier, folder: Path, jobs: int = 1, progress: bool = False, category: str = ""
) -> list[Run]:
    """Run ``verifier`` on every instance of ``path``.

    Writes to ``folder``: ``runs.jsonl`` as it goes (what it holds is not run again), ``counterexamples/NAME.txt``, and
    at the end ``results.csv`` (category,onnx,vnnlib,prepare_time,result,runtime).

    Args:
        jobs: instances at once, >= 1.
        category: for results.csv; default: the name of the list's folder.

    Raises:
        SpecError: ``jobs`` < 1. DataError: the list cannot be read, or ``folder`` holds another verifier's results.
        OutputError: results cannot be written.
    """
    if jobs < 1:
        raise SpecError(f"jobs must be >= 1, got {jobs}")
    instances = _distinct(path)
    root = path.resolve().parent
    category = category or root.name
    ours = our_verdicts(root, instances)
    settings = {
        "verifier": asdict(verifier),
        "instances": [asdict(one) for one in instances],
        "files": {name: _digest(path, name) for one in instances for name in (one.onnx, one.vnnlib)},
    }
    done = _resume(folder, settings)
    left = [one for one in instances if one.name not in done]
    lock, stop = threading.Lock(), threading.Event()
    with progress_bar(len(instances), "instance", verifier.name, progress, len(done)) as bar:

        def work(one: Instance) -> None:
            run = _one(root, one, verifier, category, folder, stop)
            if stop.is_set():
                return
            with lock:
                done[one.name] = run
                append_lines(folder / "runs.jsonl", [run])
                bar.set_postfix(Counter(r.result for r in done.values()), refresh=False)
                bar.update()

        pool = ThreadPoolExecutor(max_workers=jobs)
        try:
            for future in [pool.submit(work, one) for one in left]:
                future.result()
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    runs = [replace(done[one.name], ours=ours.get(one.name, "")) for one in instances]
    write_results(folder / "results.csv", category, runs)
    return runs


def check(path: Path, counterexamples: Path) -> list[Run]:
    """The answers in a folder of results files (``NAME.txt`` or ``NAME.counterexample``, plain or ``.gz``), replayed.

    Instances without a file are ``unknown``, those whose file cannot be read an ``error``.

    Raises:
        DataError: the list cannot be read, or no instance has a results file.
    """
    instances = _distinct(path)
    root = path.resolve().parent
    ours = our_verdicts(root, instances)
    users = Counter(base_name(one.vnnlib) for one in instances)
    runs, found = [], 0
    for one in instances:
        alone = users[base_name(one.vnnlib)] == 1  # then the property's name says which instance is meant
        bases = [one.name, *([base_name(one.vnnlib)] if alone else [])]
        endings = (".txt", ".counterexample", ".txt.gz", ".counterexample.gz")
        files = [counterexamples / f"{base}{ending}" for base in bases for ending in endings]
        file = next((name for name in files if name.is_file()), None)
        found += file is not None
        try:
            attempt = Attempt(Answer("unknown") if file is None else read_answer(file), 0.0, 0.0)
        except DataError as error:
            attempt = Attempt(Answer("error"), 0.0, 0.0, str(error))
        runs.append(replace(_run(root, one, attempt), ours=ours.get(one.name, "")))
    if not found:
        raise DataError(f"{counterexamples} holds no results file of {path}, such as {instances[0].name}.txt")
    return runs


def _distinct(path: Path) -> list[Instance]:
    """The list of instances, each with a name of its own, all files there."""
    instances = read_instances(path)
    for name, count in Counter(one.name for one in instances).items():
        if count > 1:
            raise DataError(f"{path} lists {count} instances called {name}: results could not be told apart")
    for one in instances:
        for file in (one.onnx, one.vnnlib):
            if not (path.resolve().parent / file).is_file():
                raise DataError(f"{path} lists {file}, which does not exist beside it")
    return instances


def _digest(path: Path, name: str) -> str:
    """A hash of a file that ``path`` lists."""
    return hashlib.sha256((path.resolve().parent / name).read_bytes()).hexdigest()


def our_verdicts(root: Path, instances: Sequence[Instance]) -> dict[str, str]:
    """Instance name -> sat or unsat, where ``metadata.json`` beside the list knows.

    The one beside the root's own list speaks for the tree of another version too: by the names of the properties, as
    the networks may differ there.

    Raises:
        DataError: it cannot be read.
    """
    path, nested = root / "metadata.json", False
    if not path.exists():
        path, nested = root.parent / "metadata.json", root.name in VERSIONS
        if not (nested and path.exists()):
            return {}
    try:
        entries = json.loads(path.read_text())["instances"]
        known = {
            entry["id"] if nested else name: OURS[entry["verdict"]]
            for name, entry in entries.items()
            if entry["verdict"] in OURS
        }
        names = {one.name: base_name(one.vnnlib) if nested else one.name for one in instances}
        return {name: known[key] for name, key in names.items() if key in known}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"cannot read {path}: {error!r}; generate it again") from error


def write_results(path: Path, category: str, runs: Sequence[Run]) -> None:
    """results.csv as VNN-COMP scores it.

    Raises:
        OutputError: it cannot be written.
    """
    rows = [
        (category, run.onnx, run.vnnlib, f"{run.prepare_seconds:.3f}", run.result, f"{run.seconds:.3f}") for run in runs
    ]
    write_text(path, csv_text(rows))


def summary_text(runs: Sequence[Run]) -> str:
    """Counts of results, agreement with our verdicts, and every contradiction, in lines."""
    counts = Counter(run.result for run in runs)
    lines = [", ".join(f"{count} {result}" for result, count in counts.most_common())]
    known = [run for run in runs if run.ours]
    agreeing = sum(run.result == run.ours and not run.fault for run in known)
    if known:
        lines.append(f"our verdict is known for {len(known)}: {agreeing} agree")
    for run in runs:
        if run.contradicts:
            said = f"{run.result} ({run.fault})" if run.fault else run.result
            lines.append(f"CONTRADICTION {run.name}: {said}; ours: {run.ours or 'not known'}")
        elif run.message:
            lines.append(f"{run.name}: {run.message}")
    return "\n".join(lines)


def _one(root: Path, one: Instance, verifier: Verifier, category: str, folder: Path, stop: threading.Event) -> Run:
    with tempfile.TemporaryDirectory(prefix="cure-instance-") as scratch:
        try:
            onnx, vnnlib = (_unpacked(root / name, Path(scratch)) for name in (one.onnx, one.vnnlib))
        except DataError as error:
            attempt = Attempt(Answer("error"), 0.0, 0.0, str(error))
        else:
            attempt = ask(verifier, category, onnx, vnnlib, one.timeout, stop)
    if attempt.answer.inputs is not None:
        write_text(folder / "counterexamples" / f"{one.name}.txt", answer_text(attempt.answer))
    return _run(root, one, attempt)


def _run(root: Path, one: Instance, attempt: Attempt) -> Run:
    """The line of results that an attempt makes; a counterexample that cannot be replayed is no answer."""
    result, fault, message = attempt.answer.result, "", attempt.message
    try:
        fault = _fault(root, one, attempt.answer)
    except (CheckpointError, DataError) as error:
        result, message = "error", f"it answers {result}, but its counterexample cannot be replayed: {error}"
    times = round(attempt.prepare_seconds, 3), round(attempt.seconds, 3)
    return Run(one.name, one.onnx, one.vnnlib, times[0], result, times[1], fault=fault, message=message)


def _fault(root: Path, one: Instance, answer: Answer) -> str:
    """Why a ``sat`` does not count, or nothing."""
    if answer.result != "sat":
        return ""
    with tempfile.TemporaryDirectory(prefix="cure-instance-") as scratch:
        network = Network(_unpacked(root / one.onnx, Path(scratch)))
    return fault_of(network, read_query(root / one.vnnlib), answer) or ""


def _unpacked(path: Path, scratch: Path) -> Path:
    """A copy, decompressed where need be and with its weights inside: some tools leave files beside what they read.

    Raises:
        DataError: it cannot be unpacked. OutputError: there is no room for the copy.
    """
    target = scratch / path.name.removesuffix(".gz")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        if path.suffix == ".onnx":
            content = _with_weights(path, content)
    except (OSError, EOFError, zlib.error, onnx_files.checker.ValidationError) as error:
        raise DataError(f"cannot unpack {path}: {error}") from error
    try:
        target.write_bytes(content)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error}; make room there, or set TMPDIR to another place") from error
    return target


def _with_weights(path: Path, content: bytes) -> bytes:
    """``content`` of the network in ``path``, with the weights that lie in other files; a broken one as it is."""
    try:
        model = onnx_files.load_from_string(content)
    except DecodeError:
        return content
    if all(tensor.data_location != onnx_files.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        return content
    return bytes(onnx_files.load(path).SerializeToString())


def _resume(folder: Path, settings: dict[str, Any]) -> dict[str, Run]:
    """What an earlier run of the same verifier on the same files found; what went wrong may have been mended since."""
    log, beside = folder / "runs.jsonl", folder / "runs.settings.json"
    runs: dict[str, Run] = {}
    if resumable(log, beside, settings, "another verifier or list, or of files that have changed"):
        found = read_lines(log, Run, f"delete it and {beside.name}", torn=True)
        runs = {run.name: run for run in found if run.result != "error"}
    start_lines(log, runs.values(), beside, settings)
    return runs
