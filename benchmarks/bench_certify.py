"""Certified counts and times beside plain auto_LiRPA loops: bench_certify.py PART [--data ROOT] [--record]

Parts:

coupled   l2 and l1 balls on two small nets: CROWN and alpha-CROWN by stock auto_LiRPA, our cascade with
          norm-coupled bounds, and the share that the attack does not break.
loop      linf, l2 and l1 on one net: our cascade against the loop that scripts run today, CROWN and then
          alpha-CROWN on what is left, one norm after the other. The loop starts with the images that our
          cascade leaves undecided, and is stopped after LOOP_LIMIT times our cascade's time: the images that
          it does not reach then are ones that we prove or that the attack breaks.

Without --data (or CURE_DATA) the shipped MNIST slice's test images are used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ledger import record_rows
from torch import Tensor, nn
from tqdm import tqdm

from cure_plugin.bounds.margins import margin_matrix
from cure_plugin.certification import Certifier
from cure_plugin.checkpoint import load_net
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.files import write_text
from cure_plugin.sets import set_spec

# isort: split
from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

LOOP_LIMIT = 4
"""Times our own seconds that the plain loop gets."""

FIXTURES = Path(__file__).parent / "fixtures"
BATCH, ALPHA_ITERATIONS = 20, 20
COUPLED_SETS, LOOP_SETS = ("l2=0.5", "l1=1"), ("linf=0.1", "l2=0.5", "l1=1")
NORMS = {"linf": math.inf, "l2": 2, "l1": 1}


def stock_margins(net: nn.Module, x: Tensor, y: Tensor, text: str, method: str) -> Tensor:
    """Smallest lower margins (B,) as a script on stock auto_LiRPA computes them."""
    name, eps = text.split("=")
    options = {"optimize_bound_args": {"iteration": ALPHA_ITERATIONS}, "sparse_features_alpha": False}
    bounded = BoundedModule(net, x[:1], bound_opts=options)
    ends = {"x_L": (x - float(eps)).clamp(min=0), "x_U": (x + float(eps)).clamp(max=1)} if name == "linf" else {}
    perturbation = PerturbationLpNorm(norm=NORMS[name], eps=float(eps), **ends)
    lower, _ = bounded.compute_bounds(
        x=(BoundedTensor(x, perturbation),), C=margin_matrix(y, 10), method=method, bound_upper=False
    )
    return lower.detach().amin(1)


def plain_loop(
    net: nn.Module, data: ImageData, text: str, order: Sequence[int], limit: float = math.inf
) -> dict[str, Any]:
    """CROWN on every image; alpha-CROWN on what it leaves of the images ``order``, for ``limit`` seconds in all."""
    started = time.perf_counter()
    crown = torch.zeros(len(data), dtype=torch.bool)
    for start in tqdm(range(0, len(data), BATCH), desc=f"plain {text}"):
        piece = slice(start, start + BATCH)
        x, y = data.batch(piece)
        with torch.no_grad():
            crown[piece] = (stock_margins(net, x, y, text, "CROWN") > 0) & (net(x).argmax(1) == y)
    crown_seconds = time.perf_counter() - started
    left = [index for index in order if not crown[index]]
    alpha, reached = [], 0
    for start in tqdm(range(0, len(left), BATCH), desc=f"plain {text}, alpha"):
        if time.perf_counter() - started > limit:
            break
        some = left[start : start + BATCH]
        x, y = data.batch(torch.tensor(some))
        proved = stock_margins(net, x, y, text, "CROWN-Optimized") > 0
        alpha += [index for index, one in zip(some, proved.tolist(), strict=True) if one]
        reached += len(some)
    return {
        "crown": int(crown.sum()),
        "crown_seconds": crown_seconds,
        "alpha": sum(bool(crown[index]) for index in order) + len(alpha),
        "alpha_images": len(order),
        "unreached": len(left) - reached,
        "proved": sorted([*crown.nonzero().flatten().tolist(), *alpha]),
        "seconds": time.perf_counter() - started,
    }


def cascade(net: nn.Module, data: ImageData, text: str, methods: Sequence[str]) -> dict[str, Any]:
    """Our certifier on every image."""
    certifier = Certifier(net, data.shape, methods, BATCH)
    started = time.perf_counter()
    verdicts = []
    for start in tqdm(range(0, len(data), BATCH), desc=f"cascade {text}"):
        x, y = data.batch(slice(start, start + BATCH))
        verdicts += certifier.decide(x, y, set_spec(text).build(), torch.Generator().manual_seed(start))[0]
    statuses = [verdict.status for verdict in verdicts]
    stages = [verdict.stage for verdict in verdicts if verdict.status == "proved"]
    return {
        "proved": [index for index, status in enumerate(statuses) if status == "proved"],
        "undecided": [index for index, status in enumerate(statuses) if status == "undecided"],
        "not_broken": len(data) - statuses.count("falsified"),
        "stages": {stage: stages.count(stage) for stage in dict.fromkeys(stages)},
        "seconds": time.perf_counter() - started,
    }


def bench_coupled(data: ImageData, alpha_images: int, only: str) -> Iterator[dict[str, Any]]:
    for name in ("paper", "ball"):
        _, net = load_net(FIXTURES / f"{name}.pt")
        for text in COUPLED_SETS:
            if only not in f"{name} {text}":
                continue
            ours = cascade(net.eval(), data, text, ("IBP", "CROWN-IBP", "CROWN", "coupled"))
            plain = plain_loop(net, data, text, range(alpha_images))
            yield {"net": name, "set": text, "images": len(data), "cascade": ours, "plain": plain}


def bench_loop(data: ImageData, only: str) -> Iterator[dict[str, Any]]:
    _, net = load_net(FIXTURES / "ball.pt")
    methods = ("IBP", "CROWN-IBP", "CROWN", "coupled", "alpha-CROWN")
    sets = [text for text in LOOP_SETS if only in f"ball {text}"]
    cascades = {text: cascade(net.eval(), data, text, methods) for text in sets}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # before the plain loop adds its own
    for text, ours in cascades.items():
        undecided = set(ours["undecided"])
        order = sorted(range(len(data)), key=lambda index: index not in undecided)
        plain = plain_loop(net, data, text, order, LOOP_LIMIT * ours["seconds"])
        yield {
            "net": "ball",
            "set": text,
            "images": len(data),
            "cascade": ours,
            "plain": plain,
            "peak_gigabytes": peak,
        }


def shown(row: dict[str, Any]) -> str:
    """One row as text."""
    ours, plain = row["cascade"], row["plain"]
    unreached = f", stopped with {plain['unreached']} images to go" if plain["unreached"] else ""
    return (
        f"{row['net']} {row['set']}: of {row['images']} images the attack leaves {ours['not_broken']}; "
        f"cascade proves {len(ours['proved'])} ({ours['stages']}) in {ours['seconds']:.0f} s; "
        f"plain CROWN {plain['crown']} in {plain['crown_seconds']:.0f} s, "
        f"then alpha-CROWN {plain['alpha']} of {plain['alpha_images']} in {plain['seconds']:.0f} s in all{unreached}; "
        f"only plain: {len(set(plain['proved']) - set(ours['proved']))}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("coupled", "loop"))
    parser.add_argument("--data", type=Path, help="data root in torchvision's layout (default: $CURE_DATA)")
    parser.add_argument("--images", type=int, help="default: 200 for coupled, 1000 for loop")
    parser.add_argument("--alpha-images", type=int, default=40, help="images that alpha-CROWN gets in part coupled")
    parser.add_argument("--only", default="", help="nets and sets that hold this text, e.g. linf, 'paper l1'")
    parser.add_argument("--out", type=Path, default=Path("out/bench-certify"), help="folder of the figures")
    parser.add_argument("--record", action="store_true", help="write the figures to the ledger")
    options = parser.parse_args(arguments)
    name = "mnist" if options.data or os.environ.get("CURE_DATA") else "mnist-slice"
    count = options.images or (200 if options.part == "coupled" else 1000)
    data = load_data(name, False, options.data).first(count)
    figures: dict[str, Any] = {"data": name, "threads": torch.get_num_threads(), "rows": []}
    coupled = options.part == "coupled"
    rows = bench_coupled(data, options.alpha_images, options.only) if coupled else bench_loop(data, options.only)
    for row in rows:
        figures["rows"].append(row)
        print(shown(row), flush=True)
        write_text(options.out / f"{options.part}.json", json.dumps(figures, indent=1) + "\n")
    if options.record:
        record_rows(
            f"certify-{options.part}", f"python benchmarks/bench_certify.py {options.part}", figures, ("net", "set")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
