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
