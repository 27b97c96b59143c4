"""The examples run and do what they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_simple_verification_tightens_from_ibp_to_crown() -> None:
    bounds = load("simple_verification").main()
    widths = [float((upper - lower).mean()) for lower, upper in bounds.values()]
    assert widths[0] > widths[1] > widths[2] > 0


def test_simple_verification_differs_from_a_stock_script_in_the_perturbation_only() -> None:
    lines = (EXAMPLES / "simple_verification.py").read_text().splitlines()
    code = [line for line in lines if "cure_plugin" in line and line.strip().startswith(("from", "ptb"))]
    assert len(code) == 2


def test_own_training_loop_learns() -> None:
    losses = load("own_training_loop").main()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
