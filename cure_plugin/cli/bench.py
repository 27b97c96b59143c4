"""``cure bench check`` and ``cure bench pack``."""

from __future__ import annotations

import argparse

from cure_plugin.cli.verify import CONTRADICTION
from cure_plugin.errors import DataError
from cure_plugin.vnncomp.benchmark import faults
from cure_plugin.vnncomp.pack import pack


def bench_check(options: argparse.Namespace) -> int:
    """Say what is wrong with a benchmark root."""
    if not options.folder.is_dir():
        raise DataError(f"{options.folder} is no folder; give a benchmark root")
    found = faults(options.folder)
    for fault in found:
        print(fault)
    print(f"{options.folder}: {f'{len(found)} faults' if found else 'as the platform wants it'}")
    return CONTRADICTION if found else 0


def bench_pack(options: argparse.Namespace) -> None:
    """Copy a benchmark root with the modules that its generator runs."""
    pack(options.folder, options.out)
    print(f"{options.out}: packed; generate_properties.py in it needs numpy, onnx and pyyaml alone")
