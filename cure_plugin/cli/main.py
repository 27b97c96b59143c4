"""``cure train | certify | compare | export | verify | check | bench | report | sets | demo``: the arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cure_plugin import __version__
from cure_plugin.certification import CASCADE, METHODS
from cure_plugin.cli.bench import bench_check, bench_pack
from cure_plugin.cli.certify import certify
from cure_plugin.cli.compare import compare
from cure_plugin.cli.export import export
from cure_plugin.cli.report import report
from cure_plugin.cli.train import train
from cure_plugin.cli.verify import check, verify
from cure_plugin.datasets import DATASETS
from cure_plugin.demo import SETS, run_demo
from cure_plugin.errors import CureError
from cure_plugin.export import encoding_names
from cure_plugin.nets import NETS
from cure_plugin.sets import kinds
from cure_plugin.training.recipe import shipped_recipes
from cure_plugin.vnncomp.verifiers import VERIFIERS
from cure_plugin.vnncomp.vnnlib import VERSIONS

INTERRUPTED = 130

_EXAMPLES = {
    "train": "demo_cure epochs=4 --out out/net",
    "certify": "out/net/checkpoint.pt linf=0.1 l2=0.5 'R(10)' --images 100 --out out/certified",
    "compare": "out/a/results.jsonl out/b/results.jsonl --out out/compared",
    "export": "out/net/checkpoint.pt linf=8/255 --images 10 --out out/files",
    "verify": "out/files/instances.csv --verifier cure --out out/verified",
    "check": "out/files/instances.csv --counterexamples out/tool --out out/results.csv",
    "bench check": "benchmarks/cure_patch",
    "bench pack": "benchmarks/cure_patch out/roots/cure_patch",
    "report": "cure=out/a/checkpoint.pt linf=out/b/checkpoint.pt --out out/report",
    "sets": "",
    "demo": "--out out/demo",
}
"""Arguments that each command's help shows."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code.

    0: done. 2: an error, said on one line of standard error. 3: done, and a contradiction or a faulty benchmark was
    found. 130: interrupted.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in options or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]  # those after an option, which argparse leaves
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return run(options) or 0
    except CureError as error:
        print(f"cure: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cure: interrupted; train, certify, verify, report and demo resume where they stopped", file=sys.stderr)
        return INTERRUPTED


