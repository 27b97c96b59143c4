"""Make the benchmark roots cure_multinorm, cure_geometric and cure_patch: nets, candidates, certificates, witnesses.

python benchmarks/build_roots.py cure_multinorm --nets cure=out/reproduce/small_mnist_small/scratch-0 linf=... --data D
python benchmarks/build_roots.py cure_geometric --nets cure=out/bench-nets/geometric-universal linf=...
python benchmarks/build_roots.py cure_patch --nets patch=out/bench-nets/patch linf=...

A net's folder holds ``checkpoint.pt``; for cure_multinorm also ``results.jsonl`` of MNIST's first test images, as
``benchmarks/reproduce.py`` leaves it. Every other verdict is made here, by our certifier on the files themselves.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from cure_plugin.attacks import find_counterexample
from cure_plugin.certification.dataset import fingerprint
from cure_plugin.certification.record import read_origin, read_results
from cure_plugin.checkpoint import load_net
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.errors import DataError
from cure_plugin.export import encode, onnx_model
from cure_plugin.export.encodings import planes_with_slack
from cure_plugin.export.solve import solve
from cure_plugin.sets import PerturbationGeometric, PerturbationSet, set_spec
from cure_plugin.vnncomp.fixed_point import float32_above, float32_below
from cure_plugin.vnncomp.generate import STRATA, Root, generate, question
from cure_plugin.vnncomp.graphs import write_model
from cure_plugin.vnncomp.query import Query
from cure_plugin.vnncomp.replay import Network
from cure_plugin.vnncomp.root import write_root
from cure_plugin.vnncomp.vnnlib import vnnlib_text

PER_GROUP = 20
"""Candidates of a net, a set and a stratum, at most."""

TIMEOUT = 300

COUNTS = {
    "cure_multinorm": (15, 15, 15, 15),
    "cure_geometric": (18, 18, 8, 16),
    "cure_patch": (16, 8, 16, 20),  # tighter bounds prove few patches that IBP does not
}
"""Instances of each stratum, by benchmark."""

GEOMETRIC = (
    ("R(5)", "boxes"),
    ("R(15)", "boxes"),
    ("Sc(10)", "boxes"),
    ("R(3)", "planes"),
    ("Sh(2) R(2) Sc(2) C(2) B(0.001)", "planes"),
    ("C(30) B(0.1)", "parameters"),
    ("C(80) B(0.5)", "parameters"),
)
"""Sets of cure_geometric, and what each is encoded as."""

PATCHES = ((2, 4, "patch"), (4, 4, "patch"), (5, 2, "patch"), (7, 1, "contents"))
"""Of cure_patch: side, positions per side of a block of positions, kind of encoding."""


class Builder:
    """A root as it grows: candidates are tried, decided and kept while their group has room."""

    def __init__(self, name: str, nets: dict[str, nn.Sequential], data: ImageData, strata: dict[str, int]) -> None:
        models = {f"{net}.onnx": onnx_model(one, data.shape) for net, one in nets.items()}
        spec: dict[str, Any] = {"name": name, "timeout": TIMEOUT, "strata": strata, "nets": list(models), "sets": []}
        self.data, self.nets = data, nets
        self.root = Root(spec, [], {}, models)
        self._positions: dict[int, int] = {}
        self._groups: Counter[tuple[str, str, str]] = Counter()
        self._scratch = tempfile.TemporaryDirectory()

    def candidate(self, net: str, index: int, text: str, encoding: dict[str, Any]) -> dict[str, Any]:
        """One that is not decided yet."""
        if index not in self._positions:
            self._positions[index] = len(self._positions)
            self.root.arrays["images"] = np.stack([self.data.images[i].numpy() for i in self._positions])
        safe = "".join(c if c.isalnum() or c == "." else "-" for c in text).strip("-")
        label = int(self.data.labels[index])
        return {
            "id": f"{net}_{safe}_{encoding['kind']}_{index}",
            "net": f"{net}.onnx",
            "image": index,
            "at": self._positions[index],
            "label": label,
            "set": text,
            "encoding": encoding,
        }

    def decide(self, candidate: dict[str, Any]) -> None:
        """Certify the file itself, and keep it."""
        asked = question(self.root, candidate, "1.0")
        path = Path(self._scratch.name) / "asked.onnx"
        write_model(asked.model, path)
        decision = solve(path, Query(vnnlib_text(asked.wanted)))
        self.keep(candidate, decision.verdict, decision.stage, decision.margin, decision.counterexample)

    def keep(
        self,
        candidate: dict[str, Any],
        verdict: str,
        stage: str,
        margin: float | None,
        witness: np.ndarray | None,
    ) -> None:
        """Take a decided candidate in, unless its group is full or its witness does not replay."""
        stratum = _stratum(verdict, stage)
        group = (candidate["net"], candidate["set"], stratum)
        if self._groups[group] >= PER_GROUP:
            return
        if witness is not None:
            asked = question(self.root, candidate, "1.0")
            path = Path(self._scratch.name) / "asked.onnx"
            write_model(asked.model, path)
            witness = witness.astype(np.float32).astype(np.float64)
            if not Query(vnnlib_text(asked.wanted)).satisfied(witness, Network(path)(witness)):
                return
            self.root.arrays[f"witness {candidate['id']}"] = witness.astype(np.float32)
        self._groups[group] += 1
        if candidate["set"] not in self.root.spec["sets"]:
            self.root.spec["sets"].append(candidate["set"])
        self.root.candidates.append(
            {**candidate, "stratum": stratum, "verdict": verdict, "stage": stage, "margin": margin}
        )

    def full(self, net: str, text: str) -> bool:
        """Whether every stratum of a net and set has all the candidates it may have."""
        return all(self._groups[f"{net}.onnx", text, stratum] >= PER_GROUP for stratum in STRATA)


def _stratum(verdict: str, stage: str) -> str:
    """Robust by IBP, robust by a tighter bound, undecided, or violated."""
    if verdict == "robust":
        return "trivial" if stage == "IBP" else "medium"
    return "violated" if verdict == "violated" else "hard"


def multinorm(builder: Builder, runs: dict[str, Path]) -> None:
    """linf, l2 and l1 balls; verdicts of the runs, counterexamples looked for again."""
    for net, folder in runs.items():
        records, origin = read_results(folder / "results.jsonl"), read_origin(folder / "results.jsonl")
        if origin is None or origin.net != fingerprint(builder.nets[net]):
            raise DataError(f"{folder}: results.jsonl is of another net than checkpoint.pt; certify again")
        for spec in (set_spec(_text(one)) for one in origin.sets):
            for record in tqdm(records, desc=f"{net} {spec}"):
                verdict = record.sets[spec.name]
                margin = verdict.margin if math.isfinite(verdict.margin) else None
                if record.prediction != record.label or verdict.stage.startswith("by "):
                    continue
                eps = float(spec.build().eps)
                kind = {"kind": "linf", "eps": eps}
                if spec.name != "linf":
                    kind = {"kind": "ball", "norm": spec.name, "eps": eps}
                if builder.full(net, str(spec)):
                    break
                candidate = builder.candidate(net, record.index, str(spec), kind)
                if verdict.status == "proved":
                    builder.keep(candidate, "robust", verdict.stage, margin, None)
                elif verdict.status == "undecided":
                    builder.keep(candidate, "unknown", verdict.stage, margin, None)
                else:
                    found = _attacked(builder, net, record.index, spec.build())
                    if found is not None:
                        builder.keep(candidate, "violated", "pgd", found[0], found[1])


def _text(specification: str) -> str:
    """``linf=0.1`` out of the repr of a spec that a run's settings hold."""
    fields = dict(part.split("=", 1) for part in specification[specification.index("(") + 1 : -1].split(", ")[:2])
    return "=".join(fields[key].strip("'") for key in ("norm", "eps"))


