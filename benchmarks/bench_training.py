"""A CURE step beside its floor: the forward and backward passes that the algorithm cannot do without, in the same run.

python benchmarks/bench_training.py [--nets cnn_small cnn7_narrow cnn7] [--batch 128] [--record]
    [--sabr FOLDER] [--ctrain FOLDER]    # sources of other training code, to be timed beside

Floor of n sets and k attack steps on a batch of B images, every pass on plain PyTorch without BatchNorm (folded away):
k forward and backward passes, gradients for the input only, on n B images; per set one forward and backward pass on 2 B
images, the interval's centres and radii; with BatchNorm one more on B images, for the batch's statistics. Whichever is
faster, the images at once or B at a time.

Beside them a step of the union recipes: SABR for linf, the layers' norms for l2.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ledger import record_rows
from step_beside import ctrain_step, sabr_step
from torch.fx.experimental.optimization import fuse
from torch.profiler import ProfilerActivity, profile

from cure_plugin.bounds.module import bounded_module
from cure_plugin.nets import NETS, NetSpec, build_net
from cure_plugin.sets import set_spec
from cure_plugin.training import CureObjective, LipschitzMargin, Sabr, TrainingSet

SETS = (("linf=0.1", 0.4), ("l2=0.5", 0.4))
ATTACK_STEPS = 8
ROUNDS = 6


def seconds(action: Callable[[], Any], budget: float) -> float:
    """Shortest time of one call, after one to warm up, over at least two calls and ``budget`` seconds."""
    action()
    times: list[float] = []
    while len(times) < 2 or sum(times) < budget:
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def in_turn(*measured: Callable[[], float]) -> list[float]:
    """The shortest of each over some rounds, in which all have their turn, as clocks drift."""
    rounds = [[one() for one in measured] for _ in range(ROUNDS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def peak_bytes(action: Callable[[], Any]) -> int:
    """Most tensor memory that ``action`` held at once, above what was held before."""
    action()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Step:
    """One optimisation step of a net of its own."""

    def __init__(self, net_name: str, batch_norm: bool, batch: int, objective: CureObjective) -> None:
        spec = NetSpec(net_name, (1, 28, 28), batch_norm=batch_norm)
        self.net = build_net(spec, torch.Generator().manual_seed(0)).train()
        self.bounded = bounded_module(self.net, spec.input_shape)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=5e-4)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.rand(batch, 1, 28, 28, generator=generator)
        self.y = torch.randint(10, (batch,), generator=generator)
        self.objective = objective

    def __call__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.optimizer.zero_grad()
        self.objective(self.bounded, self.net, self.x, self.y, generator=generator).loss.backward()
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Weights, their gradients and Adam's two moments."""
        return 4 * sum(parameter.numel() * parameter.element_size() for parameter in self.net.parameters())


def floor(step: Step, sets: int, batch_norm: bool, budget: float) -> float:
    """Seconds of the passes that no implementation avoids."""
    folded = fuse(copy.deepcopy(step.net).eval())
    folded.requires_grad_(False)

    def attack(times: int) -> float:
        x, y = step.x.repeat(times, 1, 1, 1).requires_grad_(), step.y.repeat(times)
        return seconds(lambda: torch.autograd.grad(F.cross_entropy(folded(x), y), x), budget)

    def train(times: int) -> float:
        x, y = step.x.repeat(times, 1, 1, 1), step.y.repeat(times)
        return seconds(lambda: F.cross_entropy(folded(x), y).backward(), budget)

    attack_seconds = min(attack(sets), sets * attack(1))
    folded.requires_grad_(True)
    single = train(1)
    region_seconds = min(train(2), 2 * single)
    return ATTACK_STEPS * attack_seconds + sets * region_seconds + (single if batch_norm else 0.0)


