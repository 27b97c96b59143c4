"""The package's own names: imported when asked for, known to type checkers, and clear about what is not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import cure_plugin

ROOMS = ("sets", "bounds.module", "attacks", "training", "certification", "export", "report", "cli")


def printed(code: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.splitlines()


def without(package: str, code: str) -> list[str]:
    """What code prints where a package is not installed."""
    return printed(f"import sys\nsys.modules[{package!r}] = None\n{code}")


def test_names_are_those_of_the_modules_they_come_from() -> None:
    """At run time, in ``__all__``, in ``dir`` and to type checkers alike."""
    tree = ast.parse(Path(cure_plugin.__file__).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    sources = {alias.name: node.module for node in checked.body for alias in node.names}  # type: ignore[attr-defined]
    assert sorted(sources) == sorted(cure_plugin.__all__) and set(sources) <= set(dir(cure_plugin))
    for name, module in sources.items():
        assert getattr(cure_plugin, name) is getattr(import_module(module), name)


def test_names_that_do_not_exist_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Certifer'"):
        cure_plugin.Certifer  # noqa: B018


def test_names_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys, cure_plugin\n"
        "rooms = [f'cure_plugin.{name}' for name in ('training', 'certification', 'export', 'datasets')]\n"
        "print(any(room in sys.modules for room in rooms))\n"
        "cure_plugin.Trainer, cure_plugin.certify_dataset, cure_plugin.encode\n"
        "print(all(room in sys.modules for room in rooms), 'Trainer' in vars(cure_plugin))"
    )
    assert printed(code) == ["False", "True True"]


def test_stock_modules_take_our_sets_after_the_package_alone() -> None:
    code = (
        "import cure_plugin\n"
        "from auto_LiRPA import BoundedModule, BoundedTensor\n"
        "import torch\n"
        "x = torch.rand(1, 4)\n"
        "net = BoundedModule(torch.nn.Linear(4, 2), x)\n"
        "ball = BoundedTensor(x, cure_plugin.PerturbationLpBall(2, 0.1))\n"
        "lower, upper = net.compute_bounds(x=(ball,), method='IBP')\n"
        "print(bool((lower < net(x)).all() and (net(x) < upper).all()))"
    )
    assert printed(code) == ["True"]


@pytest.mark.parametrize("package, remedy", [("torch", "pip install torch"), ("auto_LiRPA", "auto_LiRPA==0.3")])
def test_a_name_says_in_one_line_what_is_not_installed(package: str, remedy: str) -> None:
    code = (
        "import cure_plugin\n"
        "try:\n    from cure_plugin import Certifier\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    (line,) = without(package, code)
    assert line.startswith(f"MissingDependencyError {package} is not installed") and remedy in line


def test_rooms_say_that_auto_lirpa_is_not_installed() -> None:
    code = (
        "from importlib import import_module\n"
        f"for room in {ROOMS}:\n"
        "    try:\n        import_module(f'cure_plugin.{room}')\n"
        "    except ImportError as error:\n        print(type(error).__name__)"
    )
    assert without("auto_LiRPA", code) == ["MissingDependencyError"] * len(ROOMS)


def test_generators_need_neither_torch_nor_auto_lirpa() -> None:
    code = (
        "for name in ('auto_LiRPA', 'onnxruntime', 'tqdm'):\n    sys.modules[name] = None\n"
        "import cure_plugin.vnncomp.generate, cure_plugin.vnncomp.root, cure_plugin.vnncomp.pack\n"
        "print(cure_plugin.__version__)"
    )
    assert without("torch", code) == [cure_plugin.__version__]
