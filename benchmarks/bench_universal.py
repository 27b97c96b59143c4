"""Does training for linf, l2, rotations and small patches carry over to unseen sets? On the shipped slice.

python benchmarks/bench_universal.py [--images 200] [--record]

Both nets (recipes slice/linf and slice/universal: same net, data and epochs) are certified for the sets that the second
one trains for and for unseen ones: larger rotations, compositions with shearing, larger patches.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from ledger import record

from cure_plugin.certification import Certifier, certify_dataset, summarize
from cure_plugin.datasets import load_data
from cure_plugin.sets import set_spec
from cure_plugin.training import Trainer, load_recipe

SEEN = ("linf=0.1", "l2=0.5", "R(10)", "patch=2x2")
UNSEEN = ("R(30)", "Sh(2) R(2) Sc(2) C(2) B(0.001)", "Sh(10)", "patch=5x5", "l1=1.0")


def main() -> None:
    parser = argparse.ArgumentParser(description="Certified shares, linf-only against universal training.")
    parser.add_argument("--images", type=int, default=200, help="test images of the slice")
    parser.add_argument("--methods", nargs="+", default=["linf", "universal"])
    parser.add_argument("--out", type=Path, default=Path("out/universal"), help="nets and verdicts")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/universal.json")
    options = parser.parse_args()
    test = load_data("mnist-slice", False)
    methods = {}
    for method in options.methods:
        recipe = load_recipe(f"slice/{method}")
        folder = options.out / method
        trainer = Trainer(recipe, load_data(recipe.data, True), folder, test=test.first(200))
        net = trainer.run(progress=True)
        started = time.perf_counter()
        specs = [set_spec(text) for text in (*SEEN, *UNSEEN)]
        certifier = Certifier(net, test.shape)
        records = certify_dataset(certifier, test.first(options.images), specs, folder / "results.jsonl", progress=True)
        summary = asdict(summarize(records))
        methods[method] = {
            "train_seconds": round(sum(entry["seconds"] for entry in trainer.history), 1),
            "certify_seconds": round(time.perf_counter() - started, 1),
            "epochs": recipe.epochs,
            **{key: summary[key] for key in ("clean", "certified", "pgd", "intervals", "groups")},
        }
        shares = ", ".join(f"{name} {share:.3f}" for name, share in summary["certified"].items())
        print(f"{method}: clean {summary['clean']:.3f}, certified {shares}", flush=True)
    if options.record:
        figures = {
            "images": options.images,
            "threads": torch.get_num_threads(),
            "seen": SEEN,
            "unseen": UNSEEN,
            "methods": methods,
        }
        record("universal", f"python benchmarks/bench_universal.py --images {options.images}", 0, figures)


if __name__ == "__main__":
    sys.exit(main())
