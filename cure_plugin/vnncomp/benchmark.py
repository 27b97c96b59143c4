"""A benchmark root looked at as VNN-COMP's platform would: what is wrong with it, in words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cure_plugin.errors import CheckpointError, CureError, DataError, OutputError
from cure_plugin.vnncomp.generate import GENERATED, STRATA
from cure_plugin.vnncomp.graphs import input_shape, output_size
from cure_plugin.vnncomp.instances import Instance, base_name, read_instances
from cure_plugin.vnncomp.model_file import load_network
from cure_plugin.vnncomp.pack import VENDOR, missing_copies, pack
from cure_plugin.vnncomp.query import Query, read_query, read_text
from cure_plugin.vnncomp.replay import Answer, Network, fault_of, read_answer
from cure_plugin.vnncomp.root import GENERATOR
from cure_plugin.vnncomp.vnnlib import VERSIONS

LONGEST = 21_600
"""Seconds that all timeouts may sum to."""

_LARGEST_FILE, _LARGEST_ROOT = 100, 30
"""MB."""

_OPERATORS = {"Conv", "Relu", "Flatten", "Reshape", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div"}

_FILES = (GENERATOR, "spec.yaml", "candidates.json", "candidates.npz", "README.md", "metadata.json", "instances.csv")


def faults(folder: Path) -> list[str]:
    """Everything that is wrong with the generated root in ``folder``; empty where nothing is.

    Raises:
        OutputError: there is no room for a copy to generate in.
    """
    missing = list(_missing(folder))
    if missing:
        return missing
    found = list(_sizes(folder))
    for version in VERSIONS:
        found += _tree_faults(folder, version)
    if not found:  # what follows needs a readable root
        found += _verdict_faults(folder)
        found += _generator_faults(folder)
    return found


def _missing(folder: Path) -> Iterator[str]:
    missing = [name for name in (*_FILES, "onnx", "vnnlib") if not (folder / name).exists()]
    yield from (f"{name} is missing" for name in missing)
    if (folder / VENDOR).is_dir() and not missing:
        try:
            yield from (f"{name} is missing; pack the root again" for name in missing_copies(folder))
        except DataError as error:
            yield str(error)


def _sizes(folder: Path) -> Iterator[str]:
    total = 0
    for path in folder.rglob("*"):
        if path.is_symlink():
            yield f"{path.relative_to(folder)} is a link; put the file itself there"
        elif path.is_file():
            total += path.stat().st_size
            if path.stat().st_size > _LARGEST_FILE * 1e6:
                yield f"{path.relative_to(folder)} is larger than {_LARGEST_FILE} MB"
    if total > _LARGEST_ROOT * 1e6:
        yield f"the root holds {total / 1e6:.1f} MB, more than {_LARGEST_ROOT}"


def _tree_faults(folder: Path, version: str) -> Iterator[str]:
    """The list of a version's instances and its files."""
    tree = folder if version == "1.0" else folder / version
    try:
        instances = read_instances(tree / "instances.csv")
    except CureError as error:
        yield str(error)
        return
    total = sum(one.timeout for one in instances)
    if total > LONGEST:
        yield f"{version}: timeouts sum to {total:g} s, more than {LONGEST}"
    for side in ("onnx", "vnnlib"):
        names = {getattr(one, side) for one in instances}
        for base, count in Counter(map(base_name, names)).items():
            if count > 1:
                yield f"{version}: {count} {side} files are called {base}"
    for name, count in Counter(one.name for one in instances).items():
        if count > 1:
            yield f"{version}: instance {name} is listed {count} times"
    sizes: dict[str, tuple[int, int]] = {}
    for one in instances:
        try:
            if one.onnx not in sizes:
                sizes[one.onnx] = _network_sizes(tree / one.onnx)
            yield from (
                f"{version}: {fault}" for fault in _property_faults(tree / one.vnnlib, version, sizes[one.onnx])
            )
        except CureError as error:
            yield f"{version}: {error}"


def _network_sizes(path: Path) -> tuple[int, int]:
    """(inputs, outputs) of a network that every verifier can read.

    Raises:
        CureError: it is none.
    """
    model = load_network(path)
    operators = {node.op_type for node in model.graph.node}
    if operators - _OPERATORS:
        raise CureError(f"{path.name} uses {', '.join(sorted(operators - _OPERATORS))}")
    stored = onnx.load(path, load_external_data=False)
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in stored.graph.initializer):
        raise CureError(f"{path.name} keeps weights in another file")
    Network(path)
    return int(np.prod(input_shape(model))), output_size(model)


def _property_faults(path: Path, version: str, sizes: tuple[int, int]) -> Iterator[str]:
    query = read_query(path)
    if (query.inputs, query.outputs) != sizes:
        yield f"{path.name} has {query.inputs} inputs and {query.outputs} outputs, its network {sizes[0]}, {sizes[1]}"
    if ("declare-network" in read_text(path)) != (version == "2.0"):
        yield f"{path.name} is not of version {version}"
    elif version == "1.0":
        if not query.cases():
            yield f"{path.name} holds for no input: a lower bound lies above its upper bound, or nothing is asked"
    else:
        yield from _type_faults(path)


