"""``cure certify``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from cure_plugin.certification import BranchAndBound, Certifier, certify_dataset, summarize
from cure_plugin.certification.cascade import read_methods, timed
from cure_plugin.certification.curves import certified_curves
from cure_plugin.certification.dataset import certify_shard, set_names
from cure_plugin.certification.record import Record
from cure_plugin.certification.shards import Ranks, Shard
from cure_plugin.cli.options import CURVE_FACTORS, check_device, load_model, read_set_options, settings_line
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.errors import MissingDependencyError, SpecError
from cure_plugin.files import make_folder, write_text
from cure_plugin.nets import NetSpec
from cure_plugin.proofs import Question, write_proofs
from cure_plugin.report import Page, image_table, summary_markdown, text_table, write_report
from cure_plugin.report.plots import load_pyplot
from cure_plugin.sets import SetSpec
from cure_plugin.training.world import own_device


def certify(options: argparse.Namespace) -> None:
    """Certify a net for a list of sets and write results and reports, the page only where matplotlib is there."""
    check_device(options.device)
    specs = read_set_options(options.sets)
    data = load_data(options.on, False, options.data).first(options.images)
    named = NetSpec(options.net, data.shape, data.classes, options.batch_norm) if options.net else None
    net, shape = load_model(options.model, named)
    if tuple(shape) != data.shape:
        raise SpecError(f"{options.model} takes inputs of shape {tuple(shape)}, {options.on} has {data.shape}")
    net = net.to(own_device(options.device))
    methods = timed(read_methods(options.methods.split(",")), options.timeout)
    certifier = Certifier(net.double() if options.float64 else net, shape, methods)
    make_folder(options.out)
    records = _records(options, certifier, data, specs)
    if records is None:
        return
    name = options.model.stem
    title, summaries = f"Certified robustness of {name}", {name: summarize(records)}
    settings = settings_line(options, specs, certifier)
    write_text(options.out / "summary.json", json.dumps(asdict(summaries[name]), indent=1) + "\n")
    write_text(options.out / "results.csv", image_table(records).as_csv())
    write_text(options.out / "report.md", summary_markdown(title, summaries, settings))
    print(text_table(summaries))
    if options.proof:
        _write_proofs(options, certifier, data, specs, records)
    path = options.out / "report.html"
    try:
        load_pyplot()
    except MissingDependencyError as error:
        print(f"cure: {path} is left out: {error}", file=sys.stderr)
        return
    curves = {name: certified_curves(certifier, data, specs, CURVE_FACTORS, True)} if options.curves else {}
    write_report(path, Page(title, summaries, settings, {name: records}, CURVE_FACTORS, curves))
    print(f"report: {path}")


def _records(
    options: argparse.Namespace, certifier: Certifier, data: ImageData, specs: Sequence[SetSpec]
) -> list[Record] | None:
    """All records; None where this process did a part, and another, or another command, puts the parts together."""
    path = options.out / "results.jsonl"
    together = Ranks.started()
    if together and options.shard:
        raise SpecError(f"--shard {options.shard} is for processes that know nothing of each other; torchrun's do")
    if not together and not options.shard:
        return certify_dataset(certifier, data, specs, path, progress=True)
    shard = Ranks() if together else Shard.read(options.shard)
    records = certify_shard(certifier, data, specs, path, shard, progress=True)
    if records is None and not together:
        print(f"part {shard.name} is in {options.out}; when all are there: cure merge {options.out}")
    return records


def _write_proofs(
    options: argparse.Namespace,
    certifier: Certifier,
    data: ImageData,
    specs: Sequence[SetSpec],
    records: Sequence[Record],
) -> None:
    """Search for proofs of what is proved, and say how many were found."""
    method = BranchAndBound(options.timeout)
    sets = {name: spec.build() for name, spec in zip(set_names(specs), specs, strict=True)}
    readable = {name: one for name, one in sets.items() if method.applies_to(one)}
    for name in sets.keys() - readable.keys():
        print(f"cure: {options.proof} leaves {name} out: only lp balls and boxes have proofs", file=sys.stderr)
    questions = [
        Question(f"{record.index} {name}", *data.batch(slice(record.index, record.index + 1)), one)
        for record in records
        for name, one in readable.items()
        if record.sets[name].status == "proved"
    ]
    if not questions:
        print(f"cure: {options.proof} is not written: nothing is proved of an lp ball", file=sys.stderr)
        return
    found = write_proofs(options.proof, certifier, questions, method, progress=True)
    print(f"proofs: {sum(found)} of {len(found)}, to be looked at by: cure check --proof {options.proof}")
