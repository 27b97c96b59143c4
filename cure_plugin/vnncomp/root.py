"""A benchmark root on disk: what its generator needs, with copies of the modules that it runs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from cure_plugin.files import write_atomically, write_text
from cure_plugin.vnncomp.generate import Root
from cure_plugin.vnncomp.graphs import write_model

VENDORED = (
    "errors.py",
    "files.py",
    "vnncomp/__init__.py",
    "vnncomp/fixed_point.py",
    "vnncomp/generate.py",
    "vnncomp/graphs.py",
    "vnncomp/instances.py",
    "vnncomp/property.py",
    "vnncomp/questions.py",
    "vnncomp/vnnlib.py",
)
"""Modules of the package that a generator runs; they need numpy, onnx and pyyaml."""

_PACKAGE = Path(__file__).resolve().parents[1]

_GENERATOR = '''\
"""Draw this benchmark's instances: ``python generate_properties.py SEED``; needs numpy, onnx and pyyaml."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "vendor"))
sys.dont_write_bytecode = True

from cure_plugin.errors import CureError  # noqa: E402
from cure_plugin.vnncomp.generate import generate  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        sys.exit("usage: python generate_properties.py SEED, a whole number >= 0")
    try:
        print(f"{generate(HERE, int(sys.argv[1]))} instances written below {HERE}")
    except (CureError, ValueError) as error:
        sys.exit(str(error))
'''


def write_root(folder: Path, root: Root, readme: str) -> None:
    """Write what ``generate_properties.py`` draws from, and the script itself.

    Raises:
        OutputError: a file cannot be written.
    """
    write_text(folder / "spec.yaml", yaml.safe_dump(root.spec, sort_keys=False))
    write_text(folder / "candidates.json", "[\n" + ",\n".join(map(json.dumps, root.candidates)) + "\n]\n")
    write_arrays(folder / "candidates.npz", root.arrays)
    for name, model in root.nets.items():
        write_model(model, folder / "onnx" / name)
    write_text(folder / "README.md", readme)
    write_vendored(folder)


def write_vendored(folder: Path) -> None:
    """The generator's script, and copies of the package's modules that it runs."""
    write_text(folder / "generate_properties.py", _GENERATOR)
    write_text(folder / "vendor/cure_plugin/__init__.py", '"""Copies of those modules that the generator runs."""\n')
    for name in VENDORED:
        write_text(folder / "vendor/cure_plugin" / name, (_PACKAGE / name).read_text())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A compressed .npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # type: ignore[arg-type]  # numpy's own stub
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
