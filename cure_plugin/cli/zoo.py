"""``cure zoo``."""

from __future__ import annotations

import argparse

from cure_plugin.report.table import Table
from cure_plugin.zoo import PREFIX, zoo_nets


def zoo(options: argparse.Namespace) -> None:
    """List the trained nets that ship inside, with their figures."""
    header = ["name", "net", "data", "clean", "certified", "union", "images", "recipe", "seed"]
    rows = [
        [
            PREFIX + name,
            one.net,
            one.data,
            f"{100 * one.clean:.1f}",
            ", ".join(f"{text} {100 * share:.1f}" for text, share in one.certified.items()),
            f"{100 * one.union:.1f}",
            str(one.images),
            one.recipe,
            str(one.seed),
        ]
        for name, one in zoo_nets().items()
    ]
    print(Table(header, rows).as_text())
    print("Percent of the first test images; verdicts of the default cascade.")
