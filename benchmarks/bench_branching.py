"""What branch and bound closes of what the other bounds leave open: bench_branching.py [--data ROOT] [--record]

l1 balls around MNIST test images on the two committed nets, at radii that leave a good part of them open. First the
cascade without branch and bound, then the default one on the images that the first leaves open.

Without --data (or CURE_DATA) the shipped MNIST slice's test images are used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_certify import FIXTURES, cascade
from ledger import record_rows

from cure_plugin.certification.cascade import CASCADE
from cure_plugin.checkpoint import load_net
from cure_plugin.datasets import ImageData, load_data

ROWS = (("ball", "l1=1.75"), ("paper", "l1=1"))
WITHOUT = ("IBP", "CROWN-IBP", "CROWN", "coupled", "alpha-CROWN")


def measure(name: str, text: str, data: ImageData) -> dict[str, Any]:
    """One row; seconds an image, of those that get there."""
    net = load_net(FIXTURES / f"{name}.pt")[1].eval()
    before = cascade(net, data, text, WITHOUT)
    index = torch.tensor(before["undecided"], dtype=torch.long)
    left = replace(data, images=data.images[index], labels=data.labels[index])
    after = cascade(net, left, text, [method.name for method in CASCADE])
    return {
        "net": name,
        "set": text,
        "images": len(data),
        "proved_before": len(before["proved"]),
        "open_before": len(index),
        "proved": len(before["proved"]) + len(after["proved"]),
        "open": len(after["undecided"]),
        "seconds_before": round(before["seconds"] / len(data), 2),
        "seconds": round(after["seconds"] / max(1, len(index)), 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data root in torchvision's layout (default: $CURE_DATA)")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--only", default="", help="nets and sets that hold this text")
    parser.add_argument("--record", action="store_true", help="write the figures to the ledger")
    options = parser.parse_args(arguments)
    name = "mnist" if options.data or os.environ.get("CURE_DATA") else "mnist-slice"
    data = load_data(name, False, options.data).first(options.images)
    rows = []
    for net, text in ROWS:
        if options.only in f"{net} {text}":
            rows.append(measure(net, text, data))
            print(json.dumps(rows[-1]), flush=True)
    if options.record:
        figures = {"data": name, "threads": torch.get_num_threads(), "rows": rows}
        record_rows("branching", "python benchmarks/bench_branching.py", figures, ("net", "set"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