def _attacked(builder: Builder, net: str, index: int, own: PerturbationSet) -> tuple[float, np.ndarray] | None:
    """(margin, input of the 1.0 encoding) of a counterexample, where the attack finds one again."""
    x, y = builder.data.batch(slice(index, index + 1))
    generator = torch.Generator().manual_seed(index)
    found, points = find_counterexample(builder.nets[net], x, y, own, restarts=10, generator=generator)
    if not bool(found):
        return None
    points = x + (1 - 1e-5) * (points - x)  # inside whatever float32 makes of the ball
    with torch.no_grad():
        logits = builder.nets[net](points)[0]
    margin = float(logits[y[0]] - logits[torch.arange(len(logits)) != y[0]].max())
    encoding = encode(builder.root.nets[f"{net}.onnx"], x[0], int(y[0]), own)
    return margin, encoding.to_input(points)


def geometric(builder: Builder, images: int) -> None:
    """Rotations, translations, scalings, shears, contrast and brightness; verdicts on the files themselves."""
    for net, text, kind, index in _correct(builder, images, [(text, kind) for text, kind in GEOMETRIC]):
        own = set_spec(text).build()
        assert isinstance(own, PerturbationGeometric)
        x = builder.data.batch(slice(index, index + 1))[0]
        encoding: dict[str, Any] = {"kind": kind}
        if kind == "parameters":
            encoding |= {"names": list(own.parameters), "lower": own.lower.tolist(), "upper": own.upper.tolist()}
        candidate = builder.candidate(net, index, text, encoding)
        if kind == "boxes":
            hulls = [cell.box(x.double()) for cell in own.partition(x)]
            builder.root.arrays[f"boxes {candidate['id']}"] = np.stack(
                [_outward(low.flatten().numpy(), high.flatten().numpy()) for low, high in hulls]
            )
        if kind == "planes":
            slope, (low, high) = planes_with_slack(x, own)
            builder.root.arrays[f"slope {candidate['id']}"] = slope
            builder.root.arrays[f"box {candidate['id']}"] = _outward(low, high)
        builder.decide(candidate)


