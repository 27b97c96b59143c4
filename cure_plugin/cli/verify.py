"""``cure verify`` and ``cure check``."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence

from cure_plugin.errors import DataError
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
    """Replay the counterexamples that a tool left."""
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