def measure(net_name: str, batch: int, budget: float, others: Mapping[str, Path]) -> dict[str, Any]:
    """One net's row; the paper's nets have BatchNorm, cnn_small has none. ``others``: folders of other code."""
    batch_norm = net_name != "cnn_small"
    sets = [TrainingSet(set_spec(text).build(), Sabr(ratio)) for text, ratio in SETS]
    cure = CureObjective(sets, alignment=0.5, align_from="l2", attack_steps=ATTACK_STEPS)
    sabr = CureObjective(sets[:1], attack_steps=ATTACK_STEPS)
    step, single = (Step(net_name, batch_norm, batch, objective) for objective in (cure, sabr))
    row: dict[str, Any] = {"net": net_name, "batch_norm": batch_norm, "batch": batch}
    for name, each, count in (("cure", step, len(sets)), ("sabr", single, 1)):
        needed, taken = in_turn(lambda: floor(each, count, batch_norm, budget), lambda: seconds(each, budget))  # noqa: B023
        peak = peak_bytes(each) + each.state_bytes()
        row[name] = {"step": taken, "floor": needed, "ratio": taken / needed, "peak_mib": peak / 2**20}
    union = CureObjective([sets[0], TrainingSet(sets[1].perturbation, LipschitzMargin())], attack_steps=ATTACK_STEPS)
    norms = Step(net_name, batch_norm, batch, union)
    plain, taken = in_turn(lambda: seconds(step, budget), lambda: seconds(norms, budget))
    row["union"] = {"step": taken, "over_cure": taken / plain}
    for name, folder in others.items():
        make, own = (sabr_step, single) if name == "sabr" else (ctrain_step, step)
        net = copy.deepcopy(own.net)
        other = make(folder, net, own.x, own.y, 0.1, SETS[0][1], ATTACK_STEPS)
        ours, theirs = in_turn(lambda: seconds(own, budget), lambda: seconds(other, budget))  # noqa: B023
        row[f"beside_{name}"] = {"step": theirs, "ours": ours, "ratio": ours / theirs}
    row["images_per_second"] = batch / row["cure"]["step"]
    row["memory_ratio"] = row["cure"]["peak_mib"] / row["sabr"]["peak_mib"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a training step over its floor.")
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["cnn_small", "cnn7_narrow", "cnn7"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per measurement")
    parser.add_argument("--sabr", type=Path, metavar="FOLDER", help="SABR's sources: its step beside ours for linf")
    parser.add_argument("--ctrain", type=Path, metavar="FOLDER", help="CTRAIN's: two of its SABR losses beside CURE's")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/training-step.json")
    options = parser.parse_args()
    others = {name: folder for name in ("sabr", "ctrain") if (folder := getattr(options, name)) is not None}
    rows = []
    for name in options.nets:
        row = measure(name, options.batch, options.budget, others)
        rows.append(row)
        print(
            f"{name}: step {row['cure']['step']:.3f} s, {row['cure']['ratio']:.2f} x floor (SABR for linf alone "
            f"{row['sabr']['step']:.3f} s, {row['sabr']['ratio']:.2f} x its floor), {row['images_per_second']:.0f} "
            f"images/s; peak {row['cure']['peak_mib']:.0f} MiB, {row['memory_ratio']:.2f} x SABR's; union's "
            f"step {row['union']['step']:.3f} s, {row['union']['over_cure']:.2f} x CURE's",
            flush=True,
        )
        for other in others:
            beside = row[f"beside_{other}"]
            print(f"{name}: {other} {beside['step']:.3f} s, ours {beside['ratio']:.2f} x", flush=True)
    if options.record:
        figures = {"threads": torch.get_num_threads(), "sets": SETS, "attack_steps": ATTACK_STEPS, "rows": rows}
        command = f"python benchmarks/bench_training.py --nets {' '.join(options.nets)} --batch {options.batch}"
        command += "".join(f" --{name} FOLDER" for name in others)
        record_rows("training-step", command, figures, ("net", "batch"))


if __name__ == "__main__":
    sys.exit(main())