def patch(builder: Builder, images: int) -> None:
    """Patches at one position or at any of a block, drawn at random for each image."""
    kinds = [(f"patch={side}x{side} at {count * count}", (side, count, kind)) for side, count, kind in PATCHES]
    for net, text, (side, count, kind), index in _correct(builder, images, kinds):
        generator = np.random.default_rng([index, side, count])
        _, height, width = builder.data.shape
        top, left = (int(generator.integers(4, size - side - count - 3)) for size in (height, width))
        encoding: dict[str, Any] = {"kind": kind, "sides": [side, side]}
        if kind == "contents":
            encoding["corner"] = [top, left]
        else:
            encoding["block"] = [top, top + count - 1, left, left + count - 1]
        builder.decide(builder.candidate(net, index, text, encoding))


def _correct(builder: Builder, images: int, kinds: list[tuple[str, Any]]) -> Iterator[tuple[str, str, Any, int]]:
    """(net, text, kind, image) of all that the nets classify correctly, sets whose groups are full left out."""
    x, y = builder.data.batch(slice(0, images))
    for net, one in builder.nets.items():
        with torch.no_grad():
            right = (one(x).argmax(1) == y).nonzero().flatten().tolist()
        for text, kind in kinds:
            for index in tqdm(right, desc=f"{net} {text}"):
                if not builder.full(net, text):
                    yield net, text, kind, index


def _outward(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A box as float32 numbers at or outside its ends, (2, d)."""
    return np.stack([float32_below(low), float32_above(high)]).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a benchmark root.")
    parser.add_argument("name", choices=list(COUNTS))
    parser.add_argument("--nets", nargs="+", required=True, metavar="name=FOLDER")
    parser.add_argument("--images", type=int, default=40, help="test images that candidates are made of")
    parser.add_argument("--data", type=Path, help="MNIST, for cure_multinorm; default: $CURE_DATA")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the root's folder goes")
    options = parser.parse_args()
    folders = {name: Path(folder) for name, _, folder in (text.partition("=") for text in options.nets)}
    nets = {name: load_net(folder / "checkpoint.pt")[1] for name, folder in folders.items()}
    data = load_data("mnist" if options.name == "cure_multinorm" else "mnist-slice", False, options.data)
    builder = Builder(options.name, nets, data, dict(zip(STRATA, COUNTS[options.name], strict=True)))
    if options.name == "cure_multinorm":
        multinorm(builder, folders)
    elif options.name == "cure_geometric":
        geometric(builder, options.images)
    else:
        patch(builder, options.images)
    print(Counter((one["net"], one["set"], one["stratum"]) for one in builder.root.candidates), flush=True)
    folder = options.out / options.name
    write_root(folder, builder.root, (Path(__file__).parent / "roots" / f"{options.name}.md").read_text())
    print(f"{generate(folder, 1)} instances below {folder}")


if __name__ == "__main__":
    sys.exit(main())
