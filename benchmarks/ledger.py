"""The results ledger: one JSON file per run, and the tables and plots of README and docs made from them.

python benchmarks/ledger.py record-demo out/demo    # after make demo
python benchmarks/ledger.py render                  # rewrite the tables and plots
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reproduce_report
import third_party_report
from entries import Entry, Hardware, read_entry, write_entry

from cure_plugin.certification import Summary
from cure_plugin.certification.dataset import set_names
from cure_plugin.json_files import read_record
from cure_plugin.report import text_table
from cure_plugin.sets import set_spec

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("results", "design", "scaling")))
"""What holds generated tables."""

UNION_SETTING = "small_mnist_small"
UNION_PLOT, THIRD_PARTY_PLOT = "union.svg", "third_party.svg"


def hardware() -> Hardware:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = found.group(1) if found else model
    return Hardware(model, os.cpu_count(), platform.python_version())


def commit() -> str:
    """The checked-out commit, marked where the tree, results apart, differs from it."""
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    command = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]
    dirty = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return revision.stdout.strip() + ("+changes" if dirty else "")


COMMIT = commit()
"""When the script started: long runs end at a later one."""


def record(name: str, command: str, seed: int, figures: dict[str, Any]) -> Path:
    """Write one result file and return its path."""
    return write_entry(RESULTS / f"{name}.json", Entry(COMMIT, seed, hardware(), command, figures))


def record_rows(name: str, command: str, figures: dict[str, Any], key: Sequence[str]) -> Path:
    """:func:`record` where ``figures["rows"]`` are some of the rows: the others, told apart by ``key``, stay.

    Every row carries the commit and the processor that it was measured at.
    """
    path = RESULTS / f"{name}.json"
    known: list[dict[str, Any]] = []
    if path.exists():
        entry = read_entry(path)
        known = [{"commit": entry.commit, "cpu": entry.hardware.cpu, **row} for row in entry.figures["rows"]]
    rows = [*known, *({**row, "commit": COMMIT, "cpu": hardware().cpu} for row in figures["rows"])]
    merged = {tuple(row.get(part) for part in key): row for row in rows}
    return record(name, command, 0, {**figures, "rows": list(merged.values())})


def demo_table() -> str:
    """The demo's result as a Markdown table."""
    entry = read_entry(RESULTS / "demo.json")
    figures = entry.figures
    names = {text.split("=")[0]: text for text in figures["sets"]}
    lines = [
        "| method | clean | "
        + " | ".join(f"{text} certified (attack leaves)" for text in names.values())
        + " | union (95 %) |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for method, shares in figures["methods"].items():
        cells = [f"{100 * shares['certified'][n]:.1f} ({100 * shares['pgd'][n]:.1f})" for n in names]
        low, high = shares["intervals"]["union"]
        union = f"{100 * shares['union']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        lines.append(f"| {method} | {100 * shares['clean']:.1f} | " + " | ".join(cells) + f" | {union} |")
    hardware_text = f"{entry.hardware.cores} cores, {entry.hardware.cpu}"
    seconds = "" if figures["reused"] else f"{figures['seconds']:.0f} s on "
    lines.append("")
    lines.append(
        f"Percent of {figures['images']} test images; {seconds}{hardware_text}, "
        f"commit {entry.commit}, seed {entry.seed}, `{entry.command}`."
    )
    return "\n".join(lines)


def sets_table() -> str:
    """The figures of bench_sets.py as Markdown tables."""
    entry = read_entry(RESULTS / "sets.json")
    figures = entry.figures
    lines = [
        "| rotation hull, mean pixel width | ours / sampled truth | CGT's interval / sampled truth |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(row["data"] for row in figures["hull"]):
        ratios = [
            [row[key] / row["truth"] for row in figures["hull"] if row["data"] == name] for key in ("hull", "cgt")
        ]
        cells = [f"{min(ratio):.2f} to {max(ratio):.2f}" for ratio in ratios]
        lines.append(f"| {name}, 0.25 and 1 degree at 0, 10, 30 | {cells[0]} | {cells[1]} |")
    lines += ["", "| set | images (broken by the attack) | splitting: proved, pieces per image, s | fixed: proved, s |"]
    lines.append("|---|---|---|---|")
    for row in (*figures["geometric"], figures["patch"]):
        ours, other = row["splitting"], row["other"]
        fixed = f"{row['boxes']} boxes, IBP" if "boxes" in row else "each position, CROWN"
        lines.append(
            f"| {row['set']} | {row['images']} ({row['attacked']}) | {ours['proved']}, {ours['pieces_per_image']:.1f}, "
            f"{ours['seconds']:.0f} | {fixed}: {other['proved']}, {other['seconds']:.0f} |"
        )
    hardware_text = f"{entry.hardware.cores} cores, {entry.hardware.cpu}"
    lines += ["", f"{hardware_text}, commit {entry.commit}, `{entry.command}`."]
    return "\n".join(lines)


def certify_table() -> str:
    """The figures of bench_certify.py coupled as a Markdown table."""
    entry = read_entry(RESULTS / "certify-coupled.json")
    lines = [
        "| net, set | attack leaves | cascade, s per image | stock CROWN | stock alpha-CROWN |",
        "|---|---|---|---|---|",
    ]
    for row in entry.figures["rows"]:
        ours, plain, total = row["cascade"], row["plain"], row["images"]
        lines.append(
            f"| {row['net']}, {row['set']} | {100 * ours['not_broken'] / total:.1f} | "
            f"{100 * len(ours['proved']) / total:.1f}, {ours['seconds'] / total:.2f} | "
            f"{100 * plain['crown'] / total:.1f} | "
            f"{100 * plain['alpha'] / plain['alpha_images']:.1f} (of {plain['alpha_images']} images) |"
        )
    images = entry.figures["rows"][0]["images"]
    lines += ["", f"Percent of {images} test images; {shown_origin(entry)}. paper:"]
    lines.append("trained on a tiny region around the l2 attack; ball: on a small l2 ball (`benchmarks/recipes`).")
    return "\n".join(lines)


def branching_table() -> str:
    """The figures of bench_branching.py as a Markdown table."""
    entry = read_entry(RESULTS / "branching.json")
    lines = [
        "| net, set | images | proved without, open | proved with, open | s an image, and of those left open |",
        "|---|---|---|---|---|",
    ]
    for row in entry.figures["rows"]:
        lines.append(
            f"| {row['net']}, {row['set']} | {row['images']} | {row['proved_before']}, {row['open_before']} | "
            f"{row['proved']}, {row['open']} | {row['seconds_before']:.1f}, {row['seconds']:.1f} |"
        )
    lines += ["", f"The cascade without and with branch and bound (at most 15 s an image); {shown_origin(entry)}."]
    return "\n".join(lines)


def loop_table() -> str:
    """The figures of bench_certify.py loop as a Markdown table."""
    entry = read_entry(RESULTS / "certify-loop.json")
    rows = entry.figures["rows"]
    lines = [
        "| set | cascade: proved, s | plain CROWN, then alpha-CROWN: proved, s | times our time | attack leaves |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ours, plain = row["cascade"], row["plain"]
        count = str(len(plain["proved"]))
        if plain["unreached"]:
            count += f" when stopped ({plain['unreached']} to go, all settled by the cascade)"
        lines.append(
            f"| {row['set']} | {len(ours['proved'])}, {ours['seconds']:.0f} | {count}, {plain['seconds']:.0f} | "
            f"{plain['seconds'] / ours['seconds']:.1f} | {ours['not_broken']} |"
        )
    lines += [
        "",
        f"{rows[0]['images']} test images, net ball; {shown_origin(entry)}; "
        f"the cascades took at most {max(row['peak_gigabytes'] for row in rows):.1f} GiB.",
    ]
    return "\n".join(lines)


def splitting_table() -> str:
    """The figures of bench_splitting.py as a Markdown table."""
    entry = read_entry(RESULTS / "certify-splitting.json")
    lines = [
        "| data, set | clean | certified | attack leaves | pieces: mean, most | boxes CGT needs | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in entry.figures["rows"]:
        mean = row["pieces"] / max(1, row["split_images"])
        cgt = f"{row['cgt_splits']:,}" if row["cgt_splits"] else ""
        shares = " | ".join(f"{100 * row[key]:.0f}" for key in ("clean", "certified", "pgd"))
        lines.append(
            f"| {row['data']}, {row['text']} | {shares} | {mean:.0f}, {row['most_pieces']} | {cgt} | "
            f"{row['seconds']:.0f} |"
        )
    images = entry.figures["rows"][0]["images"]
    lines += ["", f"Percent of {images} test images; pieces of the images that were split; {shown_origin(entry)}."]
    return "\n".join(lines)


def demo_output() -> str:
    """What the demo said at its end."""
    figures = read_entry(RESULTS / "demo.json").figures
    table = text_table({name: read_record(json.dumps(one), Summary) for name, one in figures["methods"].items()})
    report = f"report: out/demo/report.html ({figures['seconds']:.0f} s)"
    return "\n".join(["```", table, *figures["outside"], figures["shown"], report, "```"])


def union_figure() -> str:
    """The plot of the union beside single norms, and what it shows."""
    methods = reproduce_report.main_runs(RESULTS, UNION_SETTING)
    first = next(iter(methods.values()))[0].figures
    seeds = ", ".join(dict.fromkeys(str(one.seed) for entries in methods.values() for one in entries))
    epochs = f"{first['epochs']} epochs"
    for method, entries in methods.items():
        if entries[0].figures["epochs"] != first["epochs"]:
            start = " from a trained net" if "finetune" in method else ""
            epochs += f", {reproduce_report.NAMES[method]} {entries[0].figures['epochs']}{start}"
    return (
        f"![Certified accuracy per norm and for the union, by training method](docs/images/{UNION_PLOT})\n"
        f"`{UNION_SETTING}`: a small convolutional net on MNIST ({epochs}); certified accuracy on the first "
        f"{first['images']} test images at {', '.join(first['radii'])} and for their union; means and ranges of seeds "
        f"{seeds}; dots: the union that the attack leaves, an upper limit."
    )


def reproduce_tables() -> str:
    """The runs of reproduce.py."""
    return reproduce_report.tables(RESULTS)


def plots() -> None:
    """Draw the runs of reproduce.py into docs/images."""
    folder = ROOT / "docs" / "images"
    for setting in {path.stem.rsplit("-", 2)[0] for path in (RESULTS / "reproduce").glob("*.json")}:
        reproduce_report.plot(RESULTS, setting, folder / f"{setting}.svg")
    reproduce_report.bars(RESULTS, UNION_SETTING, folder / UNION_PLOT)
    third_party_report.bars(read_entry(RESULTS / "third_party.json").figures["rows"], folder / THIRD_PARTY_PLOT)


def generalization_tables() -> str:
    """The figures of bench_generalization.py, a Markdown table for each list of sets."""
    entry = read_entry(RESULTS / "generalization.json")
    parts = []
    for spec in dict.fromkeys(row["spec"] for row in entry.figures["rows"]):
        rows = [row for row in entry.figures["rows"] if row["spec"] == spec]
        seen, unseen = ([set_spec(text) for text in rows[0][key]] for key in ("seen", "unseen"))
        names = dict(zip(map(str, (*seen, *unseen)), set_names([*seen, *unseen]), strict=True))
        lines = [
            f"| {spec} | clean | " + " | ".join([*map(str, seen), *(f"*{one}*" for one in unseen)]) + " |",
            "|---|---|" + "---|" * len(names),
        ]
        for row in rows:
            cells = [f"{100 * row['certified'][n]:.1f} ({100 * row['pgd'][n]:.1f})" for n in names.values()]
            lines.append(f"| {row['net']} | {100 * row['clean']:.1f} | " + " | ".join(cells) + " |")
        lines += ["", f"Percent certified (attack leaves) of {rows[0]['images']} test images; *unseen* in italics."]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, f"{shown_origin(entry)}."])


def training_step_table() -> str:
    """The figures of bench_training.py as a Markdown table."""
    entry = read_entry(RESULTS / "training-step.json")
    lines = [
        "| net, batch | CURE step, s | over its floor | images/s | peak MiB (over SABR's) | SABR step, s | over its "
        "floor | union step, s (over CURE's) | over SABR's own code | over two CTRAIN losses |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in entry.figures["rows"]:
        cure, sabr = row["cure"], row["sabr"]
        union = f"{row['union']['step']:.2f} ({row['union']['over_cure']:.2f})" if "union" in row else ""
        beside = [f"{row[key]['ratio']:.2f}" if key in row else "" for key in ("beside_sabr", "beside_ctrain")]
        cells = [
            f"{row['net']}, {row['batch']}",
            f"{cure['step']:.2f}",
            f"{cure['ratio']:.2f}",
            f"{row['images_per_second']:.0f}",
            f"{cure['peak_mib']:.0f} ({row['memory_ratio']:.2f})",
            f"{sabr['step']:.2f}",
            f"{sabr['ratio']:.2f}",
            union,
            *beside,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "A step over linf and l2. The last columns: our SABR step over that of the SABR paper's code; our Max step "
        f"over a step with CTRAIN's SABR loss twice; on the same net and images. {shown_origin(entry)}.",
    ]
    return "\n".join(lines)


def third_party_table() -> str:
    """The figures of bench_third_party.py."""
    entry = read_entry(RESULTS / "third_party.json")
    return f"{third_party_report.table(entry.figures['rows'])} {shown_origin(entry)}."


def third_party_figure() -> str:
    """The plot of them, and what it shows."""
    rows = third_party_report.main_rows(read_entry(RESULTS / "third_party.json").figures["rows"])
    return (
        f"![Images proved, beside the share published](docs/images/{THIRD_PARTY_PLOT})\n"
        f"Nets of SDP-CROWN's and SDP-FO's papers, their {rows[0]['images']} images: proved by the default cascade ("
        f"one CPU thread, at most {rows[0]['limit']:.0f} s of branch and bound an image) and published at the same "
        "radii (SDP-CROWN's paper; linf: beta-CROWN on a GPU); dots: what is not falsified, an upper limit."
    )


def processes_table() -> str:
    """Certification by one process and by two."""
    entry = read_entry(RESULTS / "processes.json")
    figures = entry.figures
    lines = ["| processes | threads each | seconds | of them start | images a second |", "|---|---|---|---|---|"]
    for row in figures["rows"]:
        cells = (row["processes"], row["threads"], f"{row['seconds']:.0f}", f"{row['start']:.0f}", f"{row['rate']:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("")
    lines.append(
        f"{figures['images']} images, {', '.join(figures['sets'])}; two processes do {figures['ratio']:.2f} times the "
        f"images of one. {entry.hardware.cpu}, commit {entry.commit}, `{entry.command}`"
    )
    return "\n".join(lines)


def shown_origin(entry: Entry) -> str:
    """Where and how a result was measured."""
    threads = entry.figures["threads"]
    rows = entry.figures.get("rows", [{}])
    processors = " and ".join(dict.fromkeys(row.get("cpu", entry.hardware.cpu) for row in rows))
    cores = f"{threads} thread{'s' if threads > 1 else ''}, {processors}"
    commits = dict.fromkeys(row.get("commit", entry.commit) for row in rows)
    return f"{cores}, commit {', '.join(commits)}, `{entry.command}`"


def operators_table() -> str:
    """Which operators are accepted, from the table that decides it."""
    from cure_plugin.bounds.operators import table

    return table()


TABLES = {
    "operators": operators_table,
    "union": union_figure,
    "demo-output": demo_output,
    "demo": demo_table,
    "sets": sets_table,
    "certify": certify_table,
    "branching": branching_table,
    "loop": loop_table,
    "splitting": splitting_table,
    "third-party": third_party_table,
    "third-party-plot": third_party_figure,
    "reproduce": reproduce_tables,
    "generalization": generalization_tables,
    "training-step": training_step_table,
    "processes": processes_table,
}


def render() -> None:
    """Replace every ``<!-- table NAME -->`` ... ``<!-- end -->`` block of :data:`PAGES`, and draw the plots."""
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    plots()


def rendered(text: str) -> str:
    """``text`` with the blocks filled in."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        try:
            lines = table()
        except FileNotFoundError:  # not measured yet
            continue
        text = re.sub(pattern, lambda match, lines=lines: f"{match[1]}{lines}\n{match[2]}", text, flags=re.S)
    return text


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "record-demo":
        record("demo", "make demo", 0, json.loads((Path(arguments[1]) / "summary.json").read_text()))
    elif arguments != ["render"]:
        sys.stderr.write(str(__doc__))
        return 2
    render()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