def _type_faults(path: Path) -> Iterator[str]:
    """What the standard's own parser says, where it is installed."""
    try:
        import vnnlib
    except ImportError:
        return
    try:
        vnnlib.parse_query_string(read_text(path))
    except vnnlib.VNNLibException as error:
        yield f"{path.name} does not type-check: {str(error)[:200]}"


def _verdict_faults(folder: Path) -> Iterator[str]:
    """Strata, certificates and witnesses of ``metadata.json``."""
    try:
        entries: dict[str, Any] = json.loads((folder / "metadata.json").read_text())["instances"]
        strata = {entry.get("stratum") for entry in entries.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"metadata.json cannot be read: {error!r}"
        return
    instances = {one.name: one for one in read_instances(folder / "instances.csv")}
    for name in sorted(set(instances) ^ set(entries)):
        yield f"{name} is in only one of instances.csv and metadata.json"
    for stratum in sorted(set(STRATA) - strata):
        yield f"no instance is of stratum {stratum}"
    networks: dict[str, Network] = {}
    for name in set(instances) & set(entries):
        one, entry = instances[name], entries[name]
        network = networks.setdefault(one.onnx, Network(folder / one.onnx))
        yield from _entry_faults(folder, one, entry, network)


def _entry_faults(folder: Path, one: Instance, entry: dict[str, Any], network: Network) -> Iterator[str]:
    verdict, witness = entry.get("verdict"), folder / "witnesses" / f"{one.name}.txt"
    if (entry.get("stratum") == "violated") != (verdict == "violated"):
        yield f"{one.name} is of stratum {entry.get('stratum')} but its verdict is {verdict}"
    if verdict == "violated":
        if not witness.is_file():
            yield f"{one.name} is called violated, without a witness"
            return
        try:
            fault = fault_of(network, read_query(folder / one.vnnlib), read_answer(witness))
        except CureError as error:
            fault = str(error)
        if fault:
            yield f"the witness of {one.name} does not replay: {fault}"
    elif verdict == "robust":
        margin = entry.get("margin")
        if not entry.get("stage") or not isinstance(margin, int | float) or not margin > 0:
            yield f"{one.name} is called robust, without a certificate"
        query = read_query(folder / one.vnnlib)
        points = [_middle(query)]
        try:
            points += [read_answer(witness)] if witness.exists() else []
        except CureError as error:
            yield f"{one.name} is called robust, and has a witness that cannot be read: {error}"
        if not all(fault_of(network, query, point) for point in points):
            yield f"{one.name} is called robust, but there is a counterexample"
    elif verdict != "unknown":
        yield f"{one.name} has the verdict {verdict!r}; known: robust, violated, unknown"


def _middle(query: Query) -> Answer:
    """The middle of the (first) input box as a would-be counterexample."""
    case = query.cases()[0]
    return Answer("sat", np.clip((case.lower + case.upper) / 2, case.lower, case.upper))


def _generator_faults(folder: Path) -> Iterator[str]:
    """Run the generator in a packed copy: the seed of ``metadata.json`` leaves the same files, the next seed others."""
    try:
        seed = int(json.loads((folder / "metadata.json").read_text())["seed"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        yield f"metadata.json names no seed: {error!r}"
        return
    with tempfile.TemporaryDirectory(prefix="cure-bench-") as scratch:
        copy = Path(scratch) / folder.resolve().name
        try:
            if (folder / VENDOR).is_dir():
                shutil.copytree(folder, copy)
            else:
                pack(folder, copy)
        except (CheckpointError, DataError) as error:
            yield str(error)
            return
        except OSError as error:
            raise OutputError(f"cannot copy {folder} to {scratch}: make room there, or set TMPDIR") from error
        again = _generated(copy, seed)
        if isinstance(again, str):
            yield again
            return
        there = _contents(folder)
        for name in sorted(set(there) ^ set(again)):
            yield f"{GENERATOR} {seed} does not leave the same files: {name}"
        for name in sorted(set(there) & set(again)):
            if again[name] != there[name]:
                yield f"{GENERATOR} {seed} writes another {name}"
        other = _generated(copy, seed + 1)
        if isinstance(other, str):
            yield other
        elif other["instances.csv"] == again["instances.csv"]:
            yield f"{GENERATOR} draws the same instances with seeds {seed} and {seed + 1}"


def _generated(copy: Path, seed: int) -> dict[str, bytes] | str:
    """What the generator leaves, or what went wrong."""
    for name in GENERATED:
        shutil.rmtree(copy / name, ignore_errors=True)
    command = [sys.executable, GENERATOR, str(seed)]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if run.returncode:
        return f"{GENERATOR} {seed} ended with {run.returncode}: {run.stderr.strip()[-300:]}"
    return _contents(copy)


def _contents(folder: Path) -> dict[str, bytes]:
    """What a run of the generator leaves, by path."""
    names = ("instances.csv", "metadata.json", "onnx", *GENERATED)
    paths = [path for name in names for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
