"""Solvers of ours as commands that ``cure verify`` calls: ``python -m MODULE ONNX VNNLIB RESULTS TIMEOUT``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np

from cure_plugin.errors import CureError
from cure_plugin.files import write_text
from cure_plugin.vnncomp.query import Query, read_query
from cure_plugin.vnncomp.replay import Answer, Network, answer_text, fault_of

Solver = Callable[[str, Query, float], tuple[str, np.ndarray | None]]
"""(ONNX file, query, seconds) -> (result, counterexample where ``sat``)."""


def run_command(solver: Solver, arguments: Sequence[str]) -> int:
    """Solve and write the results file; 0, or 2 where the files cannot be used.

    A ``sat`` that onnxruntime does not confirm, as of two classes that tie but for rounding, is ``unknown``.
    """
    onnx, vnnlib, results, timeout = arguments
    try:
        query = read_query(vnnlib)
        answer = Answer(*solver(onnx, query, float(timeout)))
        if answer.inputs is not None:
            network = Network(onnx)
            confirmed = fault_of(network, query, answer) is None
            answer = Answer("sat", answer.inputs, network(answer.inputs)) if confirmed else Answer("unknown")
        write_text(results, answer_text(answer))
    except CureError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0
