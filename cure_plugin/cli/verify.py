"""``cure verify`` and ``cure check``."""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Sequence

from cure_plugin.errors import DataError, SpecError
from cure_plugin.proofs import check_proofs
from cure_plugin.vnncomp import run
from cure_plugin.vnncomp.verifiers import find_verifier

CONTRADICTION = 3
"""Exit code where a verifier and we cannot both be right, a counterexample is none, or a benchmark is faulty."""


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def verify(options: argparse.Namespace) -> int:
    """Ask a verifier about every instance."""
    verifier = find_verifier(options.verifier)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _interrupt)  # so that no tool outlives us
    runs = run.verify(options.instances, verifier, options.out, options.jobs, progress=True)
    code = _report(runs)
    if all(one.result == "error" for one in runs):
        raise DataError(f"{verifier.name} failed on every instance; see above, then run again")
    return code


def check(options: argparse.Namespace) -> int:
    """Replay the counterexamples that a tool left, or look at proofs."""
    if options.proof:
        return _check_proofs(options)
    if options.instances is None or options.counterexamples is None:
        raise SpecError("give INSTANCES.csv with --counterexamples FOLDER, or --proof FILE")
    runs = run.check(options.instances, options.counterexamples)
    run.write_results(options.out, options.instances.resolve().parent.name, runs)
    code = _report(runs)
    broken = sum(bool(one.message) for one in runs)
    if broken and not code:
        raise DataError(f"{broken} of {len(runs)} answers cannot be read or replayed; see above")
    return code


def _report(runs: Sequence[run.Run]) -> int:
    print(run.summary_text(runs))
    return CONTRADICTION if any(one.contradicts for one in runs) else 0


def _check_proofs(options: argparse.Namespace) -> int:
    faults = 0
    for one in check_proofs(options.proof, options.onnx):
        faults += bool(one.fault)
        size = f"l{one.p:g} ball of {one.eps:.6g}" if one.p < math.inf else "box"
        told = f"no proof: {one.fault}" if one.fault else f"{one.leaves} leaves, the smallest bound {one.bound:.3g}"
        print(f"{one.name}: class {one.label} in the {size}: {told}")
    return CONTRADICTION if faults else 0
