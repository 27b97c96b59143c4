"""The compatibility module: needed for 0.3, harmless otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import auto_LiRPA
import pytest
import torch

from cure_plugin import PerturbationLpBall, bounded_module, export_onnx
from cure_plugin.bounds.module import default_dtype
from cure_plugin.errors import SpecError


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


@pytest.mark.parametrize("layer", [torch.nn.Tanh(), torch.nn.Sigmoid()], ids=str)
def test_nodes_of_a_class_share_their_tables(layer: torch.nn.Module) -> None:
    """One for each precision."""
    x = torch.zeros(1, 2)

    def nodes(dtype: torch.dtype) -> list[Any]:
        net = torch.nn.Sequential(torch.nn.Linear(2, 2), layer, torch.nn.Linear(2, 2), layer).to(dtype)
        modules = auto_LiRPA.BoundedModule(net, x.to(dtype)).modules()
        return [node for node in modules if type(node).__name__ == f"Bound{type(layer).__name__}"]

    first, second = nodes(torch.float32)
    assert first.d_lower is second.d_lower and first.d_upper is second.d_upper
    kept = {name: getattr(first, name).clone() for name in ("d_lower", "d_upper")}
    with default_dtype(torch.float64):
        (precise, _) = nodes(torch.float64)
    assert precise.d_lower.dtype == torch.float64 and first.d_lower.dtype == torch.float32
    for name, table in kept.items():
        assert torch.equal(getattr(nodes(torch.float32)[0], name), table)


def test_nets_are_read_the_same_after_an_export(tmp_path: Path) -> None:
    """torch's exporter spells padding in another way once it has been used, which auto_LiRPA does not read."""
    layers = [torch.nn.ConstantPad2d((1, 0, 2, 1), 0.0), torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten()]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(30, 3)).eval()
    export_onnx(torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Flatten()), (1, 4, 4), tmp_path / "net.onnx")
    bounded = bounded_module(net, (1, 4, 4))
    assert any(type(node).__name__ == "BoundPad" for node in bounded.modules())


def test_powers_have_tables_of_their_own() -> None:
    """0.7.1 makes them of the exponent: what is shared by their class are bounds that do not hold."""
    x = torch.tensor([[-2.0], [0.3], [1.5]])
    ball = PerturbationLpBall(float("inf"), torch.tensor([1.0, 1.0, 0.4]), domain=None)
    for exponent in (3, 5, 7, 3, 9):
        net = Power(exponent)
        try:
            bounded = bounded_module(net, (1,))
        except SpecError:  # 0.3 knows of no such power
            assert auto_LiRPA.__version__ == "0.3"
            return
        for method in ("IBP", "CROWN"):
            lower, upper = bounded.compute_bounds(x=(auto_LiRPA.BoundedTensor(x, ball),), method=method)
            for share in torch.linspace(-1, 1, 41):
                value = net(x + share * ball.eps[:, None])
                assert bool(((lower <= value + 1e-3) & (value <= upper + 1e-3)).all()), (exponent, method)


class Power(torch.nn.Module):
    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent, self.last = exponent, torch.nn.Linear(1, 2)
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[1.0], [-1.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x**self.exponent)
