"""Sets that need splitting, image by image: bench_splitting.py [--data ROOT] [--only WORD] [--record]

Geometric sets as DeepG and CGT state them, and patches at every position, on small nets trained for something
else (linf, 5 x 5 patches). Results of an interrupted run are kept in --out and not computed again.

Without --data (or CURE_DATA) the shipped MNIST slice is used, and the CIFAR-10 sets are left out.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_sets import trained
from ledger import record_rows

from cure_plugin.certification import certify_dataset, summarize
from cure_plugin.certification.cascade import read_methods
from cure_plugin.datasets import load_data
from cure_plugin.sets import set_spec

IMAGES = 100
METHODS = ("IBP", "CROWN-IBP", "CROWN", "splitting")


class Case(NamedTuple):
    """One row: the net's recipe, its data, the set, and how many parameter boxes CGT needs for it (None: not known)."""

    recipe: str
    data: str
    text: str
    cgt_splits: int | None = None


CASES = (
    Case("linf", "mnist", "R(30)", 240),
    Case("linf", "mnist", "T(2,2)"),
    Case("linf", "mnist", "Sc(5) R(5) C(5) B(0.01)"),
    Case("linf", "mnist", "Sh(2) R(2) Sc(2) C(2) B(0.001)"),
    Case("cifar_linf", "cifar10", "R(10)", 100_000),
    Case("cifar_linf", "cifar10", "R(2) Sh(2)", 64_000),
    Case("cifar_linf", "cifar10", "Sc(1) R(1) C(1) B(0.001)", 640_000),
    Case("patch", "mnist", "patch=2x2"),
    Case("patch", "mnist", "patch=5x5"),
    Case("cifar_patch", "cifar10", "patch=2x2"),
    Case("cifar_patch", "cifar10", "patch=5x5"),
)


def measure(case: Case, data_name: str, root: Path | None, out: Path) -> dict[str, Any]:
    """Shares and splits over the first images of the test set."""
    certifier = trained(case.recipe, data_name, root)
    certifier.methods = read_methods(METHODS)
    data = load_data(data_name, False, root).first(IMAGES)
    spec = set_spec(case.text)
    name = "".join(character if character.isalnum() else "_" for character in f"{case.recipe} {case.text}")
    records = certify_dataset(certifier, data, [spec], out / f"{name}.jsonl", progress=True, label=case.text)
    summary = summarize(records)
    verdicts = [next(iter(entry.sets.values())) for entry in records]
    worked = [verdict.pieces for verdict in verdicts if verdict.pieces]
    return {
        **case._asdict(),
        "images": len(data),
        "clean": summary.clean,
        "certified": next(iter(summary.certified.values())),
        "pgd": next(iter(summary.pgd.values())),
        "split_images": len(worked),
        "pieces": sum(worked),
        "most_pieces": max(worked, default=0),
        "seconds": sum(verdict.seconds for verdict in verdicts),
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def shown(row: dict[str, Any]) -> str:
    """One row as text."""
    cgt = f", CGT {row['cgt_splits']} each" if row["cgt_splits"] else ""
    return (
        f"{row['data']} {row['text']}: clean {row['clean']:.2f}, certified {row['certified']:.2f}, "
        f"attack leaves {row['pgd']:.2f}; "
        f"{row['split_images']} images split into {row['pieces']} pieces (at most {row['most_pieces']}{cgt}), "
        f"{row['seconds']:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data root in torchvision's layout (default: $CURE_DATA)")
    parser.add_argument("--only", default="", help="sets and data that hold this text, e.g. cifar10, patch")
    parser.add_argument("--out", type=Path, default=Path("out/bench-certify"), help="folder of the results")
    parser.add_argument("--record", action="store_true", help="write the figures to the ledger")
    options = parser.parse_args(arguments)
    full = bool(options.data or os.environ.get("CURE_DATA"))
    rows = []
    for case in CASES:
        data = case.data if full else f"{case.data}-slice"
        if options.only not in f"{case.data} {case.text}" or data == "cifar10-slice":
            continue
        rows.append(measure(case, data, options.data, options.out))
        print(shown(rows[-1]), flush=True)
    if options.record:
        figures = {"threads": torch.get_num_threads(), "rows": rows}
        record_rows("certify-splitting", "python benchmarks/bench_splitting.py", figures, ("data", "text"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
