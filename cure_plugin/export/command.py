"""Solvers of ours as commands that ``cure verify`` calls: ``python -m MODULE ONNX VNNLIB RESULTS TIMEOUT``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np

from cure_plugin.errors import CureError
from cure_plugin.files import write_text
from cure_plugin.vnncomp.query import Query, read_query
from cure_plugin.vnncomp.replay import Answer, Network, answer_text

Solver = Callable[[str, Query, float], tuple[str, np.ndarray | None]]
"""(ONNX file, query, seconds) -> (result, counterexample where ``sat``)."""


def run_command(solver: Solver, arguments: Sequence[str]) -> int:
    """Solve and write the results file; 0, or 2 where the files cannot be used."""
    onnx, vnnlib, results, timeout = arguments
    try:
        result, point = solver(onnx, read_query(vnnlib), float(timeout))
        outputs = None if point is None else Network(onnx)(point)
        write_text(results, answer_text(Answer(result, point, outputs)))
    except CureError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0
