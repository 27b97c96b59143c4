"""``cure train | certify | export | report | sets | demo``: arguments, progress, exit codes (0 done, 2 bad input)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn

from cure_plugin.certification import Certifier, certify_dataset, summarize
from cure_plugin.certification.certifier import METHODS
from cure_plugin.certification.curves import certified_curves
from cure_plugin.checkpoint import load_net, load_state_dict
from cure_plugin.datasets import DATASETS, load_data
from cure_plugin.demo import CURVE_FACTORS, CURVE_METHODS, SETS, run_demo
from cure_plugin.errors import CureError, OutputError, SpecError
from cure_plugin.export import export_onnx, read_onnx_net, write_vnnlib
from cure_plugin.export.replay import parity
from cure_plugin.export.vnnlib import box_instance
from cure_plugin.files import write_text
from cure_plugin.nets import NETS, NetSpec
from cure_plugin.report import text_table, write_report
from cure_plugin.sets import SetSpec, kinds, read_sets, set_spec
from cure_plugin.training import Trainer, load_recipe
from cure_plugin.training.recipe import shipped_recipes

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors on purpose become one line on standard error and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except CureError as error:
        print(f"cure: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cure: interrupted; train, certify, report and demo resume where they stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cure", description="Multi-norm certified training on auto_LiRPA.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a net by a recipe")
    train.add_argument("recipe", help=f"a .yaml file or one of: {', '.join(shipped_recipes())}")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    train.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and training.jsonl")
    _add_data(train)
    train.set_defaults(run=_train)

    certify = commands.add_parser("certify", help="certify a net for a list of sets and their union")
    certify.add_argument("model", type=Path, help="our checkpoint, a state_dict (with --net) or a sequential ONNX file")
    certify.add_argument(
        "sets", nargs="+", metavar="SET", help="e.g. linf=8/255 l2=0.5 l1=1 'R(10)' patch=5x5, or a .yaml list of them"
    )
    certify.add_argument("--net", choices=list(NETS), help="the net whose state_dict MODEL is")
    certify.add_argument("--batch-norm", action="store_true", help="that net has BatchNorm")
    _add_test_images(certify, 200)
    certify.add_argument("--methods", default=",".join(METHODS), help="bound methods, comma-separated")
    certify.add_argument("--float64", action="store_true", help="bound in double precision")
    certify.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and summary.json")
    certify.set_defaults(run=_certify)

    export = commands.add_parser("export", help="write ONNX and VNNLIB files")
    export.add_argument("model", type=Path, help="our checkpoint (.pt)")
    export.add_argument("sets", nargs="*", metavar="linf=eps", help="linf sets to write VNNLIB instances for")
    _add_test_images(export, 10)
    export.add_argument("--out", type=Path, required=True, help="folder for model.onnx and vnnlib/")
    export.set_defaults(run=_export)

    report = commands.add_parser("report", help="an HTML page that compares trained nets")
    report.add_argument("models", nargs="+", metavar="name=checkpoint.pt", help="nets to compare")
    report.add_argument("--sets", nargs="+", default=list(SETS), metavar="norm=eps")
    _add_test_images(report, 200)
    report.add_argument("--out", type=Path, required=True, help="folder for report.html and results")
    report.set_defaults(run=_report)

    sets = commands.add_parser("sets", help="list the known perturbation sets and their parameters")
    sets.set_defaults(run=_sets)

    demo = commands.add_parser("demo", help="the whole way on shipped data: train, certify, export, report")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder; an earlier run there is reused")
    demo.set_defaults(run=lambda options: run_demo(options.out, print))
    return parser


def _add_test_images(command: argparse.ArgumentParser, count: int) -> None:
    command.add_argument("--on", default="mnist-slice", choices=list(DATASETS), help="data set (test split)")
    command.add_argument("--images", type=int, default=count, help="how many test images, from the first")
    _add_data(command)


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", type=Path, help="data root in torchvision's layout (default: $CURE_DATA)")


def _train(options: argparse.Namespace) -> None:
    overrides = {}
    for text in options.overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise SpecError(f"an override is written key=value, got {text!r}")
        overrides[key] = value
    recipe = load_recipe(options.recipe, overrides)
    trainer = Trainer(recipe, load_data(recipe.data, True, options.data), options.out)
    if trainer.epochs_done:
        print(f"found {trainer.epochs_done} of {recipe.epochs} epochs in {options.out}")
    trainer.run(progress=True)
    write_text(options.out / "training.jsonl", "".join(json.dumps(entry) + "\n" for entry in trainer.history))
    print(f"trained: {options.out / 'checkpoint.pt'}")


def _load_model(path: Path, named: NetSpec | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    if named is not None:
        return load_state_dict(path, named), named.input_shape
    if path.suffix == ".onnx":
        return read_onnx_net(path)
    spec, net = load_net(path)
    return net, spec.input_shape


def _sets_of(text: str) -> list[SetSpec]:
    """The set that an argument describes, or those in the YAML file it names."""
    return read_sets(text) if text.endswith((".yaml", ".yml")) else [set_spec(text)]


def _certify(options: argparse.Namespace) -> None:
    specs = [spec for text in options.sets for spec in _sets_of(text)]
    data = load_data(options.on, False, options.data).first(options.images)
    named = NetSpec(options.net, data.shape, data.classes, options.batch_norm) if options.net else None
    net, shape = _load_model(options.model, named)
    if tuple(shape) != data.shape:
        raise SpecError(f"{options.model} takes inputs of shape {tuple(shape)}, {options.on} has {data.shape}")
    certifier = Certifier(net.double() if options.float64 else net, shape, options.methods.split(","))
    _make_folder(options.out)
    records = certify_dataset(certifier, data, specs, options.out / "results.jsonl", progress=True)
    summary = summarize(records)
    write_text(options.out / "summary.json", json.dumps(asdict(summary), indent=1) + "\n")
    print(text_table({options.model.stem: summary}))


def _export(options: argparse.Namespace) -> None:
    spec, net = load_net(options.model)
    sets = [set_spec(text) for text in options.sets]
    if any(one.name != "linf" for one in sets):
        raise SpecError(f"VNNLIB 1.0 holds boxes only: give linf sets, got {options.sets}")
    data = load_data(options.on, False, options.data).first(options.images)
    if spec.input_shape != data.shape:
        raise SpecError(f"{options.model} takes inputs of shape {spec.input_shape}, {options.on} has {data.shape}")
    path = options.out / "model.onnx"
    export_onnx(net, spec.input_shape, path)
    x, y = data.batch(slice(0, len(data)))
    for one in sets:
        for index in range(len(data)):
            instance = box_instance(x[index], int(y[index]), spec.classes, one.build())
            target = options.out / "vnnlib" / f"{str(one).replace('=', '_').replace('/', '-')}_{index}.vnnlib"
            write_vnnlib(target, instance, f"{options.on} test image {index}, {one}")
    print(f"wrote {path} (largest difference to PyTorch {parity(net, path, x):.1e})")


def _report(options: argparse.Namespace) -> None:
    specs = [set_spec(text) for text in options.sets]
    data = load_data(options.on, False, options.data).first(options.images)
    summaries, curves = {}, {}
    for text in options.models:
        name, separator, path = text.partition("=")
        if not separator:
            raise SpecError(f"a net is written name=checkpoint.pt, got {text!r}")
        if name in summaries:
            raise SpecError(f"two nets are named {name!r}; give each a name of its own")
        net, shape = _load_model(Path(path))
        results = options.out / f"{name}.jsonl"
        _make_folder(options.out)
        summaries[name] = summarize(certify_dataset(Certifier(net, shape), data, specs, results, progress=True))
        curves[name] = certified_curves(Certifier(net, shape, CURVE_METHODS), data, specs, CURVE_FACTORS, True)
    write_report(options.out / "report.html", "Certified accuracy", summaries, CURVE_FACTORS, curves, {})
    print(text_table(summaries))
    print(f"report: {options.out / 'report.html'}")


def _sets(options: argparse.Namespace) -> None:
    for kind in kinds().values():
        print(f"{kind.name:<8} {kind.parameters}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create folder {path}: {error}; choose a writable place") from error
