"""The compatibility module: needed for 0.3, harmless otherwise."""

from __future__ import annotations

import subprocess
import sys

import auto_LiRPA
import pytest


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.skipif(auto_LiRPA.__version__ != "0.3", reason="only 0.3 needs mending")
def test_auto_lirpa_0_3_does_not_import_without_the_module() -> None:
    assert run_python("import auto_LiRPA").returncode != 0


def test_importing_the_package_is_enough() -> None:
    result = run_python("import cure_plugin, auto_LiRPA; from auto_LiRPA import BoundedModule, BoundedTensor")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_nothing_temporary_is_left_behind() -> None:
    code = (
        "import cure_plugin, sys, torch.onnx.symbolic_helper as s, warnings\n"
        "assert 'numpy.lib.arraysetops' not in sys.modules or hasattr(__import__('numpy').lib, 'arraysetops')\n"
        "assert not hasattr(s, '_set_opset_version') or s._set_opset_version.__module__ != 'cure_plugin.compat'"
    )
    assert run_python(code).returncode == 0


def test_matrix_mode_can_list_parameters() -> None:
    code = (
        "import cure_plugin, torch\n"
        "from auto_LiRPA import BoundedModule\n"
        "net = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "print(len(list(BoundedModule(net, torch.zeros(1, 2)).parameters())))"
    )
    assert run_python(code).stdout.strip() == "2"
