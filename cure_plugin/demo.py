"""The main job on the shipped data: train for the union, certify, export, check outside, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cure_plugin.attacks import find_counterexample
from cure_plugin.certification import Certifier, Record, Summary, certify_dataset, summarize
from cure_plugin.certification.curves import certified_curves
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.errors import MissingDependencyError
from cure_plugin.export import encode, onnx_model, read_query, write_vnnlib
from cure_plugin.export.marabou import ask_marabou
from cure_plugin.export.parity import RuntimeNet, parity
from cure_plugin.files import write_text
from cure_plugin.json_files import plain, write_lines
from cure_plugin.report import Example, Page, text_table, write_report
from cure_plugin.sets import SetSpec, set_spec
from cure_plugin.training import Recipe, Trainer, load_recipe
from cure_plugin.vnncomp.graphs import write_model
from cure_plugin.vnncomp.instances import Instance, write_instances
from cure_plugin.vnncomp.model_file import load_network
from cure_plugin.vnncomp.query import Query
from cure_plugin.vnncomp.vnnlib import vnnlib_text

RECIPES = {"union": "demo_union", "linf": "demo_linf"}
"""Method -> recipe, trained with the same data, net and epochs."""

_QUICK = {"epochs": 2, "ramp_epochs": 1}
"""Changes to recipes where all that counts is that everything runs."""

SETS = ("linf=0.1", "l2=0.5", "l1=1.0")
"""The paper's MNIST radii."""

_SPECS = tuple(map(set_spec, SETS))

CERTIFICATION_METHODS = ("IBP", "lipschitz", "CROWN-IBP", "CROWN")
CURVE_METHODS = CERTIFICATION_METHODS
_FACTORS = tuple(step / 4 for step in range(7))
_CURVE_IMAGES = 100
EXPORTED_PER_STATUS = 4
MARABOU_TIMEOUT = 20

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Method:
    """A trained net and its verdicts."""

    net: nn.Sequential
    certifier: Certifier
    records: list[Record]
    summary: Summary


def run_demo(folder: Path, say: Say, quick: bool = False, progress: bool = True) -> dict[str, Any]:
    """Do everything, resuming or reusing what ``folder`` already holds; returns ``summary.json``'s content.

    Args:
        folder: output folder.
        say: receives a line of text for the reader now and then.
        quick: two epochs and 20 test images in place of 200: does everything run?
        progress: show bars on standard error.
    """
    started = time.perf_counter()
    images = 20 if quick else 200
    test = load_data("mnist-slice", train=False).first(images)
    methods = {}
    reused = [name for name in RECIPES if (folder / name / "checkpoint.pt").exists()]
    for name, recipe in RECIPES.items():
        net = _train(name, load_recipe(recipe, _QUICK if quick else None), folder / name, say, progress)
        certifier = Certifier(net, test.shape, CERTIFICATION_METHODS)
        records = certify_dataset(
            certifier, test, _SPECS, folder / name / "results.jsonl", progress=progress, label=f"certify {name}"
        )
        methods[name] = _Method(net, certifier, records, summarize(records))
    say(text_table({name: method.summary for name, method in methods.items()}))
    notes = _export_and_check(methods["union"], test, folder, say)
    curves = {
        name: certified_curves(
            Certifier(method.net, test.shape, CURVE_METHODS),
            test.first(min(images, _CURVE_IMAGES)),
            _SPECS,
            _FACTORS,
            progress,
            f"curves {name}",
        )
        for name, method in methods.items()
    }
    shown = _shown(methods, images)
    summary = {
        "images": images,
        "sets": list(SETS),
        "methods": {name: asdict(method.summary) for name, method in methods.items()},
        "outside": notes,
        "shown": shown,
        "reused": reused,
        "seconds": round(time.perf_counter() - started, 1),
    }
    lines = [{"method": name, **plain(one)} for name, method in methods.items() for one in method.records]
    write_lines(folder / "results.jsonl", lines)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_report(
        folder / "report.html",
        Page(
            "cure_plugin demo: one net for linf, l2 and l1",
            {name: method.summary for name, method in methods.items()},
            lead=shown,
            records={name: method.records for name, method in methods.items()},
            factors=_FACTORS,
            curves=curves,
            examples=_examples(methods["union"], test),
            notes=notes,
        ),
    )
    say(shown)
    say(f"report: {folder / 'report.html'} ({summary['seconds']:.0f} s)")
    return summary


def _shown(methods: Mapping[str, _Method], images: int) -> str:
    """What the demo showed, in one sentence."""
    trained, baseline = (100 * methods[name].summary.union for name in ("union", "linf"))
    return (
        f"Certified against {' and '.join(SETS)} at once: {trained:.1f} % of {images} test images where the net "
        f"is trained for their union, {baseline:.1f} % where it is trained for linf alone."
    )


