"""``cure merge``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cure_plugin.certification import summarize
from cure_plugin.certification.shards import merge_parts
from cure_plugin.files import make_folder, write_text
from cure_plugin.report import image_table, text_table


def merge(options: argparse.Namespace) -> None:
    """Put the parts of a certification together, and write what ``cure certify`` writes beside its page."""
    out = options.out or options.folders[0]
    make_folder(out)
    records = merge_parts([folder / "results.jsonl" for folder in options.folders], out / "results.jsonl")
    summary = summarize(records)
    write_text(out / "summary.json", json.dumps(asdict(summary), indent=1) + "\n")
    write_text(out / "results.csv", image_table(records).as_csv())
    print(text_table({out.name: summary}))
