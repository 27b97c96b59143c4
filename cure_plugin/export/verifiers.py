"""Verifiers that need no file of their own: our certifier, and maraboupy from PyPI."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from cure_plugin.vnncomp.verifiers import ARGUMENTS, VERIFIERS, Verifier


@VERIFIERS.register("cure")
@dataclass(frozen=True)
class CureVerifier(Verifier):
    """:mod:`cure_plugin.export.solve`, a process for each instance."""

    name: str = "cure"
    run: tuple[str, ...] = (sys.executable, "-m", "cure_plugin.export.solve", *ARGUMENTS)


@VERIFIERS.register("marabou")
@dataclass(frozen=True)
class MarabouVerifier(Verifier):
    """:mod:`cure_plugin.export.marabou`, a process for each instance."""

    name: str = "marabou"
    run: tuple[str, ...] = (sys.executable, "-m", "cure_plugin.export.marabou", *ARGUMENTS)
