"""Ask Marabou, a complete verifier that we did not write, about an instance.

Also a command, see :mod:`cure_plugin.export.command`.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from cure_plugin.errors import CheckpointError, MissingDependencyError
from cure_plugin.export.command import run_command
from cure_plugin.export.onnx_net import export_onnx
from cure_plugin.export.onnx_reader import read_asked
from cure_plugin.vnncomp.query import Case, Linear, Query
from cure_plugin.vnncomp.replay import Answer, Network, fault_of

_SCALE = 2.0**14
"""Marabou 2.0.0 takes a variable whose range is below 1e-5 for a constant; certified nets have many such
neurons, its equations then contradict each other and every query is "unsat". Multiplying the hidden
layers by a power of two, and dividing the last by it, is exact in floating point and changes no output."""

_SLACKS = (0.0, 1e-4, 1e-2)
"""By how much outputs have to satisfy their constraints, in turn: Marabou likes to end where two classes tie, to
its own tolerance, and such a point is no counterexample for onnxruntime."""


_GRACE = 5.0
"""Seconds after its timeout that Marabou, which now and then does not look at its clock any more, is stopped."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Solved:
    """Marabou's verdict.

    Attributes:
        result: ``unsat`` (no input of the boxes satisfies the query: the net is robust), ``sat``, ``timeout``
            or ``unknown`` (also where Marabou finds even the bare input box infeasible, or its points satisfy the query
            to its own tolerance only).
        counterexample: (d,) where ``sat``; onnxruntime has confirmed it.
        seconds: its own solving time.
    """

    result: str
    counterexample: np.ndarray | None
    seconds: float


def ask_marabou(onnx_path: str | Path, query: Query, timeout: float = 60) -> Solved:
    """Solve one box-input query.

    Args:
        onnx_path: a net as :func:`export_onnx` writes it.
        timeout: seconds; Marabou counts whole ones.

    Raises:
        MissingDependencyError: maraboupy is not installed.
        CheckpointError: the file cannot be read, or is no chain of layers.
        DataError: the query binds its inputs by more than boxes, or the net does not fit it.
    """
    marabou = _import_marabou()
    network = Network(onnx_path)
    seconds, results = 0.0, []
    for case in query.cases():
        for slack in _SLACKS:
            answer = _solve(marabou, onnx_path, query, case, timeout - seconds, slack)
            seconds += answer.seconds
            if answer.result != "sat":
                break
            if fault_of(network, query, Answer("sat", answer.counterexample)) is None:
                return Solved("sat", answer.counterexample, seconds)
        results.append(answer.result if slack == 0 else "unknown")
    return Solved(next((r for r in ("timeout", "unknown") if r in results), "unsat"), None, seconds)


def _solve(marabou: Any, onnx_path: str | Path, query: Query, case: Case, timeout: float, slack: float) -> Solved:
    """One input box; ``slack`` makes a query that is harder to satisfy."""
    if timeout < 1:
        return Solved("timeout", None, 0.0)
    network = _network(marabou, onnx_path, query, case)
    outputs = [int(variable) for variable in network.outputVars[0].flatten()]
    network.addDisjunctionConstraint(
        [[_equation(marabou, linear, outputs, slack) for linear in alternative] for alternative in case.alternatives]
    )
    options = marabou.Marabou.createOptions(verbosity=0, timeoutInSeconds=int(timeout))

    def answer() -> tuple[str, dict[int, float], float]:
        result, values, statistics = network.solve(verbose=False, options=options)
        return result, values, statistics.getTotalTimeInMicro() / 1e6

    try:
        result, values, seconds = _apart(timeout + _GRACE, answer)
        if result == "sat":
            inputs = network.inputVars[0].flatten()
            return Solved("sat", np.array([values[int(variable)] for variable in inputs]), seconds)
        if result == "unsat":
            bare = _network(marabou, onnx_path, query, case)
            ends = _apart(timeout + _GRACE, lambda: bare.calculateBounds(verbose=False, options=options)[0])
            return Solved("unsat" if ends != "unsat" else "unknown", None, seconds)
    except TimeoutError:
        return Solved("timeout", None, timeout)
    except ChildProcessError:
        return Solved("unknown", None, 0.0)
    return Solved("timeout" if result == "TIMEOUT" else "unknown", None, seconds)


def _apart(seconds: float, call: Callable[[], _T]) -> _T:
    """What ``call`` returns in a process of its own.

    Raises:
        TimeoutError: it has not ended after so many seconds. ChildProcessError: it died.
    """
    context = multiprocessing.get_context("fork")  # whatever this process holds is there at once
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(call()), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TimeoutError(f"no answer within {seconds:g} s")
        return receiver.recv()
    except EOFError as error:
        raise ChildProcessError("no answer") from error
    finally:
        child.kill()
        child.join()
        receiver.close()


def _equation(marabou: Any, linear: Linear, outputs: list[int], slack: float) -> Any:
    equation = marabou.MarabouUtils.Equation(marabou.MarabouCore.Equation.LE)
    for number, factor in linear.coefficients.items():
        equation.addAddend(factor, outputs[number])
    equation.setScalar(linear.bound - slack)
    return equation


def _import_marabou() -> Any:
    try:
        with warnings.catch_warnings(record=True):  # it warns that it cannot read TensorFlow nets
            import maraboupy
            from maraboupy import Marabou, MarabouCore, MarabouUtils  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "Marabou is not installed: pip install 'cure-plugin[verify]', with Python 3.10 or 3.11 (it has no wheels "
            "for later ones)"
        ) from error
    return maraboupy


def _network(marabou: Any, onnx_path: str | Path, query: Query, case: Case) -> Any:
    """Marabou's network with the case's input box and nothing asked of the outputs."""
    found = read_asked(onnx_path, query)
    if not isinstance(found.net, nn.Sequential):
        raise CheckpointError(f"{onnx_path} is no chain of layers; Marabou is given chains")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scaled.onnx"
        export_onnx(_scaled(found.net), found.shape, path)
        network = marabou.Marabou.read_onnx(str(path))
    inputs = network.inputVars[0].flatten()
    for variable, low, high in zip(inputs, case.lower, case.upper, strict=True):
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


def _solver(onnx: str, query: Query, timeout: float) -> tuple[str, np.ndarray | None]:
    found = ask_marabou(onnx, query, timeout)
    return found.result, found.counterexample


if __name__ == "__main__":
    sys.exit(run_command(_solver, sys.argv[1:]))
