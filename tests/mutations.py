"""Faults put into the package one at a time, each of which the fast tests must notice: ``make mutations [ONLY=words]``.

A fault is a text of one file and what stands there instead, in a copy of the checkout. It is killed where a test fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]

BOUNDS = ("acceptance", "hooks", "numbers", "soundness", "elementwise", "first_layer", "random_nets")
"""Test files that look at bounds, in the order they are tried."""


@dataclass(frozen=True)
class Mutation:
    """``old``, which stands once in ``path``, becomes ``new``; ``tests``: the files that are to notice."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...] = BOUNDS

    def apply(self, root: Path) -> None:
        file = root / "cure_plugin" / self.path
        text = file.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.path}")
        file.write_text(text.replace(self.old, self.new))


def _row(name: str, old: str, new: str) -> Mutation:
    return Mutation(name, "bounds/operators.py", old, new)


def _branching(name: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(name, f"relaxation/{file}.py", old, new, ("branch_and_bound",))


def _corners(name: str, old: str, new: str) -> Mutation:
    return Mutation(name, "relaxation/corners.py", old, new, ("corners", "branch_and_bound"))


def _checking(name: str, old: str, new: str) -> Mutation:
    return Mutation(name, "proofs/checker.py", old, new, ("proofs",))


MUTATIONS = (
    _row("oblong maps in patches mode", "return same and square and node.groups == 1", "return node.groups == 1"),
    _row("views between layers in patches mode", '"view between layers", MATRIX', '"view between layers", PATCHES'),
    _row(
        "transposed convolutions in patches mode",
        'ConvTranspose2d",\n        MATRIX',
        'ConvTranspose2d",\n        PATCHES',
    ),
    _row("poolings in patches mode", '"AvgPool", MATRIX', '"AvgPool", PATCHES'),
    _row("an index that moves", 'depends on the input", REFUSED', 'depends on the input", MATRIX'),
    _row("quotients by roots", 'by a root",\n        REFUSED', 'by a root",\n        MATRIX'),
    Mutation("no self-check", "bounds/module.py", "if self_check else", "if False else"),
    Mutation("a blind self-check", "bounds/self_check.py", "if bool((outside > allowed).any())", "if False"),
    Mutation("no own linear nodes", "bounds/module.py", "        mend_linear_nodes(bounded)\n", ""),
    Mutation("no own max pools", "bounds/module.py", "        mend_max_pools(bounded)\n", ""),
    Mutation("no own S shapes", "bounds/module.py", "        mend_s_shaped(bounded)\n", ""),
    Mutation(
        "bfloat16 as float32",
        "bounds/module.py",
        "LOW_PRECISION = (torch.float16, torch.bfloat16)",
        "LOW_PRECISION: tuple[torch.dtype, ...] = ()",
    ),
    Mutation(
        "a margin of 1e-5 in every precision",
        "certification/bounder.py",
        "needed = required_margins(self.bounded, piece.x, piece.y, piece.perturbation, found.boxes).cpu()",
        "needed = torch.full_like(found.lower, 1e-5)",
    ),
    Mutation(
        "no exact first layer",
        "bounds/hooks.py",
        '    (BoundedModule, "IBP_general", with_exact_first_layer),\n',
        "",
        ("hooks", "first_layer"),
    ),
    Mutation(
        "no coupling",
        "bounds/hooks.py",
        '    (BoundRelu, "bound_backward", with_coupling),\n',
        "",
        ("hooks", "coupled"),
    ),
    Mutation("padding not read", "__init__.py", '    import_module("cure_plugin.bounds.pad").install()\n', ""),
    Mutation(
        "radii passed through windows",
        "bounds/rounding.py",
        "if parts[1].shape[:2].numel() == rows.numel() and _is_diagonal(rows):",
        "if True:",
    ),
    Mutation(
        "nets that read values",
        "bounds/module.py",
        "    check_reads_no_values(model, example)\n",
        "",
        ("data_dependent",),
    ),
    Mutation(
        "graphs not compared",
        "bounds/faithful.py",
        "if not apart <= _SAME * (1 + largest):",
        "if False:",
        ("data_dependent",),
    ),
    _branching(
        "a radius too small",
        "recheck",
        "multiplier / 2 * layer.radius**2, size",
        "multiplier / 2 * (0.9 * layer.radius) ** 2, size",
    ),
    _branching("a box too narrow", "recheck", "rest * upper).clamp(max=0)", "rest * upper * 0.9).clamp(max=0)"),
    _branching("a parabola too steep", "recheck", "-g * inactive + m / 2 *", "-g * inactive + m *"),
    _branching("a bias forgotten", "recheck", "value += h + passed @ layer.bias", "value += h"),
    _branching(
        "the split side swapped",
        "dual",
        "layer.lower * (1 - signs.clamp(min=0))",
        "layer.lower * (1 + signs.clamp(max=0))",
    ),
    _branching("one child only", "search", "-torch.ones(len(classes))])\n", "torch.ones(len(classes))])\n"),
    _branching(
        "boxes too narrow",
        "root",
        "return torch.minimum(lower, clean), torch.maximum(upper, clean)",
        "return torch.minimum(lower + 0.02, clean), torch.maximum(upper - 0.02, clean)",
    ),
    _branching("active neurons dropped", "reduced", "kept = torch.cat([unstable, active])", "kept = unstable"),
    _branching(
        "a budget too small",
        "inputs",
        "(point.square().sum(1) - self.eps**2)",
        "(point.square().sum(1) - 0.9 * self.eps**2)",
    ),
    _branching("a price for nothing", "inputs", "- price.squeeze(1) * self.eps", "+ price.squeeze(1) * self.eps"),
    _branching("working precision as proof", "search", "proved = bound > 0", "proved = value[done] > -1"),
    _branching(
        "a tighter box than was shown",
        "tighten",
        "layer.lower, bounds[:unstable])",
        "layer.lower, bounds[:unstable] + 0.05)",
    ),
    _corners(
        "corners too near", "gains = layer.corners.down(concave) +", "gains = 0.5 * layer.corners.down(concave) +"
    ),
    _corners("a budget for a few corners alone", "if not bool(((caps[order]", "if False and bool(((caps[order]"),
    _corners("shares too small", "/ layer.jump).clamp(max=1)", "/ layer.jump).clamp(max=0.5)"),
    _corners(
        "a corner's price for nothing",
        "return (terms.sum(1) - price.squeeze(1)), shares",
        "return terms.sum(1), shares",
    ),
    _corners("split neurons at corners", "else concave * (1 - signs.abs())", "else concave"),
    Mutation(
        "constants in the net's precision",
        "certification/bounder.py",
        "wide = here if like(here.net).dtype == torch.float64 else here._in_float64()",
        "wide = here",
        ("branch_and_bound",),
    ),
    Mutation(
        "branch and bound on the net's device",
        "certification/branch_and_bound.py",
        "one = one.on_cpu()",
        "pass",
        ("devices",),
    ),
    Mutation(
        "norms of scales on the CPU",
        "bounds/radii.py",
        "if scale is not None:\n            weight = weight * scale.view(-1, 1, 1, 1)",
        "weight = weight * (torch.ones(1) if scale is None else scale.cpu()).view(-1, 1, 1, 1)",
        ("devices",),
    ),
    Mutation(
        "gradients of grey images without the stride",
        "folding.py",
        '"stride": layer.stride',
        '"stride": 1',
        ("attacking_together",),
    ),
    Mutation(
        "parts put in the wrong places",
        "bounds/parts.py",
        "low = torch.where(asked, torch.fmax(low, node.lower), low)",
        "low = torch.fmax(low, node.lower)",
        ("parts",),
    ),
    Mutation(
        "a counterexample of the box alone",
        "certification/splitting.py",
        "point = point[0] if _margins(work, point, y) <= 0 else None",
        "point = point[0]",
        ("splitting",),
    ),
    Mutation(
        "open neurons taken for proved",
        "certification/splitting.py",
        "if not last.proved:",
        "if last.counterexample is not None:",
        ("splitting",),
    ),
    _branching("subdomains forgotten", "tighten", "while len(pool):", "while False:"),
    _checking("leaves that cover nothing", "if not covers(signs[chosen]):", "if False:"),
    _checking("boxes believed", "& (lower <= clean) & (upper >= clean)).all():", "| True).all():"),
    _checking("bounds of leaves believed", "if not least > 0:", "if False:"),
    _checking("splits of all neurons", "layer.ends[1] * (sign != -1)", "layer.ends[1] * (sign == 1)"),
)


def killed_by(mutation: Mutation | None, tests: tuple[str, ...]) -> str:
    """The first of the ``tests`` that fails with the fault, or without any; empty where none does."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("cure_plugin", "tests", "docs", "benchmarks"):
            shutil.copytree(HERE / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "pyproject.toml", root)
        if mutation is not None:
            mutation.apply(root)
        for name in tests:
            command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", f"tests/test_{name}.py"]
            ran = subprocess.run(command, cwd=root, env=_environment(root), capture_output=True, text=True)
            if ran.returncode == 1:
                failed = [line for line in ran.stdout.splitlines() if line.startswith("FAILED")]
                return failed[0].split()[1] if failed else name
            if ran.returncode != 0:  # pytest itself fails, as where an import does
                return f"{name} (pytest's exit code {ran.returncode})"
    return ""


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}


def main(words: list[str], say: Callable[[str], object] = print) -> int:
    """Try the mutations whose names have one of the ``words`` (none: all); how many live."""
    chosen = [one for one in MUTATIONS if not words or any(word in one.name for word in words)]
    broken = killed_by(None, tuple(dict.fromkeys(name for one in chosen for name in one.tests)))
    if broken:
        raise SystemExit(f"{broken} fails without a fault")
    alive = 0
    for mutation in chosen:
        started = time.monotonic()
        test = killed_by(mutation, mutation.tests)
        alive += not test
        say(f"{mutation.name}: {'killed by ' + test if test else 'ALIVE'} ({time.monotonic() - started:.0f} s)")
    return alive


if __name__ == "__main__":
    raise SystemExit(min(main(sys.argv[1:]), 1))
