"""Tables and plots of the runs that reproduce.py left in the ledger: one line per method, means over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entries import Entry, read_entry

from cure_plugin.errors import DataError
from cure_plugin.report.plots import load_pyplot

ABLATIONS = (
    "union_whole",
    "union_ba",
    "union_gp",
    "universal",
    "scratch_clean",
    "ba_only",
    "gp_only",
    "gp_single",
    "plain_sum",
    "l2_attack_only",
    "l2_box",
    "l2_single_box",
    "gp_annealing",
    "l2_larger",
)
NAMES = {
    "linf": "linf only (SABR)",
    "l2": "l2 only",
    "joint": "Joint",
    "max": "Max",
    "random": "Random",
    "scratch": "CURE-Scratch",
    "finetune": "CURE-Finetune",
    "union": "union (boxes for linf, layer norms)",
    "union_clean": "union, more of the natural loss",
    "union_whole": "union, l2 at its whole radius",
    "union_robust": "union, no natural loss",
    "union_ba": "union + BA",
    "union_gp": "union + GP",
    "union_finetune": "union, from a linf net",
    "scratch_clean": "CURE-Scratch, smaller l2 region",
    "ba_only": "Max + BA",
    "gp_only": "Max + GP",
    "gp_single": "linf only + GP",
    "plain_sum": "Joint as plain sum",
    "l2_attack_only": "Max, lambda_2 = 0",
    "l2_box": "Max, l2 box of the paper",
    "l2_single_box": "l2 only, box of the paper",
    "gp_annealing": "CURE-Scratch, GP while annealing too",
    "l2_larger": "l2 only, radius x 1.5",
    "universal": "union with R(10) and 2 x 2 patches",
}
"""Method -> what the tables call it."""


def runs(results: Path, setting: str) -> dict[str, list[Entry]]:
    """Method -> its entries, one per seed; in the table's order."""
    entries: dict[str, list[Entry]] = {}
    for path in sorted((results / "reproduce").glob(f"{setting}-*.json")):
        entry = read_entry(path)
        entries.setdefault(entry.figures["method"], []).append(entry)
    unknown = sorted(entries.keys() - NAMES.keys())
    if unknown:
        raise DataError(f"{setting} has runs of {', '.join(unknown)}, which the tables have no name for; add it")
    return {method: entries[method] for method in NAMES if method in entries}


def main_runs(results: Path, setting: str) -> dict[str, list[Entry]]:
    """:func:`runs` without the ablations."""
    return {method: entries for method, entries in runs(results, setting).items() if method not in ABLATIONS}


def shown(values: Sequence[float]) -> str:
    """Shares as percent: the mean, and half the range between seeds."""
    mean, half = 100 * sum(values) / len(values), 50 * (max(values) - min(values))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {half:.1f}"


def table(results: Path, setting: str) -> str:
    """One setting as a Markdown table; empty without runs."""
    methods = runs(results, setting)
    if not methods:
        return ""
    first = next(iter(methods.values()))[0].figures
    names = list(first["certified"])
    lines = [
        "| method | epochs | seeds | clean | "
        + " | ".join(first["radii"])
        + " | union | union, attack leaves | training, min |",
        "|---|---|---|---|" + "---|" * (len(names) + 3),
    ]
    for method, entries in methods.items():
        figures = [entry.figures for entry in entries]
        cells = [shown([f["clean"] for f in figures])]
        cells += [shown([f["certified"][name] for f in figures]) for name in names]
        cells += [shown([f[key] for f in figures]) for key in ("union", "union_pgd")]
        minutes = min(f["train_seconds"] for f in figures) / 60
        seeds = ", ".join(str(entry.seed) for entry in entries)
        images = figures[0]["images"]
        name = NAMES[method] if images == first["images"] else f"{NAMES[method]} (first {images} images)"
        lines.append(f"| {name} | {figures[0]['epochs']} | {seeds} | " + " | ".join(cells) + f" | {minutes:.0f} |")
    return "\n".join(lines)


def tables(results: Path) -> str:
    """All settings that have runs."""
    settings = sorted({path.stem.rsplit("-", 2)[0] for path in (results / "reproduce").glob("*.json")})
    blocks = []
    for setting in settings:
        entries = [entry for found in runs(results, setting).values() for entry in found]
        if not entries:
            continue  # only methods that the table does not list
        origin = entries[0]
        threads = {entry.figures["threads"] for entry in entries}
        commits = ", ".join(dict.fromkeys(entry.commit for entry in entries))
        blocks.append(
            f"`{setting}`, first {origin.figures['images']} test images, percent; ± half the range between seeds; "
            "epochs and training of CURE-Finetune without the net it starts from, training of the faster seed (other "
            "jobs ran beside some); "
            f"{min(threads)} thread{'s' if min(threads) > 1 else ''} of {origin.hardware.cpu}, commit {commits}, "
            f"`python benchmarks/reproduce.py {setting}`:\n\n{table(results, setting)}"
        )
    return "\n\n".join(blocks)


def bars(results: Path, setting: str, path: Path) -> None:
    """Certified accuracy for each norm and for the union, a group of bars per method, as an SVG file.

    Bars are means over seeds, their whiskers go from the lowest to the highest; dots: the union that the attack leaves.
    """
    pyplot = load_pyplot()
    methods = main_runs(results, setting)
    radii = next(iter(methods.values()))[0].figures["radii"]
    shades = dict(zip([*radii, "union"], ("#9ecae1", "#a1d99b", "#fdd0a2", "#c8503c"), strict=True))
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    for number, (text, colour) in enumerate(shades.items()):
        name, width = text.split("=")[0], 0.8 / len(shades)
        for place, entries in enumerate(methods.values()):
            found = [100 * {**one.figures["certified"], "union": one.figures["union"]}[name] for one in entries]
            mean, left = sum(found) / len(found), place + (number - len(shades) / 2 + 0.5) * width
            axes.bar(left, mean, width, color=colour, label=None if place else text)
            axes.plot([left, left], [min(found), max(found)], color="black", linewidth=0.8)
            if name == "union":
                limits = [100 * one.figures["union_pgd"] for one in entries]
                axes.plot(left, sum(limits) / len(limits), "k.", markersize=5)
    labels = [NAMES[method].replace(" (SABR)", "").replace("-", "-\n") for method in methods]
    axes.set_xticks(range(len(methods)), labels)
    axes.set_ylabel("certified accuracy, %")
    axes.set_ylim(0, 100)
    axes.legend(ncols=len(shades), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.tight_layout()
    save(figure, setting, path)


def plot(results: Path, setting: str, path: Path) -> None:
    """Clean against union certified accuracy, a point per run, as an SVG file."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for method, entries in runs(results, setting).items():
        clean = [100 * entry.figures["clean"] for entry in entries]
        union = [100 * entry.figures["union"] for entry in entries]
        marker = "x" if method in ABLATIONS else "o"
        axes.plot(clean, union, marker, linestyle="-", linewidth=0.5, label=NAMES[method])
    axes.set_xlabel("clean accuracy, %")
    axes.set_ylabel("certified for every set, %")
    axes.set_title(setting)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, setting, path)


def save(figure: Any, salt: str, path: Path) -> None:
    """Write an SVG file, the same for the same runs, and close the figure."""
    pyplot = load_pyplot()
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"svg.hashsalt": salt}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
