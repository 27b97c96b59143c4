"""A benchmark root from its seed: instances drawn from certified candidates, stratum by stratum.

A root holds ``spec.yaml``, ``candidates.json``, ``candidates.npz`` and the trained nets in ``onnx/``. Drawn from them
are further nets in ``onnx/`` (with other inputs or outputs), ``vnnlib/`` and ``instances.csv`` (VNNLIB 1.0), the same
in ``2.0/``, ``witnesses/`` (counterexamples) and ``metadata.json``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml

from cure_plugin.errors import DataError, OutputError, SpecError
from cure_plugin.files import write_atomically
from cure_plugin.vnncomp.instances import Instance, instances_text
from cure_plugin.vnncomp.model_file import load_network
from cure_plugin.vnncomp.questions import (
    Question,
    around,
    contrast_and_brightness,
    free_pixels,
    in_boxes,
    in_l1_ball,
    in_l2_ball,
    of_parameters,
    parameter_units,
    patch_boxes,
    slope_and_slack,
    window,
    within_distance,
)
from cure_plugin.vnncomp.vnnlib import compressed, vnnlib_text

STRATA = ("trivial", "medium", "hard", "violated")
"""By what our certifier needed; of the last a counterexample is known."""

GENERATED = ("vnnlib", "2.0", "witnesses")
"""Folders that a run replaces."""


@dataclass(frozen=True)
class Root:
    """What a root holds before anything is drawn.

    Attributes:
        spec: ``name``, ``timeout`` (seconds), ``strata`` (stratum -> instances), ``nets`` (file names in ``onnx/``).
        candidates: see :func:`question`. arrays: what they refer to.
        nets: file name -> network.
    """

    spec: dict[str, Any]
    candidates: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    nets: dict[str, onnx.ModelProto]


def read_root(folder: Path) -> Root:
    """The root in a folder.

    Raises:
        DataError: a file is missing or malformed. CheckpointError: a net is.
    """
    try:
        spec = yaml.safe_load((folder / "spec.yaml").read_text())
        candidates = json.loads((folder / "candidates.json").read_text())
        with np.load(folder / "candidates.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        nets = {name: load_network(folder / "onnx" / name) for name in spec["nets"]}
        for key, number in (("timeout", spec["timeout"]), *((s, spec["strata"][s]) for s in STRATA)):
            if not isinstance(number, int | float) or not number >= 0:
                raise ValueError(f"{key} in spec.yaml must be a number >= 0, got {number!r}")
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError, zipfile.BadZipFile) as error:
        raise DataError(f"{folder} is no benchmark root: {' '.join(str(error).split())}") from error
    return Root(spec, candidates, arrays, nets)


def generate(folder: Path, seed: int) -> int:
    """Draw the instances of ``seed``, write everything below ``folder``; returns how many there are.

    Raises:
        SpecError: a negative seed, or too few candidates. DataError: see :func:`read_root`.
        OutputError: a file cannot be written.
    """
    root = read_root(folder)
    files = contents(root, seed)
    try:
        (folder / "instances.csv").unlink(missing_ok=True)  # first to go, last to come back
        for name in GENERATED:
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        for path in (folder / "onnx").glob("*.onnx"):
            if path.name not in root.nets:
                path.unlink()
    except OSError as error:
        raise OutputError(f"cannot replace what an earlier run left in {folder}: {error}") from error
    for name, content in files.items():
        write_atomically(folder / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return files["instances.csv"].count(b"\n")


def contents(root: Root, seed: int) -> dict[str, bytes]:
    """Path -> content of every generated file.

    Raises:
        SpecError: see :func:`generate`.
    """
    drawn = draw(root, seed)
    files: dict[str, bytes] = {}
    written = {_digest(_bytes(model)): name for name, model in root.nets.items()}
    instances: dict[str, list[Instance]] = {"1.0": [], "2.0": []}
    timeout = float(root.spec["timeout"])
    metadata = {}
    for candidate in drawn:
        comment = f"{root.spec['name']}: test image {candidate['image']}, {candidate['set']}"
        for version in instances:
            asked = question(root, candidate, version)
            content = _bytes(asked.model)
            network = written.get(_digest(content))
            if network is None:
                network = written[_digest(content)] = _net_name(candidate, version)
                files[f"onnx/{network}"] = content
            text = vnnlib_text(asked.wanted, version, comment).encode()
            if version == "1.0":
                files[f"vnnlib/{candidate['id']}.vnnlib"] = text
                one = Instance(f"onnx/{network}", f"vnnlib/{candidate['id']}.vnnlib", timeout)
                metadata[one.name] = candidate
                if candidate["stratum"] == "violated":
                    files[f"witnesses/{one.name}.txt"] = _witness(root.arrays[f"witness {candidate['id']}"])
            else:
                files[f"2.0/vnnlib/{candidate['id']}.vnnlib.gz"] = compressed(text)
                one = Instance(f"../onnx/{network}", f"vnnlib/{candidate['id']}.vnnlib.gz", timeout)
            instances[version].append(one)
    files["metadata.json"] = (json.dumps({"seed": seed, "instances": metadata}, indent=1) + "\n").encode()
    for version, listed in instances.items():
        files["instances.csv" if version == "1.0" else "2.0/instances.csv"] = instances_text(listed).encode()
    return files


def draw(root: Root, seed: int) -> list[dict[str, Any]]:
    """The candidates of ``seed``: as many of each stratum as ``spec.yaml`` says, its nets and sets in turn.

    Raises:
        SpecError: a negative seed, too few candidates.
    """
    if seed < 0:
        raise SpecError(f"seed must be a whole number >= 0, got {seed}")
    generator = np.random.default_rng(seed)
    drawn = []
    for stratum in STRATA:
        count = int(root.spec["strata"][stratum])
        pool = [candidate for candidate in root.candidates if candidate["stratum"] == stratum]
        if len(pool) < count:
            raise SpecError(f"{root.spec['name']} has {len(pool)} candidates of stratum {stratum}, needs {count}")
        queues: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for index in generator.permutation(len(pool)):
            queues.setdefault((pool[index]["net"], pool[index]["set"]), []).append(pool[index])
        turns = [queue[turn] for turn in range(len(pool)) for queue in queues.values() if turn < len(queue)]
        drawn += turns[:count]
    return [drawn[index] for index in generator.permutation(len(drawn))]


def question(root: Root, candidate: dict[str, Any], version: str) -> Question:
    """What a candidate asks, in a version of VNNLIB.

    A candidate names its ``net``, the position ``at`` of its image in the array ``images`` (uint8), the ``label``, and
    an ``encoding`` with its ``kind`` and what that needs.
    """
    image = root.arrays["images"][candidate["at"]].astype(np.float32) / np.float32(255)
    task = _Task(root.nets[candidate["net"]], image, candidate["label"], root.arrays, candidate["id"], version)
    return _KINDS[candidate["encoding"]["kind"]](task, candidate["encoding"])


@dataclass(frozen=True)
class _Task:
    model: onnx.ModelProto
    image: np.ndarray
    label: int
    arrays: dict[str, np.ndarray]
    name: str
    version: str

    @property
    def flat(self) -> np.ndarray:
        return self.image.astype(np.float64).ravel()

    def stored(self, what: str) -> np.ndarray:
        """An array that belongs to the candidate."""
        return self.arrays[f"{what} {self.name}"]


def _linf(task: _Task, encoding: dict[str, Any]) -> Question:
    return in_boxes(task.model, [around(task.flat, encoding["eps"])], task.label)


def _ball(task: _Task, encoding: dict[str, Any]) -> Question:
    norm, eps, hull = encoding["norm"], encoding["eps"], around(task.flat, encoding["eps"])
    if task.version == "1.0":
        return within_distance(task.model, task.flat, hull, norm, eps, task.label)
    ball = in_l2_ball if norm == "l2" else in_l1_ball
    return ball(task.model, task.flat, hull, eps, task.label)


def _boxes(task: _Task, _: dict[str, Any]) -> Question:
    return in_boxes(task.model, [(low, high) for low, high in task.stored("boxes").astype(np.float64)], task.label)


def _patch(task: _Task, encoding: dict[str, Any]) -> Question:
    boxes = patch_boxes(task.flat, task.image.shape, tuple(encoding["sides"]), tuple(encoding["block"]))
    return in_boxes(task.model, boxes, task.label)


def _contents(task: _Task, encoding: dict[str, Any]) -> Question:
    free = window(task.image.shape, *encoding["corner"], *encoding["sides"])
    box = np.zeros(int(free.sum())), np.ones(int(free.sum()))
    return of_parameters(task.model, *free_pixels(task.flat, free), box, task.label)


def _parameters(task: _Task, encoding: dict[str, Any]) -> Question:
    low, high = (np.array(encoding[end], dtype=np.float64) for end in ("lower", "upper"))
    box = low / parameter_units(encoding["names"]), high / parameter_units(encoding["names"])
    return of_parameters(task.model, *contrast_and_brightness(task.flat, encoding["names"]), box, task.label)


def _planes(task: _Task, _: dict[str, Any]) -> Question:
    low, high = task.stored("box").astype(np.float64)
    return of_parameters(task.model, *slope_and_slack(task.stored("slope"), (low, high)), task.label)


_KINDS: dict[str, Callable[[_Task, dict[str, Any]], Question]] = {
    "linf": _linf,
    "ball": _ball,
    "boxes": _boxes,
    "patch": _patch,
    "contents": _contents,
    "parameters": _parameters,
    "planes": _planes,
}


def _net_name(candidate: dict[str, Any], version: str) -> str:
    """Name of a network that is no trained net as it stands."""
    net = candidate["net"].removesuffix(".onnx")
    encoding = candidate["encoding"]
    if encoding["kind"] != "ball":
        return f"{candidate['id']}.onnx"
    return f"{net}_{encoding['norm']}_{'distance' if version == '1.0' else 'sum'}.onnx"


def _witness(point: np.ndarray) -> bytes:
    """A counterexample as verifiers write it, with every digit, so that no rounding leaves the set."""
    lines = [f"(X_{i} {float(value)!r})" for i, value in enumerate(point)]
    return ("sat\n(" + "\n".join(lines) + ")\n").encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _bytes(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))
