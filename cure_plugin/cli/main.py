"""The arguments of ``cure`` and its commands, from ``train`` to ``demo``."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from cure_plugin.certification import CASCADE, METHODS
from cure_plugin.cli.bench import bench_check, bench_pack
from cure_plugin.cli.certify import certify
from cure_plugin.cli.compare import compare
from cure_plugin.cli.doctor import doctor, versions
from cure_plugin.cli.export import export
from cure_plugin.cli.merge import merge
from cure_plugin.cli.report import report
from cure_plugin.cli.train import train
from cure_plugin.cli.verify import check, verify
from cure_plugin.cli.zoo import zoo
from cure_plugin.datasets import DATASETS
from cure_plugin.demo import SETS, run_demo
from cure_plugin.errors import CureError
from cure_plugin.export import encoding_names
from cure_plugin.nets import NETS
from cure_plugin.sets import kinds
from cure_plugin.training.recipe import Recipe, shipped_recipes
from cure_plugin.vnncomp.verifiers import VERIFIERS
from cure_plugin.vnncomp.vnnlib import VERSIONS

INTERRUPTED = 130

_EXAMPLES = {
    "train": "demo_cure epochs=4 --out out/net",
    "certify": "out/net/checkpoint.pt linf=0.1 l2=0.5 'R(10)' --images 100 --out out/certified",
    "merge": "out/part1 out/part2 --out out/certified",
    "compare": "out/a/results.jsonl out/b/results.jsonl --out out/compared",
    "export": "out/net/checkpoint.pt linf=8/255 --images 10 --out out/files",
    "verify": "out/files/instances.csv --verifier cure --out out/verified",
    "check": "out/files/instances.csv --counterexamples out/tool --out out/results.csv",
    "bench": "check benchmarks/cure_patch",
    "bench check": "benchmarks/cure_patch",
    "bench pack": "benchmarks/cure_patch out/roots/cure_patch",
    "report": "cure=out/a/checkpoint.pt linf=out/b/checkpoint.pt --out out/report",
    "sets": "",
    "zoo": "",
    "doctor": "",
    "demo": "--out out/demo",
}
"""Arguments that each command's help shows."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code.

    0: done. 2: an error, said on one line of standard error. 3: done, and a contradiction or a faulty benchmark was
    found. 130: interrupted.
    """
    try:
        options = _parsed(arguments)
        run: Callable[[argparse.Namespace], int | None] = options.run
        return run(options) or 0
    except CureError as error:
        print(f"cure: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cure: interrupted; train, certify, verify, report and demo resume where they stopped", file=sys.stderr)
        return INTERRUPTED


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()  # asks installed packages for their names, which may fail
    options, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in options or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]  # those after an option, which argparse leaves
    return options


class _Help(argparse.HelpFormatter):
    """Tells the defaults that say something; each line of an epilog is wrapped for itself, the example not at all."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or "")
        if told or not action.option_strings:
            return action.help
        listed = isinstance(action.default, (list, tuple))
        return f"{action.help} (default: {' '.join(action.default) if listed else action.default})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            line if line.startswith("example: ") else textwrap.fill(line, width, subsequent_indent="  ")
            for line in lines
        )


