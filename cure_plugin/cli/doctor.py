"""``cure doctor`` and ``cure --version``: what is installed, and what this machine is."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import auto_LiRPA
import torch

import cure_plugin
from cure_plugin.bounds.hooks import HOOKS, installed
from cure_plugin.datasets import DATASETS

_PACKAGES = ("numpy", "onnx", "onnxruntime", "pyyaml", "cattrs", "tqdm", "appdirs", "packaging")

_OPTIONAL = {
    "matplotlib": "plots and HTML pages: pip install 'cure-plugin[plot]'",
    "maraboupy": "Marabou as a second opinion, below Python 3.12: pip install 'cure-plugin[verify]'",
    "vnnlib": "checks of written properties: pip install 'cure-plugin[verify]'",
    "pillow": "TinyImageNet: pip install pillow",
}

_VARIABLES = ("CURE_DATA", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def versions() -> str:
    """Ours, auto_LiRPA's and torch's, in a line."""
    return f"cure_plugin {cure_plugin.__version__}, auto_LiRPA {auto_LiRPA.__version__}, torch {torch.__version__}"


def doctor(options: argparse.Namespace) -> None:
    """Print what a bug report needs."""
    for topic, text in _findings():
        print(f"{topic:<22} {text}")


def _findings() -> Iterator[tuple[str, str]]:
    yield "cure_plugin", f"{cure_plugin.__version__} in {Path(cure_plugin.__file__).parent}"
    yield "auto_LiRPA", f"{auto_LiRPA.__version__} in {Path(auto_LiRPA.__file__).parent}"
    hooks = {f"{owner.__name__}.{method}": installed(owner, method) for owner, method, _ in HOOKS}
    absent = [name for name, there in hooks.items() if not there]
    yield "hooks", f"missing in {', '.join(absent)}: another package replaced them" if absent else "in place"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {_devices()}"
    yield "python", f"{platform.python_version()} in {sys.prefix}"
    yield "machine", f"{platform.platform()}, {os.cpu_count()} cores, {_memory()}"
    for name in _PACKAGES:
        yield name, _version(name) or "missing, and needed: install cure-plugin anew"
    for name, purpose in _OPTIONAL.items():
        yield name, _version(name) or f"missing; for {purpose}"
    for name in _VARIABLES:
        yield name, os.environ.get(name, "not set")
    root = os.environ.get("CURE_DATA")
    for name, (folder, _, _) in DATASETS.items():
        if folder:
            there = root is not None and (Path(root) / folder).is_dir()
            yield f"data {name}", "there" if there else f"not in CURE_DATA ({folder} is looked for)"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "no CUDA device"


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # no POSIX, or it does not say
        return "memory unknown"
    return f"{pages * size / 2**30:.1f} GiB"
