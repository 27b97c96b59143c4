"""Counterexamples again on onnxruntime, by VNN-COMP's rule of 2026.

onnxruntime's outputs decide: those that a tool claims are not even read. Inputs may be off by 1e-4, outputs by nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from cure_plugin.errors import CheckpointError, DataError
from cure_plugin.vnncomp.model_file import unpacked
from cure_plugin.vnncomp.query import Query, read_text

INPUT_TOLERANCE = 1e-4
"""Absolute: by how much a counterexample may leave the input set."""

RESULTS = ("sat", "unsat", "unknown", "timeout", "error")
"""What a verifier can answer; ``unsat``: the property holds."""

_INPUT = re.compile(r"\(\s*X(?:_(\d{1,9})|\[([\d,\s]{1,99})\])\s+([^\s()]+)\s*\)", re.IGNORECASE)
_SYNONYMS = {"violated": "sat", "holds": "unsat", "run_instance_timeout": "timeout", "no_result_in_file": "error"}


@dataclass(frozen=True)
class Answer:
    """A result, and for ``sat`` flattened inputs.

    ``outputs`` are for those who read a file that we write; no replay looks at them.
    """

    result: str
    inputs: np.ndarray | None = None
    outputs: np.ndarray | None = None


def read_answer(path: str | Path) -> Answer:
    """A results file: the result on the first line, then ``((X_0 0.5) ... (Y_0 1.25) ...)``; plain or ``.gz``.

    Inputs may have VNNLIB 2.0's names too, ``X[0,0]``. Whatever is said of outputs is passed over.

    Raises:
        DataError: it cannot be read, says something else, or its inputs have gaps, come twice or are no numbers.
    """
    text = read_text(path).strip()
    word = re.split(r"[\s(]", text, maxsplit=1)[0].lower()
    result = _SYNONYMS.get(word, word)
    if result not in RESULTS:
        raise DataError(f"{path} starts with {word[:40]!r}; expected one of {', '.join(RESULTS)}")
    values: dict[tuple[int, ...], float] = {}
    for number, indices, value in _INPUT.findall(text):
        try:
            index = tuple(map(int, (indices or number).split(",")))
            if index in values:
                raise DataError(f"{path}: X {index} is given twice")
            values[index] = float(value)
        except ValueError as error:
            raise DataError(f"{path}: X {indices or number} is {value!r}, no number") from error
    return Answer(result, _flat(values, f"{path}: values of X"))


def _flat(found: dict[tuple[int, ...], float], what: str) -> np.ndarray | None:
    """Values by index as an array in row-major order."""
    if not found:
        return None
    if len({len(index) for index in found}) > 1:
        raise DataError(f"{what} have indices of different lengths")
    if len(found) != math.prod(max(along) + 1 for along in zip(*found, strict=True)):
        raise DataError(f"{what} are missing")
    return np.array([found[index] for index in sorted(found)])


def answer_text(answer: Answer) -> str:
    """``answer`` as VNN-COMP has it, and as :func:`read_answer` reads it but for the outputs."""
    if answer.inputs is None:
        return f"{answer.result}\n"
    pairs = [("X", answer.inputs), ("Y", np.zeros(0) if answer.outputs is None else answer.outputs)]
    lines = [f"({kind}_{i} {float(value)!r})" for kind, values in pairs for i, value in enumerate(values)]
    return f"{answer.result}\n(" + "\n".join(lines) + ")\n"


class Network:
    """An ONNX file, plain or ``.gz``, on onnxruntime's CPU provider: flattened input to flattened output.

    Numbers are of the type that the file takes, float32 or float64.

    Raises:
        CheckpointError: the file cannot be loaded, has several inputs or sizes left open (but the batch's).
    """

    def __init__(self, path: str | Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            model = unpacked(path) if str(path).endswith(".gz") else str(path)
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise CheckpointError(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error
        if len(self._session.get_inputs()) != 1:
            raise CheckpointError(f"{path} has {len(self._session.get_inputs())} inputs; one is supported")
        self._input = self._session.get_inputs()[0]
        self._dtype = np.float64 if self._input.type == "tensor(double)" else np.float32
        sizes = self._input.shape
        if not sizes or not all(isinstance(size, int) for size in sizes[1:]):
            raise CheckpointError(f"{path} takes inputs of shape {sizes}; only the first size may be left open")
        self.shape = (sizes[0] if isinstance(sizes[0], int) else 1, *sizes[1:])

    def __call__(self, point: np.ndarray) -> np.ndarray:
        """Outputs, float64.

        Raises:
            CheckpointError: onnxruntime cannot run the net on such an input of its shape.
        """
        x = point.astype(self._dtype).reshape(self.shape)
        try:
            outputs = self._session.run(None, {self._input.name: x})[0]
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise CheckpointError(f"onnxruntime cannot run the net: {str(error).splitlines()[0]}") from error
        return np.asarray(outputs, dtype=np.float64).ravel()


def fault_of(network: Network, query: Query, answer: Answer) -> str | None:
    """Why a counterexample does not count; None where it does: onnxruntime's own outputs satisfy the property."""
    if answer.inputs is None:
        return "no counterexample is given"
    if answer.inputs.shape != (query.inputs,):
        return f"it has {len(answer.inputs)} inputs, the property {query.inputs}"
    if math.prod(network.shape) != query.inputs:
        return f"the property has {query.inputs} inputs, the network {math.prod(network.shape)}"
    if not np.isfinite(answer.inputs).all():
        return "its inputs are not finite"
    found = network(answer.inputs)
    if found.shape != (query.outputs,):
        return f"the property has {query.outputs} outputs, the network {len(found)}"
    if query.satisfied(answer.inputs, found, INPUT_TOLERANCE):
        return None
    return "it does not satisfy the property's assertions"
