"""Ask Marabou, a complete verifier that we did not write, about an instance."""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cure_plugin.errors import DataError, MissingDependencyError
from cure_plugin.export.onnx_net import export_onnx, read_onnx_net
from cure_plugin.export.vnnlib import BoxInstance

_SCALE = 2.0**14
"""Marabou 2.0.0 takes a variable whose range is below 1e-5 for a constant; certified nets have many such
neurons, its equations then contradict each other and every query is "unsat". Multiplying the hidden
layers by a power of two, and dividing the last by it, is exact in floating point and changes no output."""


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
        onnx_path: a net as :func:`export_onnx` writes it.
        timeout: seconds, a whole number.

    Raises:
        MissingDependencyError: maraboupy is not installed.
        CheckpointError: the file cannot be read.
        DataError: the net's input does not fit the instance.
    """
    marabou = _import_marabou()
    options = marabou.Marabou.createOptions(verbosity=0, timeoutInSeconds=timeout)
    network = _query(marabou, onnx_path, instance)
    outputs = [int(variable) for variable in network.outputVars[0].flatten()]
    rivals = []
    for j, variable in enumerate(outputs):
        if j != instance.label:
            beats = marabou.MarabouUtils.Equation(marabou.MarabouCore.Equation.GE)
            beats.addAddend(1.0, variable)
            beats.addAddend(-1.0, outputs[instance.label])
            beats.setScalar(0.0)
            rivals.append([beats])
    network.addDisjunctionConstraint(rivals)
    result, values, statistics = network.solve(verbose=False, options=options)
    seconds = statistics.getTotalTimeInMicro() / 1e6
    if result == "sat":
        inputs = network.inputVars[0].flatten()
        return Answer("sat", np.array([values[int(variable)] for variable in inputs]), seconds)
    if result == "unsat":
        bare = _query(marabou, onnx_path, instance)
        feasible = bare.calculateBounds(verbose=False, options=options)[0] != "unsat"
        return Answer("unsat" if feasible else "unknown", None, seconds)
    return Answer("timeout" if result == "TIMEOUT" else "unknown", None, seconds)


def _import_marabou() -> Any:
    try:
        with warnings.catch_warnings(record=True):  # it warns that it cannot read TensorFlow nets
            import maraboupy
            from maraboupy import Marabou, MarabouCore, MarabouUtils  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("Marabou is not installed: pip install 'cure-plugin[verify]'") from error
    return maraboupy


def _query(marabou: Any, onnx_path: str | Path, instance: BoxInstance) -> Any:
    """Marabou's network with the instance's input box and nothing asked of the outputs."""
    net, shape = read_onnx_net(onnx_path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scaled.onnx"
        export_onnx(_scaled(net), shape, path)
        network = marabou.Marabou.read_onnx(str(path))
    inputs, outputs = network.inputVars[0].flatten(), network.outputVars[0].flatten()
    if len(inputs) != len(instance.lower) or len(outputs) != instance.classes:
        raise DataError(
            f"{onnx_path} maps {len(inputs)} inputs to {len(outputs)} outputs, "
            f"the instance has {len(instance.lower)} and {instance.classes}"
        )
    for variable, low, high in zip(inputs, instance.lower, instance.upper, strict=True):
        network.setLowerBound(int(variable), float(low))
        network.setUpperBound(int(variable), float(high))
    return network


def _scaled(net: nn.Sequential) -> nn.Sequential:
    """The same function with all hidden layers multiplied by :data:`_SCALE` (ReLU is positively homogeneous)."""
    scaled = copy.deepcopy(net)
    layers = [layer for layer in scaled if isinstance(layer, nn.Conv2d | nn.Linear)]
    if len(layers) < 2:
        return scaled
    with torch.no_grad():
        layers[0].weight.mul_(_SCALE)
        for layer in layers[:-1]:
            if layer.bias is not None:
                layer.bias.mul_(_SCALE)
        layers[-1].weight.div_(_SCALE)
    return scaled
