"""How tight and how fast the sets are: python benchmarks/bench_sets.py [--data ROOT] [--record]

Three parts, each beside the way it is done elsewhere, in one run:

1. hull: width of the geometric box hull over the sampled truth, beside CGT's interval of the
   interpolation weights (re-derived here from its definition).
2. geometric: share certified for R(30) and a two-parameter set by adaptive splitting with planes and CROWN,
   beside a fixed grid of boxes with IBP (CGT's way, with our tighter hull).
3. patch: all positions of a 5 x 5 patch by splitting blocks, beside every position alone by CROWN.

Without --data (or CURE_DATA) the shipped MNIST slice is used, and the CIFAR-10 rows are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ledger import record
from torch import Tensor
from tqdm import tqdm

from cure_plugin import PerturbationGeometric, PerturbationLpBall, PerturbationPatch, PerturbationSet
from cure_plugin.attacks import find_counterexample
from cure_plugin.certification import Certifier
from cure_plugin.certification.splitting import SplitResult
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.files import write_text
from cure_plugin.sets.geometric.hull import interval_hull
from cure_plugin.sets.geometric.sources import sinusoid_range
from cure_plugin.sets.geometric.transforms import transform
from cure_plugin.training import Trainer, load_recipe

RECIPES = Path(__file__).parent / "recipes"
NETS = Path("out/bench-nets")
"""Where the trained nets are kept and found again."""

HULL_IMAGES, GEOMETRIC_IMAGES, PATCH_IMAGES = 20, 200, 100
ANGLES, WIDTHS, TRUTH_SAMPLES = (0.0, 10.0, 30.0), (0.25, 1.0), 201
GRIDS = {"R(30)": (0.25,), "Sc(5) R(5)": (0.5, 0.25)}
"""Set -> cell size of the grid of boxes, per parameter."""

BATCH = 96


# -- hull --------------------------------------------------------------------------------------


def tent_interval(x: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
    """CGT's bounds on images ``x`` >= 0 rotated by ``lower`` to ``upper`` degrees: every weight its own interval.

    An output pixel is the sum over input pixels of tent(dx) tent(dy) times the pixel, where tent(t) =
    max(0, 1 - |t|) and (dx, dy) is the distance to the rotated point; each factor is bounded alone.
    """
    height, width = x.shape[2:]
    across = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2).expand(height, width).flatten()
    up = ((height - 1) / 2 - torch.arange(height, dtype=torch.float64)).unsqueeze(1).expand(height, width).flatten()
    start, stop = torch.tensor(math.radians(lower)), torch.tensor(math.radians(upper))
    sources = sinusoid_range(across, up, start, stop), sinusoid_range(up, -across, start, stop)
    least, most = [], []
    for (low, high), own in zip(sources, (across.view(height, width)[0], up.view(height, width)[:, 0]), strict=True):
        low, high = low.unsqueeze(1) - own, high.unsqueeze(1) - own
        nearest = torch.where((low <= 0) & (high >= 0), 0, torch.minimum(low.abs(), high.abs()))
        least.append((1 - torch.maximum(low.abs(), high.abs())).clamp(min=0))
        most.append((1 - nearest).clamp(min=0))
    bounds = (torch.einsum("pw,ph,bchw->bcp", *weights, x.double()) for weights in (least, most))
    low, high = (bound.view_as(x) for bound in bounds)
    return low, high


def hull_widths(x: Tensor, lower: float, upper: float) -> dict[str, float]:
    """Mean pixel width of the sampled truth, our hull and CGT's interval."""
    angles = torch.linspace(lower, upper, TRUTH_SAMPLES, dtype=torch.float64)
    images = torch.stack([transform(x.double(), ("R",), angle.expand(len(x), 1)) for angle in angles])
    truth = images.amax(0) - images.amin(0)
    low, high = PerturbationGeometric(("R",), [lower], [upper]).box(x)
    cgt_low, cgt_high = tent_interval(x, lower, upper)
    assert bool((images >= low - 1e-6).all() and (images <= high + 1e-6).all())
    assert bool((images >= cgt_low - 1e-6).all() and (images <= cgt_high + 1e-6).all())
    return {
        "truth": float(truth.mean()),
        "hull": float((high - low).mean()),
        "cgt": float((cgt_high - cgt_low).mean()),
    }


