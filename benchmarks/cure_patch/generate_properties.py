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
