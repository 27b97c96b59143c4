"""Ask Marabou, a complete verifier that we did not write, about an instance."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cure_plugin.errors import DataError, MissingDependencyError
from cure_plugin.export.vnnlib import BoxInstance


@dataclass(frozen=True)
class Answer:
    """Marabou's verdict.

    Attributes:
        result: ``unsat`` (the property holds: no input of the box is misclassified), ``sat``, ``timeout``
            or ``unknown`` (also where Marabou finds even the bare input box infeasible).
        counterexample: (d,) where ``sat``.
        seconds: its own solving time.
    """

    result: str
    counterexample: np.ndarray | None
    seconds: float


def ask_marabou(onnx_path: str | Path, instance: BoxInstance, timeout: int = 60) -> Answer:
    """Solve one instance in this process.

    Args:
        timeout: seconds, a whole number.

    Raises:
        MissingDependencyError: maraboupy is not installed.
        DataError: the file cannot be read, or the net's input does not fit the instance.
    """
    try:
        from maraboupy import Marabou, MarabouUtils
    except ImportError as error:
        raise MissingDependencyError("Marabou is not installed: pip install 'cure-plugin[verify]'") from error
    logging.getLogger("maraboupy").setLevel(logging.WARNING)
    if not Path(onnx_path).is_file():
        raise DataError(f"ONNX file {onnx_path} does not exist")
    network = Marabou.read_onnx(str(onnx_path))
    inputs = network.inputVars[0].flatten()
    outputs = network.outputVars[0].flatten()
    if len(inputs) != len(instance.lower) or len(outputs) != instance.classes:
        raise DataError(
            f"{onnx_path} maps {len(inputs)} inputs to {len(outputs)} outputs, "
            f"the instance has {len(instance.lower)} and {instance.classes}"
        )
    for variable, low, high in zip(inputs, instance.lower, instance.upper, strict=True):
        network.setLowerBound(int(variable), float(low))
        network.setUpperBound(int(variable), float(high))
    options = Marabou.createOptions(verbosity=0, timeoutInSeconds=timeout)
    rivals = []
    for j, variable in enumerate(outputs):
        if j != instance.label:
            beats = MarabouUtils.Equation(MarabouUtils.MarabouCore.Equation.GE)
            beats.addAddend(1.0, int(variable))
            beats.addAddend(-1.0, int(outputs[instance.label]))
            beats.setScalar(0.0)
            rivals.append([beats])
    network.addDisjunctionConstraint(rivals)
    result, values, statistics = network.solve(verbose=False, options=options)
    seconds = statistics.getTotalTimeInMicro() / 1e6
    if result == "sat":
        return Answer("sat", np.array([values[int(v)] for v in inputs]), seconds)
    if result == "unsat" and not _box_is_feasible(network, options):
        return Answer("unknown", None, seconds)
    return Answer({"unsat": "unsat", "TIMEOUT": "timeout"}.get(result, "unknown"), None, seconds)


def _box_is_feasible(network: Any, options: Any) -> bool:
    """Whether Marabou finds a point of the input box when nothing is asked of the outputs.

    Marabou 2.0.0 takes variables whose range is below 1e-5 for constants; on nets with very small
    weights that makes its own equations contradict each other, and everything is "unsat". An
    answer is worth something only where this query is satisfiable.
    """
    network.disjunctionList.clear()
    result, _, _ = network.solve(verbose=False, options=options)
    return bool(result == "sat")
