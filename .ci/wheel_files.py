"""What a release holds, and does not: wheel_files.py WHEEL SDIST"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "cure_plugin"
WANTED = ("recipes", "datasets/mnist_slice", "zoo")
UNWANTED = ("tests", "benchmarks", "examples", "docs", ".ci")


def main(wheel: str, sdist: str) -> int:
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"cure_plugin/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    for folder in WANTED:
        files = (path for path in (PACKAGE / folder).iterdir() if path.is_file())
        expected |= {f"cure_plugin/{path.relative_to(PACKAGE)}" for path in files}
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    missing = sorted(expected - inside) + sorted(expected - source)
    foreign = sorted(name for name in inside if name.split("/")[0] in UNWANTED)
    foreign += sorted({top for name in source if (top := name.split("/")[0]) in UNWANTED})
    print(f"wheel: {len(inside)} files, {Path(wheel).stat().st_size / 2**20:.1f} MB; sdist: {len(source)} files")
    for name in missing:
        print(f"missing: {name}")
    for name in foreign:
        print(f"should not be there: {name}")
    return 1 if missing or foreign else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
