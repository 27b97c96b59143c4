"""``cure report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cure_plugin.certification import Certifier, certify_dataset, summarize
from cure_plugin.certification.curves import certified_curves
from cure_plugin.cli.options import CURVE_FACTORS, load_model, read_set_options, settings_line
from cure_plugin.datasets import load_data
from cure_plugin.demo import CURVE_METHODS
from cure_plugin.errors import SpecError
from cure_plugin.files import make_folder
from cure_plugin.report import Page, text_table, write_report
from cure_plugin.report.plots import load_pyplot


def report(options: argparse.Namespace) -> None:
    """Certify several nets and show them on one page."""
    load_pyplot()
    specs = read_set_options(options.sets)
    data = load_data(options.on, False, options.data).first(options.images)
    certifiers = {name: Certifier(*load_model(path)) for name, path in _named_paths(options.models).items()}
    make_folder(options.out)
    records, curves = {}, {}
    for name, certifier in certifiers.items():
        records[name] = certify_dataset(certifier, data, specs, options.out / f"{name}.jsonl", progress=True)
        quick = Certifier(certifier.net, certifier.input_shape, CURVE_METHODS)
        curves[name] = certified_curves(quick, data, specs, CURVE_FACTORS, True)
    summaries = {name: summarize(listed) for name, listed in records.items()}
    settings = settings_line(options, specs, certifier) + f" Curves: {', '.join(CURVE_METHODS)}."
    path = options.out / "report.html"
    write_report(path, Page("Certified accuracy", summaries, settings, records, CURVE_FACTORS, curves))
    print(text_table(summaries))
    print(f"report: {path}")


def _named_paths(texts: Sequence[str]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator:
            raise SpecError(f"a net is written name=checkpoint.pt, got {text!r}")
        if name in ("", ".", "..") or Path(name).name != name:
            raise SpecError(f"a net's name becomes a folder's, so it is one without / or ..; got {name!r}")
        if name in paths:
            raise SpecError(f"two nets are named {name!r}; give each a name of its own")
        paths[name] = Path(path)
    return paths
