"""What training for some sets carries over to others: certified shares of seen and unseen sets, a row per net.

python benchmarks/bench_generalization.py mnist cure=out/run/checkpoint.pt --data FOLDER [--record]
python benchmarks/bench_generalization.py slice linf=slice/linf universal=slice/universal --record   # trained first

The sets are in ``benchmarks/generalization/SPEC.yaml``. A net is a checkpoint, or a recipe that is trained before (it
resumes). ``python benchmarks/ledger.py render`` makes the tables.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from ledger import record_rows
from runs import test_split, trained
from torch import nn

from cure_plugin.certification import Certifier, certify_dataset, summarize
from cure_plugin.checkpoint import load_net
from cure_plugin.datasets import load_data
from cure_plugin.nets import NetSpec
from cure_plugin.sets import set_spec

SPECS = Path(__file__).parent / "generalization"


def certify(
    name: str, net: nn.Sequential, net_spec: NetSpec, folder: Path, images: int | None, data: Path | None
) -> dict[str, Any]:
    """One net's row for the spec ``name``."""
    spec = yaml.safe_load((SPECS / f"{name}.yaml").read_text())
    test = load_data(spec["data"], False, data).first(images or spec["images"])
    test = test.centre_crop(*net_spec.input_shape[1:])
    sets = [set_spec(text) for text in (*spec["seen"], *spec["unseen"])]
    certifier = Certifier(net, test.shape)
    summary = asdict(summarize(certify_dataset(certifier, test, sets, folder / f"{name}.jsonl", progress=True)))
    return {
        "spec": name,
        "images": len(test),
        "seen": spec["seen"],
        "unseen": spec["unseen"],
        "threads": torch.get_num_threads(),
        "certify_seconds": round(sum(summary["seconds"].values()), 1),
        **{key: summary[key] for key in ("clean", "certified", "pgd", "intervals", "groups")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Certified shares of seen and unseen sets.")
    parser.add_argument("spec", choices=sorted(path.stem for path in SPECS.glob("*.yaml")))
    parser.add_argument("nets", nargs="+", metavar="name=NET", help="a checkpoint or a recipe")
    parser.add_argument("--images", type=int, help="test images; default: the spec's")
    parser.add_argument("--out", type=Path, default=Path("out/generalization"), help="nets and verdicts")
    parser.add_argument("--data", type=Path, help="data root in torchvision's layout (default: $CURE_DATA)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/generalization.json")
    options = parser.parse_args()
    rows = []
    for name, _, source in (text.partition("=") for text in options.nets):
        folder = options.out / name
        about: dict[str, Any] = {}
        if source.endswith(".pt"):
            net_spec, net = load_net(Path(source))
        else:
            trainer = trained(source, {}, lambda name: options.out / "nets" / name, test_split(options.data))
            net_spec, net = trainer.spec, trainer.net
            seconds = round(sum(entry["seconds"] for entry in trainer.history), 1)
            about = {"recipe": source, "epochs": trainer.recipe.epochs, "train_seconds": seconds}
        row = {"net": name, **about, **certify(options.spec, net, net_spec, folder, options.images, options.data)}
        rows.append(row)
        shares = ", ".join(f"{key} {share:.3f}" for key, share in row["certified"].items())
        print(f"{name}: clean {row['clean']:.3f}, certified {shares}", flush=True)
        if options.record:
            command = f"python benchmarks/bench_generalization.py {options.spec} {' '.join(options.nets)}"
            command += f" --images {options.images}" if options.images else ""
            record_rows("generalization", command, {"threads": torch.get_num_threads(), "rows": [row]}, ("spec", "net"))


if __name__ == "__main__":
    sys.exit(main())