def bench_hull(data: dict[str, ImageData]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (name, images), angle, width in itertools.product(data.items(), ANGLES, WIDTHS):
        x, _ = images.batch(slice(0, HULL_IMAGES))
        rows.append({"data": name, "angle": angle, "width": width, **hull_widths(x, angle, angle + width)})
    return rows


# -- geometric and patch sets ------------------------------------------------------------------


def grid_of_boxes(perturbation: PerturbationGeometric, sizes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Parameter boxes (N, D) of ``sizes`` that cover the set."""
    ends = zip(perturbation.lower.tolist(), perturbation.upper.tolist(), sizes, strict=True)
    edges = [torch.linspace(low, high, round((high - low) / size) + 1).tolist() for low, high, size in ends]
    cells = torch.tensor(list(itertools.product(*(itertools.pairwise(axis) for axis in edges))))
    return cells[..., 0].double(), cells[..., 1].double()


def proved_by_boxes(
    certifier: Certifier, x: Tensor, y: Tensor, names: Sequence[str], cells: tuple[Tensor, ...]
) -> bool:
    """Whether IBP on the one-piece hull of every cell proves the image; stops at the first batch that fails."""
    for lower, upper in zip(*(end.split(BATCH) for end in cells), strict=True):
        low, high = interval_hull(x.expand(len(lower), *x.shape[1:]), names, lower, upper, 1)
        box = PerturbationLpBall(math.inf, 1.0, (low, high))
        if not bool(certifier.proves((low + high) / 2, y.expand(len(lower)), box, "IBP").all()):
            return False
    return True


def proved_alone(certifier: Certifier, x: Tensor, y: Tensor, perturbation: PerturbationPatch) -> bool:
    """Whether every position alone is proved, by CROWN or else IBP; stops at the first batch that fails."""
    r0, r1, c0, c1 = perturbation.positions(x)[0].tolist()
    blocks = torch.tensor([[r, r, c, c] for r in range(r0, r1 + 1) for c in range(c0, c1 + 1)])
    for block in blocks.split(BATCH):
        one = PerturbationPatch(perturbation.height, perturbation.width, block)
        repeated, labels = x.expand(len(block), *x.shape[1:]), y.expand(len(block))
        proved = certifier.proves(repeated, labels, one, "CROWN")
        if not bool(proved.all()):
            proved = proved | certifier.proves(repeated, labels, one, "IBP")
        if not bool(proved.all()):
            return False
    return True


def compare(
    certifier: Certifier,
    data: ImageData,
    text: str,
    make: Callable[[], PerturbationSet],
    other: Callable[[Tensor, Tensor], bool],
) -> dict[str, Any]:
    """Splitting against another way, on the images that the attack does not break."""
    x, y = data.batch(slice(0, len(data)))
    torch.manual_seed(0)
    found, _ = find_counterexample(certifier.net, x, y, make(), 40, 5)
    left = (~found).nonzero().flatten().tolist()
    results: list[SplitResult] = []
    others: list[bool] = []
    seconds = [0.0, 0.0]
    for i in tqdm(left, desc=text):
        image, label = x[i : i + 1], y[i : i + 1]
        started = time.perf_counter()
        results.append(certifier.split(image, label, make()))
        middle = time.perf_counter()
        others.append(other(image, label))
        seconds[0] += middle - started
        seconds[1] += time.perf_counter() - middle
    proved = [result.proved for result in results]
    return {
        "set": text,
        "images": len(data),
        "attacked": len(data) - len(left),
        "splitting": {
            "proved": sum(proved),
            "pieces_per_image": sum(result.pieces for result in results) / len(data),
            "seconds": seconds[0],
        },
        "other": {"proved": sum(others), "seconds": seconds[1]},
        "same_verdicts": proved == others,
        "only_other": [i for i, ours, theirs in zip(left, proved, others, strict=True) if theirs and not ours],
    }


def trained(name: str, data: str, root: Path | None) -> Certifier:
    """A certifier of the net of one of our recipes; trains it, or reuses an earlier run."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", {"data": data})
    images = load_data(data, True, root)
    return Certifier(Trainer(recipe, images, NETS / name).run(progress=True), images.shape, batch_size=BATCH)


def bench_geometric(certifier: Certifier, data: ImageData) -> list[dict[str, Any]]:
    rows = []
    for text, sizes in GRIDS.items():
        whole = PerturbationGeometric.parse(text)
        cells = grid_of_boxes(whole, sizes)
        certifier.pieces = len(cells[0])
        row = compare(
            certifier,
            data,
            text,
            lambda text=text: PerturbationGeometric.parse(text),  # type: ignore[misc]
            lambda x, y, whole=whole, cells=cells: proved_by_boxes(certifier, x, y, whole.names, cells),  # type: ignore[misc]
        )
        rows.append({**row, "boxes": len(cells[0])})
    return rows


def bench_patch(certifier: Certifier, data: ImageData) -> dict[str, Any]:
    whole = PerturbationPatch(5, 5)
    return compare(
        certifier,
        data,
        "patch=5x5",
        lambda: PerturbationPatch(5, 5),
        lambda x, y: proved_alone(certifier, x, y, whole),
    )


# -- everything --------------------------------------------------------------------------------


def shown(figures: dict[str, Any]) -> str:
    """The figures as text tables."""
    lines = ["rotation hull, mean pixel width   truth   ours (x truth)   CGT (x truth)"]
    for row in figures["hull"]:
        where = f"{row['data']} R[{row['angle']:g}, {row['angle'] + row['width']:g}]"
        ours, cgt = (f"{row[key]:.4f} ({row[key] / row['truth']:.2f})" for key in ("hull", "cgt"))
        lines.append(f"{where:<32}  {row['truth']:.4f}  {ours:>14}  {cgt:>14}")
    lines.append("")
    lines.append("set            images  attacked  splitting: proved  pieces/image  seconds   other: proved  seconds")
    for row in (*figures["geometric"], figures["patch"]):
        ours, other = row["splitting"], row["other"]
        lines.append(
            f"{row['set']:<13}  {row['images']:>6}  {row['attacked']:>8}  "
            f"{ours['proved']:>17}  {ours['pieces_per_image']:>12.1f}  {ours['seconds']:>7.1f}   "
            f"{other['proved']:>13}  {other['seconds']:>7.1f}"
        )
    same = "the same" if figures["patch"]["same_verdicts"] else "DIFFERENT"
    ratio = figures["patch"]["other"]["seconds"] / figures["patch"]["splitting"]["seconds"]
    lines.append(f"patch: {ratio:.1f} x faster than position by position, {same} verdicts")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data root in torchvision's layout (default: $CURE_DATA)")
    parser.add_argument("--out", type=Path, default=Path("out/bench-sets"), help="folder of the figures")
    parser.add_argument("--record", action="store_true", help="write the figures to the ledger")
    options = parser.parse_args(arguments)
    full = bool(options.data or os.environ.get("CURE_DATA"))
    mnist = "mnist" if full else "mnist-slice"
    test = load_data(mnist, False, options.data)
    hull_data = {mnist: test, **({"cifar10": load_data("cifar10", False, options.data)} if full else {})}
    figures = {
        "data": mnist,
        "hull": bench_hull(hull_data),
        "geometric": bench_geometric(trained("linf", mnist, options.data), test.first(GEOMETRIC_IMAGES)),
        "patch": bench_patch(trained("patch", mnist, options.data), test.first(PATCH_IMAGES)),
    }
    print(shown(figures))
    write_text(options.out / "figures.json", json.dumps(figures, indent=1) + "\n")
    if options.record:
        record("sets", "make bench-sets", 0, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
