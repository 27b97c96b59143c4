"""Nets of other papers beside the figures published for them: bench_third_party.py --nets FOLDER [NAME ...]

FOLDER holds ``nets.json`` (for each net its layers in order, normalisation, images, norm and radius or set), state
dicts ``NAME.pt`` and images (``{"images": (N, C, H, W) in [0, 1], "labels"}``). Verdicts go to ``--out`` image by
image, and a run that was stopped goes on there. ``--beside`` asks another verifier the same for nets with a linf ball.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from beside import Beside
from ledger import record_rows
from torch import Tensor, nn
from tqdm import tqdm

from cure_plugin.certification import Certifier
from cure_plugin.certification.cascade import CASCADE, timed
from cure_plugin.datasets import load_data
from cure_plugin.export import default_encoding
from cure_plugin.nets import Normalize
from cure_plugin.sets import SetSpec, set_spec
from cure_plugin.vnncomp.verifiers import find_verifier

PUBLISHED: dict[str, tuple[float, str]] = {
    "mnist_mlp": (41.0, "SDP-CROWN's table, its branch and bound; the full semidefinite programme: 53"),
    "mnist_convsmall": (81.5, "SDP-CROWN"),
    "cifar10_cnn_a": (49.0, "SDP-CROWN"),
    "cifar10_cnn_c": (42.5, "SDP-CROWN"),
    "cifar10_convsmall": (43.5, "SDP-CROWN"),
    "cifar10_convdeep": (46.0, "SDP-CROWN"),
    "sdpfo_mnist_cnn_a_adv": (70.5, "beta-CROWN, 180 s an image on a GPU"),
    "sdpfo_cifar_cnn_a_mix": (41.5, "beta-CROWN, 180 s an image on a GPU"),
}
"""Percent proved of the same 200 images, and by what."""

DATA = {"mnist": "mnist", "cifar": "cifar10"}
"""Data sets of nets whose images are no file, by what their names hold."""


def layers(description: dict[str, Any]) -> Iterator[nn.Module]:
    """The layers that ``nets.json`` lists, in words and numbers."""
    if description["mean"]:
        yield Normalize(description["mean"], description["std"])
    for line in description["layers"]:
        kind, *words = line.split()
        if kind == "conv":
            inputs, outputs, *named = words
            options = {key: int(value) for key, value in zip(named[::2], named[1::2], strict=True)}
            yield nn.Conv2d(int(inputs), int(outputs), options["kernel"], options["stride"], options["padding"])
        elif kind == "linear":
            yield nn.Linear(int(words[0]), int(words[1]))
        else:
            yield {"relu": nn.ReLU, "flatten": nn.Flatten}[kind]()


def read_net(folder: Path, name: str, description: dict[str, Any]) -> nn.Sequential:
    """The net of that name, in eval mode."""
    net = nn.Sequential(*layers(description)).eval()
    weights = torch.load(folder / f"{name}.pt", weights_only=True)
    own = [key for key, _ in net.named_parameters()]
    net.load_state_dict(dict(zip(own, weights.values(), strict=True)), strict=False)
    return net


def read_images(folder: Path, description: dict[str, Any], data: str | None) -> tuple[Tensor, Tensor]:
    """(images, labels): the file's, or a data set's first test images."""
    if description["images"].endswith(".pt"):
        found = torch.load(folder / description["images"], weights_only=True)
        return found["images"].float(), found["labels"].long()
    name = next(full for part, full in DATA.items() if part in description["images"].lower())
    return load_data(name, False, data).first(200).batch(slice(0, 200))


def asked(description: dict[str, Any]) -> SetSpec:
    """The set that the net's papers ask about."""
    return set_spec(description.get("set") or f"l{description['norm']}={description['eps']}")


def decide(
    net: nn.Module, images: tuple[Tensor, Tensor], spec: SetSpec, seconds: float, path: Path
) -> list[dict[str, Any]]:
    """A row per image: what is known of it, and the seconds it took."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    methods = timed(CASCADE, seconds)
    certifier = Certifier(net, tuple(images[0].shape[1:]), methods)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for index in tqdm(range(len(done), len(images[0])), desc=path.stem):
            x, y = (part[index : index + 1] for part in images)
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(index)
            verdict = certifier.decide(x, y, spec.build(), generator)[0][0]
            row = {
                "status": verdict.status,
                "stage": verdict.stage,
                "margin": verdict.margin,
                "pieces": verdict.pieces,
                "seconds": round(time.perf_counter() - started, 3),
            }
            done.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    return done[: len(images[0])]


def counted(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many images were decided, and in what time."""
    counts = {status: sum(one["status"] == status for one in verdicts) for status in ("proved", "falsified")}
    seconds = [one["seconds"] for one in verdicts]
    return {
        "images": len(verdicts),
        **counts,
        "open": len(verdicts) - sum(counts.values()),
        "seconds": round(sum(seconds) / len(verdicts), 2),
        "longest": max(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="nets of nets.json; default: all")
    parser.add_argument("--nets", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", metavar="ROOT", help="of data sets; default: CURE_DATA")
    parser.add_argument("--images", type=int, default=200, help="the first ones")
    parser.add_argument("--seconds", type=float, default=60, help="of branch and bound, an image")
    parser.add_argument("--out", type=Path, default=Path("out/third_party"))
    parser.add_argument("--beside", metavar="VERIFIER", help="as of cure verify: a name or a YAML file")
    parser.add_argument("--record", action="store_true", help="write the rows into the ledger")
    options = parser.parse_args()
    described = json.loads((options.nets / "nets.json").read_text())
    other = find_verifier(options.beside) if options.beside else None
    threads, rows = torch.get_num_threads(), []
    for name in options.names or described:
        net, spec = read_net(options.nets, name, described[name]), asked(described[name])
        x, y = (part[: options.images] for part in read_images(options.nets, described[name], options.data))
        verdicts = decide(net, (x, y), spec, options.seconds, options.out / f"{name}.jsonl")
        published, by = PUBLISHED.get(name, (None, ""))
        of_all = {"net": name, "set": str(spec), "limit": options.seconds, "threads": threads}
        row = {
            **of_all,
            **counted(verdicts),
            "by_branch_and_bound": sum(one["stage"] == "branch-and-bound" for one in verdicts),
            "published": published,
            "published_by": by,
        }
        rows.append(row)
        print(json.dumps(row))
        own = spec.build()
        if other and default_encoding(own) == "box":
            beside = Beside(other, options.seconds, options.out / other.name / name)
            answers, start = beside.decide(net, (x, y), own, verdicts)
            rows.append({**of_all, "by": other.name, **counted(answers), "start": start})
            print(json.dumps(rows[-1]))
    if options.record:
        more = ["--beside VERIFIER"] if other else []
        words = ["python benchmarks/bench_third_party.py", *options.names, "--nets FOLDER", *more, "--record"]
        figures = {"rows": rows, "threads": threads}
        print(record_rows("third_party", " ".join(words), figures, ("net", "set", "images", "by")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