class _Help(argparse.HelpFormatter):
    """Tells the defaults that say something, and leaves the example on one line, to copy."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or "")
        return action.help if told or not action.option_strings else f"{action.help} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example: ") else super()._fill_text(text, width, indent)


class _Command(argparse.ArgumentParser):
    """The parser of one command."""

    def __init__(self, prog: str, **options: Any) -> None:
        arguments = _EXAMPLES.get(prog.removeprefix("cure "))
        epilog = None if arguments is None else f"example: {prog} {arguments}".rstrip()
        super().__init__(prog=prog, formatter_class=_Help, epilog=epilog, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cure",
        description="Multi-norm certified training on auto_LiRPA. Exit code 0: done; 2: an error, said on one line; "
        "3: done, and a contradiction or a faulty benchmark was found; 130: interrupted.",
        epilog="cure COMMAND --help shows an example of each",
    )
    parser.add_argument("--version", action="version", version=f"cure_plugin {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)

    command = commands.add_parser("train", help="train a net by a recipe")
    command.add_argument("recipe", help=f"a .yaml file or one of: {', '.join(_grouped(shipped_recipes()))}")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    command.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and training.jsonl")
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to train")
    _add_data(command)
    command.set_defaults(run=train)

    command = commands.add_parser(
        "certify",
        help="certify a net for a list of sets and their union",
    )
    command.add_argument("model", type=Path, help="our checkpoint, a state_dict (with --net) or an ONNX file")
    command.add_argument(
        "sets", nargs="+", metavar="SET", help="e.g. linf=8/255 l2=0.5 l1=1 'R(10)' patch=5x5, or a .yaml list of them"
    )
    command.add_argument("--net", choices=list(NETS), help="the net whose state_dict MODEL is")
    command.add_argument("--batch-norm", action="store_true", help="that net has BatchNorm")
    _add_test_images(command, 200)
    command.add_argument(
        "--methods",
        default=",".join(method.name for method in CASCADE),
        help=f"of {', '.join(METHODS)}; comma-separated",
    )
    command.add_argument("--float64", action="store_true", help="bound in double precision")
    command.add_argument("--curves", action="store_true", help="plot also 0 to 2 times each set's size; takes longer")
    command.add_argument("--out", type=Path, required=True, help="folder for results, summary.json and reports")
    command.set_defaults(run=certify)

    command = commands.add_parser(
        "compare",
        help="two results files of the same images and sets, with a test",
    )
    command.add_argument("first", type=Path, metavar="A.jsonl", help="results.jsonl of cure certify")
    command.add_argument("second", type=Path, metavar="B.jsonl", help="the other net's")
    command.add_argument("--out", type=Path, help="folder for compare.md and compare.csv")
    command.set_defaults(run=compare)

    command = commands.add_parser(
        "export",
        help="write ONNX and VNNLIB files",
    )
    command.add_argument("model", type=Path, help="our checkpoint (.pt)")
    command.add_argument("sets", nargs="*", metavar="SET", help="sets to write instances for, as for certify")
    _add_test_images(command, 10)
    command.add_argument("--encoding", choices=encoding_names(), help="default: the tightest of each set")
    command.add_argument("--vnnlib", choices=list(VERSIONS), default="1.0", help="version to write")
    command.add_argument("--gz", action="store_true", help="compress the properties")
    command.add_argument("--timeout", type=float, default=300, help="seconds per instance")
    command.add_argument("--out", type=Path, required=True, help="folder for onnx/, vnnlib/ and instances.csv")
    command.set_defaults(run=export)

    command = commands.add_parser(
        "verify",
        help="ask a verifier about every line of an instances.csv",
    )
    command.add_argument("instances", type=Path, metavar="INSTANCES.csv", help="onnx,vnnlib,timeout; paths beside it")
    command.add_argument(
        "--verifier", required=True, help=f"{', '.join(VERIFIERS)}, or a .yaml file that describes one"
    )
    command.add_argument("--jobs", type=int, default=1, help="instances at once")
    command.add_argument("--out", type=Path, required=True, help="folder for results.csv and counterexamples/")
    command.set_defaults(run=verify)

    command = commands.add_parser(
        "check",
        help="replay a tool's counterexamples on onnxruntime",
    )
    command.add_argument("instances", type=Path, metavar="INSTANCES.csv", help="as for verify")
    command.add_argument("--counterexamples", type=Path, required=True, help="folder of the tool's results files")
    command.add_argument("--out", type=Path, default=Path("results.csv"), help="file to write")
    command.set_defaults(run=check)

    command = commands.add_parser("bench", help="VNN-COMP benchmark roots")
    bench = command.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)
    command = bench.add_parser(
        "check",
        help="look at a generated root as the platform would",
    )
    command.add_argument("folder", type=Path, metavar="DIR")
    command.set_defaults(run=bench_check)
    command = bench.add_parser(
        "pack",
        help="copy a root with what its generator needs beside numpy, onnx and pyyaml",
    )
    command.add_argument("folder", type=Path, metavar="ROOT", help="benchmark root; what was drawn in it comes along")
    command.add_argument("out", type=Path, metavar="OUT", help="folder to write; none may be there yet")
    command.set_defaults(run=bench_pack)

    command = commands.add_parser(
        "report",
        help="an HTML page that compares trained nets",
    )
    command.add_argument("models", nargs="+", metavar="name=checkpoint.pt", help="nets to compare")
    command.add_argument("--sets", nargs="+", default=list(SETS), metavar="SET", help="as for certify")
    _add_test_images(command, 200)
    command.add_argument("--out", type=Path, required=True, help="folder for report.html and results")
    command.set_defaults(run=report)

    command = commands.add_parser("sets", help="list the known perturbation sets and their parameters")
    command.set_defaults(run=_sets)

    command = commands.add_parser(
        "demo",
        help="the whole way on shipped data: train, certify, export, report",
    )
    command.add_argument("--out", type=Path, default=Path("out/demo"), help="folder; an earlier run there is reused")
    command.set_defaults(run=_demo)
    return parser


def _grouped(names: Sequence[str]) -> list[str]:
    """``file/method`` names in one entry per file."""
    groups: dict[str, list[str]] = {}
    for name in names:
        file, _, method = name.partition("/")
        groups.setdefault(file, []).append(method)
    return [f"{file}/{{{','.join(methods)}}}" if methods[0] else file for file, methods in groups.items()]


def _add_test_images(command: argparse.ArgumentParser, count: int) -> None:
    command.add_argument("--on", default="mnist-slice", choices=list(DATASETS), help="data set (test split)")
    command.add_argument("--images", type=int, default=count, help="how many test images, from the first")
    _add_data(command)


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", type=Path, help="data root in torchvision's layout (default: $CURE_DATA)")


def _demo(options: argparse.Namespace) -> None:
    run_demo(options.out, print)


def _sets(options: argparse.Namespace) -> None:
    for kind in kinds().values():
        print(f"{kind.name:<8} {kind.parameters}")
