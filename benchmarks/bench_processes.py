"""What a second process brings to certification: bench_processes.py [--images 200] [--record]

The same command by one process of one thread, by one of two threads, and by two of one thread (torchrun). Counted are
wall-clock seconds of the whole command; the rate is of the images alone, without the seconds that a single one takes.
To be run on an idle machine of at least two cores, on the shipped slice and the committed net trained for the l2 ball.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ledger import record

FIXTURE = Path(__file__).parent / "fixtures" / "ball.pt"
SETS = ("linf=0.05", "l2=0.75", "l1=1.5")
METHODS = "IBP,lipschitz,CROWN-IBP,CROWN,coupled"
"""Those that no clock stops: what all say is compared byte by byte."""
TWO = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


def seconds(launcher: Sequence[str], threads: int, images: int, folder: Path) -> float:
    """Of one command, which must succeed."""
    command = [sys.executable, "-m", *launcher, "cure_plugin", "certify", str(FIXTURE), *SETS]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--methods", METHODS, "--images", str(images), "--out", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def measure(images: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each kind of run; the start of each is timed by a run of its own on one image."""
    rows = []
    for processes, threads, launcher in ((1, 1, ()), (1, 2, ()), (2, 1, TWO)):
        name = f"{processes}-{threads}"
        start = seconds(launcher, threads, 1, folder / f"start-{name}")
        whole = seconds(launcher, threads, images, folder / name)
        rows.append(
            {
                "processes": processes,
                "threads": threads,
                "seconds": round(whole, 1),
                "start": round(start, 1),
                "rate": round(images / (whole - start), 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    verdicts = {(folder / name / "results.jsonl").read_bytes() for name in ("1-1", "2-1")}
    if len(verdicts) != 1:
        raise SystemExit("one process and two say different things")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--record", action="store_true", help="write the figures to the ledger")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        rows = measure(options.images, Path(folder))
    figures = {
        "images": options.images,
        "sets": list(SETS),
        "methods": METHODS,
        "ratio": round(rows[2]["rate"] / rows[0]["rate"], 2),
    }
    print(json.dumps(figures))
    if options.record:
        record("processes", "python benchmarks/bench_processes.py", 0, {**figures, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
