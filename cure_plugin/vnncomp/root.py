"""A benchmark root on disk: what its generator draws from, and the script itself."""

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

GENERATOR = "generate_properties.py"

_SCRIPT = '''\
"""Draw this benchmark's instances: ``python generate_properties.py SEED``; needs numpy, onnx and pyyaml.

It runs the modules of cure_plugin in ``vendor``, where ``cure bench pack`` has put them, else an installed cure_plugin.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "vendor"))
sys.dont_write_bytecode = True

try:
    from cure_plugin.errors import CureError
    from cure_plugin.vnncomp.generate import generate
except ImportError as error:
    needs = "numpy, onnx, pyyaml, and cure_plugin: pip install cure_plugin, or pack this root with cure bench pack"
    sys.exit(f"{error}; needs {needs}")

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
    write_generator(folder)


def write_generator(folder: Path) -> None:
    """The script that draws the instances.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(folder / GENERATOR, _SCRIPT)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A compressed .npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # type: ignore[arg-type]  # numpy's own stub
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