class _Command(argparse.ArgumentParser):
    """The parser of one command; ``more``: lines for its help, below the example."""

    def __init__(self, prog: str, more: Sequence[str] = (), **options: Any) -> None:
        arguments = _EXAMPLES[prog.removeprefix("cure ")]
        epilog = "\n".join([f"example: {prog} {arguments}".rstrip(), *more])
        super().__init__(prog=prog, formatter_class=_Help, epilog=epilog, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cure",
        description="Multi-norm certified training on auto_LiRPA. Exit code 0: done; 2: an error, said on one line; "
        "3: done, and a contradiction or a faulty benchmark was found; 130: interrupted.",
        epilog="cure COMMAND --help shows an example of each",
    )
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)

    command = _add(
        commands,
        "train",
        "train a net by a recipe; a run that was stopped goes on where it was",
        ["", "recipes:", *_grouped(shipped_recipes()), "", f"keys of a recipe: {', '.join(_keys())}"],
    )
    command.add_argument("recipe", help="a .yaml file, or the name of a recipe below, e.g. small_mnist_small/scratch")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change, values as in YAML")
    _add_out(command, "folder for checkpoint.pt and training.jsonl")
    _add_device(command)
    _add_data(command)
    command.set_defaults(run=train)

    command = _add(commands, "certify", "certify a net for a list of sets and their union")
    command.add_argument("model", type=Path, help="our checkpoint, zoo:NAME, a state_dict (with --net) or an ONNX file")
    command.add_argument(
        "sets",
        nargs="+",
        metavar="SET",
        help="e.g. linf=8/255 l2=0.5 l1=1 'R(10)' patch=5x5 (cure sets tells the units; pixels are in [0, 1]), or a "
        ".yaml list of them",
    )
    command.add_argument("--net", choices=list(NETS), help="the net whose state_dict MODEL is")
    command.add_argument("--batch-norm", action="store_true", help="that net has BatchNorm")
    _add_test_images(command, 200)
    _add_device(command)
    command.add_argument(
        "--methods",
        default=",".join(method.name for method in CASCADE),
        help=f"of {', '.join(METHODS)}; comma-separated",
    )
    command.add_argument(
        "--timeout", type=float, default=15, metavar="SECONDS", help="of splits of neurons, seconds per image and set"
    )
    command.add_argument(
        "--proof", type=Path, metavar="FILE", help=".npz to write proofs to of what is proved, for cure check --proof"
    )
    command.add_argument("--float64", action="store_true", help="bound in double precision")
    command.add_argument("--curves", action="store_true", help="plot also 0 to 2 times each set's size; takes longer")
    command.add_argument(
        "--shard", metavar="NUMBER/COUNT", help="do one part of several, as 1/4; torchrun's processes need no number"
    )
    _add_out(command, "folder for results.jsonl and .csv, summary.json and reports")
    command.set_defaults(run=certify)

    command = _add(commands, "merge", "put the parts of cure certify --shard together")
    command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what --out of the parts was")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default: the first")
    command.set_defaults(run=merge)

    command = _add(commands, "compare", "compare two results files of the same images and sets, by McNemar's test")
    command.add_argument("first", type=Path, metavar="A.jsonl", help="results.jsonl of cure certify")
    command.add_argument("second", type=Path, metavar="B.jsonl", help="the other net's")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="folder for compare.md and compare.csv")
    command.set_defaults(run=compare)

    command = _add(commands, "export", "write a net as ONNX, and a VNNLIB property per image and set")
    command.add_argument("model", type=Path, help="our checkpoint (.pt) or zoo:NAME")
    command.add_argument("sets", nargs="*", metavar="SET", help="sets to write instances for, as for certify")
    _add_test_images(command, 10)
    command.add_argument("--encoding", choices=encoding_names(), help="default: the tightest of each set")
    command.add_argument("--vnnlib", choices=list(VERSIONS), default="1.0", help="version to write")
    command.add_argument("--gz", action="store_true", help="compress the properties")
    command.add_argument(
        "--timeout", type=float, default=300, metavar="SECONDS", help="of the verifier, seconds per instance"
    )
    _add_out(command, "folder for onnx/, vnnlib/ and instances.csv")
    command.set_defaults(run=export)

    command = _add(commands, "verify", "ask a verifier about every line of an instances.csv, and replay what it finds")
    command.add_argument(
        "instances", type=Path, metavar="INSTANCES.csv", help="lines of onnx,vnnlib,seconds; paths relative to it"
    )
    command.add_argument(
        "--verifier", required=True, help=f"{', '.join(VERIFIERS)}, or a .yaml file that describes one"
    )
    command.add_argument("--jobs", type=int, default=1, help="instances at once")
    _add_out(command, "folder for results.csv and counterexamples/")
    command.set_defaults(run=verify)

    command = _add(commands, "check", "replay a tool's counterexamples on onnxruntime, or look at proofs")
    command.add_argument("instances", type=Path, nargs="?", metavar="INSTANCES.csv", help="as for verify")
    command.add_argument("--counterexamples", type=Path, metavar="FOLDER", help="folder of the tool's results files")
    command.add_argument("--out", type=Path, default=Path("results.csv"), metavar="FILE", help="file to write")
    command.add_argument("--proof", type=Path, metavar="FILE", help="proofs of cure certify, instead of instances")
    command.add_argument("--onnx", type=Path, metavar="FILE", help="the net that they must be of")
    command.set_defaults(run=check)

    command = _add(commands, "bench", "check or pack VNN-COMP benchmark roots")
    bench = command.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)
    command = _add(bench, "check", "look at a generated root as the platform would")
    command.add_argument("folder", type=Path, metavar="ROOT", help="benchmark root, after its generate_properties.py")
    command.set_defaults(run=bench_check)
    command = _add(bench, "pack", "copy a root with what its generator needs beside numpy, onnx and pyyaml")
    command.add_argument("folder", type=Path, metavar="ROOT", help="benchmark root; what was drawn in it comes along")
    command.add_argument("out", type=Path, metavar="OUT", help="folder to write; none may be there yet")
    command.set_defaults(run=bench_pack)

    command = _add(commands, "report", "certify trained nets and compare them on an HTML page")
    command.add_argument("models", nargs="+", metavar="name=checkpoint.pt", help="nets to compare; files or zoo:NAME")
    command.add_argument("--sets", nargs="+", default=list(SETS), metavar="SET", help="as for certify")
    _add_test_images(command, 200)
    _add_out(command, "folder for report.html and results")
    command.set_defaults(run=report)

    command = _add(commands, "sets", "list the known perturbation sets, their parameters and units")
    command.set_defaults(run=_sets)

    command = _add(commands, "zoo", "list the trained nets inside; zoo:NAME is one for every command")
    command.set_defaults(run=zoo)

    command = _add(commands, "doctor", "print what a bug report needs: versions, hardware, settings, what is missing")
    command.set_defaults(run=doctor)

    command = _add(commands, "demo", "the whole way on shipped data: train, certify, export, report")
    command.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="FOLDER", help="an earlier run there is reused"
    )
    command.add_argument("--quick", action="store_true", help="two epochs and 20 images: does everything run?")
    command.set_defaults(run=_demo)
    return parser