def _train(name: str, recipe: Recipe, folder: Path, say: Say, progress: bool) -> nn.Sequential:
    trainer = Trainer(recipe, load_data(recipe.data, train=True), folder)
    if trainer.epochs_done >= recipe.epochs:
        say(f"{name}: reusing the trained net in {folder}")
    elif trainer.epochs_done:
        say(f"{name}: resuming after epoch {trainer.epochs_done} of {recipe.epochs}")
    else:
        say(f"{name}: training {recipe.epochs} epochs for {' and '.join(entry.set for entry in recipe.sets)}")
    return trainer.run(progress)


def _pick(records: list[Record], set_name: str, status: str, count: int) -> list[int]:
    """The first few correctly classified images with that status."""
    return [
        record.index
        for record in records
        if record.sets[set_name].status == status and record.sets[set_name].stage != "clean"
    ][:count]


def _export_and_check(method: _Method, test: ImageData, folder: Path, say: Say) -> list[str]:
    """Write ONNX and VNNLIB files, run them through tools that are not ours, and say what those found."""
    model_path = folder / "model.onnx"
    model = onnx_model(method.net, test.shape)
    write_model(model, model_path)
    x, y = test.batch(slice(0, len(test)))
    notes = [f"onnxruntime: largest difference to PyTorch's logits {parity(method.net, model_path, x):.1e}"]
    spec, outside = _SPECS[0], RuntimeNet(model_path)
    replayed = 0
    instances = []
    chosen = [
        (status, index)
        for status in ("proved", "falsified", "undecided")
        for index in _pick(method.records, spec.name, status, EXPORTED_PER_STATUS)
    ]
    for status, index in chosen:
        wanted = encode(model, x[index], int(y[index]), spec.build()).wanted
        path = folder / "vnnlib" / f"{spec.name}_{index}.vnnlib"
        write_vnnlib(path, wanted, comment=f"MNIST test image {index}, {spec}; our verdict: {status}")
        instances.append(Instance(model_path.name, f"vnnlib/{path.name}", 60))
        if status == "falsified":
            point = _counterexample(method, x, y, index, spec)
            logits = outside(point)[0].double().numpy()
            replayed += read_query(path).satisfied(point.flatten().double().numpy(), logits, tolerance=1e-6)
    write_instances(folder / "instances.csv", instances)
    falsified = sum(status == "falsified" for status, _ in chosen)
    notes.append(f"onnxruntime: {replayed} of {falsified} counterexamples replayed on the exported files")
    notes += _ask_marabou(method, test, model_path)
    for note in notes:
        say(note)
    return notes


def _counterexample(method: _Method, x: torch.Tensor, y: torch.Tensor, index: int, spec: SetSpec) -> torch.Tensor:
    """The attack's point for one falsified image, (1, C, H, W); the attack is run again, with a few seeds."""
    perturbation = spec.build()
    points = x[index : index + 1]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        found, points = find_counterexample(
            method.net, x[index : index + 1], y[index : index + 1], perturbation, generator=generator
        )
        if bool(found):
            break
    return points


def _ask_marabou(method: _Method, test: ImageData, model_path: Path) -> list[str]:
    """Marabou on an instance that we prove, and on a counterexample of ours as a box of one point."""
    spec = _SPECS[0]
    x, y = test.batch(slice(0, len(test)))
    cases = [(f"image {i}, {spec}", "proved", i, x[i], spec) for i in _pick(method.records, spec.name, "proved", 1)]
    for i in _pick(method.records, spec.name, "falsified", 1):
        point = _counterexample(method, x, y, i, spec)[0]
        cases.append((f"counterexample of image {i}, {spec}", "falsified", i, point, set_spec("linf=0")))
    notes, model = [], load_network(model_path)
    for name, verdict, index, image, box in cases:
        wanted = encode(model, image, int(y[index]), box.build()).wanted
        try:
            answer = ask_marabou(model_path, Query(vnnlib_text(wanted)), MARABOU_TIMEOUT)
        except MissingDependencyError as error:
            return [str(error)]
        notes.append(f"Marabou: {name}: {answer.result}; ours: {verdict} ({answer.seconds:.1f} s)")
    return notes


def _examples(method: _Method, test: ImageData) -> dict[str, list[Example]]:
    """A few images proved for every set, attacked, and undecided."""
    x, y = test.batch(slice(0, len(test)))
    proved = [record.index for record in method.records if record.union == "proved"][:6]
    examples = {
        "Proved for every set": [Example(x[i], None, f"image {i}, a {int(y[i])}") for i in proved],
        "Attacked": [],
        "Undecided": [],
    }
    for spec in _SPECS:
        for index in _pick(method.records, spec.name, "falsified", 2):
            point = _counterexample(method, x, y, index, spec)[0]
            with torch.no_grad():
                seen = int(method.net(point[None]).argmax(1))
            caption = f"image {index} ({spec}): a {int(y[index])}, attacked it reads {seen}"
            examples["Attacked"].append(Example(x[index], point, caption))
        for index in _pick(method.records, spec.name, "undecided", 2):
            margin = method.records[index].sets[spec.name].margin
            examples["Undecided"].append(Example(x[index], None, f"image {index} ({spec}): best bound {margin:.2f}"))
    return examples
