"""Put trained nets of reproduce.py into the zoo that ships: build_zoo.py SETTING/METHOD[-SEED] ... --out FOLDER

FOLDER is reproduce.py's ``--out``; the figures are those of the ledger. Weights of a net that is larger than the zoo
allows are rounded to half precision, and what ships is then certified anew, into a file of the ledger of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from entries import read_entry
from ledger import RESULTS, record
from runs import certified, test_split

from cure_plugin.checkpoint import load_checkpoint, load_net, net_of, save_checkpoint
from cure_plugin.errors import SpecError
from cure_plugin.files import write_text
from cure_plugin.json_files import plain
from cure_plugin.zoo import FOLDER, Index, ZooNet, zoo_nets

LARGEST = 700_000
"""Bytes of a file."""

LARGEST_ALL = 6_000_000
"""Bytes of all files together."""


def put(run: str, options: argparse.Namespace) -> tuple[str, ZooNet]:
    """The net of a run as a file of the zoo, and its line of the index."""
    setting, _, tail = run.partition("/")
    method, _, seed = tail.partition("-")
    ledger = f"reproduce/{setting}-{method}-{seed or 0}"
    name = f"{setting.removeprefix('small_')}/{method}"
    path = FOLDER / f"{name.replace('/', '-')}.pt"
    figures: dict[str, Any] = read_entry(RESULTS / f"{ledger}.json").figures
    payload = load_checkpoint(options.out / setting / f"{method}-{seed or 0}" / "checkpoint.pt")
    spec, net = net_of(payload, run)
    save_checkpoint(path, spec, net)
    if path.stat().st_size > LARGEST:
        save_checkpoint(path, spec, net.half())
        spec, rounded = load_net(path)
        ledger = f"zoo/{path.stem}"
        test = (
            test_split(options.data)(figures["recipe"]["data"])[1]
            .first(figures["images"])
            .centre_crop(*spec.input_shape[1:])
        )
        summary = certified(rounded, spec, test, figures["radii"], options.out / ledger / "results.jsonl", name)
        figures = {**figures, "weights": "half precision", "threads": torch.get_num_threads(), **asdict(summary)}
        record(ledger, f"python benchmarks/build_zoo.py {run}", int(seed or 0), figures)
    names = {text.split("=")[0]: text for text in figures["radii"]}
    return name, ZooNet(
        path.name,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        spec.name,
        figures["recipe"]["data"],
        f"{setting}/{method}",
        int(seed or 0),
        figures["images"],
        figures["clean"],
        {names[short]: share for short, share in figures["certified"].items()},
        figures["union"],
        f"{ledger}.json",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="SETTING/METHOD[-SEED]")
    parser.add_argument("--out", type=Path, default=Path("out/reproduce"), metavar="FOLDER")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    nets = {**zoo_nets(), **dict(put(run, options) for run in options.runs)}
    total = sum((FOLDER / one.file).stat().st_size for one in nets.values())
    if total > LARGEST_ALL:
        raise SpecError(f"the zoo would take {total} bytes, of {LARGEST_ALL} at most; leave nets out")
    write_text(FOLDER / "index.json", json.dumps(plain(Index(nets)), indent=1) + "\n")
    print(f"{len(nets)} nets, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