def _add(commands: Any, name: str, what: str, more: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A command; ``what`` it does is told in the list of commands and in its own help."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}.", more=more
    )
    return command


def _add_out(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=what)


def _keys() -> list[str]:
    """The keys of a recipe, with their defaults where these are one word."""
    shown = []
    for key in fields(Recipe):
        told = key.default is not MISSING and key.default not in ((), "")
        shown.append(f"{key.name}={yaml.safe_dump(key.default).split()[0]}" if told else key.name)
    return shown


def _grouped(names: Sequence[str]) -> list[str]:
    """``file/method`` names in one line per file."""
    groups: dict[str, list[str]] = {}
    for name in names:
        file, _, method = name.partition("/")
        groups.setdefault(file, []).append(method)
    return [f"{file}/{{{', '.join(methods)}}}" if methods[0] else file for file, methods in groups.items()]


def _add_test_images(command: argparse.ArgumentParser, count: int) -> None:
    command.add_argument("--on", default="mnist-slice", choices=list(DATASETS), help="data set (test split)")
    command.add_argument(
        "--images", type=int, default=count, metavar="COUNT", help="how many test images, from the first"
    )
    _add_data(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to compute")


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", type=Path, metavar="FOLDER", help="data root in torchvision's layout (default: $CURE_DATA)"
    )


def _demo(options: argparse.Namespace) -> None:
    run_demo(options.out, print, options.quick)


def _sets(options: argparse.Namespace) -> None:
    known = kinds().values()
    width = max(len(kind.name) for kind in known)
    for kind in known:
        print(f"{kind.name:<{width}}  {kind.parameters}")
    print("A set is written name=parameters, e.g. linf=8/255 or patch=5x5; geometric ones without name=, e.g. R(10).")
