"""A verifier of your own: it tries points at random and says ``sat`` where one is a counterexample.

Registered under a name, ``cure verify ... --verifier sampling`` runs it, a process for each instance. Name this module
in the entry-point group ``cure_plugin.verifiers`` and it is found without an import. A tool that is no Python module
needs none: a YAML file says how to call it (examples/verifiers).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from cure_plugin.export.command import run_command
from cure_plugin.vnncomp.query import Query
from cure_plugin.vnncomp.replay import Network
from cure_plugin.vnncomp.verifiers import ARGUMENTS, VERIFIERS, Verifier


@VERIFIERS.register("sampling")
@dataclass(frozen=True)
class Sampling(Verifier):
    name: str = "sampling"
    run: tuple[str, ...] = (sys.executable, __file__, *ARGUMENTS)


def search(onnx: str, query: Query, timeout: float) -> tuple[str, np.ndarray | None]:
    network, draw = Network(onnx), np.random.default_rng(0)
    for case in query.cases():
        for point in draw.uniform(case.lower, case.upper, (1000, query.inputs)):
            if query.satisfied(point, network(point)):
                return "sat", point
    return "unknown", None


if __name__ == "__main__":
    sys.exit(run_command(search, sys.argv[1:]))
