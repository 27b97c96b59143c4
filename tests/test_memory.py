"""What bounds take of memory: no more behind constants written out than behind Normalize, and as much as was said."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from test_elementwise import FRONTS, SHAPE, net_of, normalised
from torch import nn

from cure_plugin import PerturbationLpBall
from cure_plugin.bounds.memory import default_memory
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification import METHODS, Certifier
from cure_plugin.errors import MemoryWarning

BEHIND = """
import sys, torch, cure_plugin
from peak_memory import peak
from torch import nn
from test_elementwise import FRONTS, MEAN, STD
from cure_plugin.certification import METHODS
from cure_plugin.certification.method import Piece
from cure_plugin.certification.bounder import Bounder
from cure_plugin.nets import NetSpec, Normalize, build_net
from cure_plugin.sets import set_spec
front = Normalize(MEAN, STD) if sys.argv[1] == "Normalize" else FRONTS[sys.argv[1]]()
net = nn.Sequential(front, build_net(NetSpec("cnn_small", (3, 32, 32)), torch.Generator().manual_seed(0))).eval()
bounder = Bounder(net, (3, 32, 32), 1, 100.0)
x = 0.5 + 0.1 * torch.rand(1, 3, 32, 32)
for method in ("CROWN", "coupled"):
    bounder.bound(Piece(region=set_spec("l2=1").build().around(x), y=torch.tensor([0])), METHODS.make(method))
print(peak())
"""

WIDE = """
import sys, torch, cure_plugin
from peak_memory import peak
from cure_plugin.certification import Certifier
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.sets import set_spec
net = build_net(NetSpec("cnn7_narrow", (1, 28, 28)), torch.Generator().manual_seed(0)).eval()
x = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
Certifier(net, (1, 28, 28)).decide(x, net(x).argmax(1), set_spec(sys.argv[1]).build())
print(peak())
"""

NETS = {
    "max pooling": "C(3, 8, 3, 1, 1), R(), nn.MaxPool2d(2), C(8, 8, 3, 1, 1), R(), nn.Flatten(), nn.Linear(512, 10)",
    "mean pooling": "C(3, 8, 3, 1, 1), R(), nn.AvgPool2d(2), C(8, 8, 3, 1, 1), R(), nn.Flatten(), nn.Linear(512, 10)",
    "groups": "C(3, 8, 3, 1, 1), R(), C(8, 16, 4, 2, 1, groups=2), R(), nn.Flatten(), nn.Linear(1024, 10)",
    "leaky": "C(3, 8, 3, 1, 1), nn.LeakyReLU(), C(8, 16, 4, 2, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(1024, 10)",
}
"""In matrix mode, over images 3 x 16 x 16."""

MATRIX = """
import sys, torch
from peak_memory import peak
from torch import nn
from torch.nn import Conv2d as C, ReLU as R
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.bounds.margins import crown_bounds
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification import METHODS, Certifier
from cure_plugin.modes import frozen
from cure_plugin.sets import set_spec
net, method = eval(f"nn.Sequential({sys.argv[1]})").eval(), sys.argv[2]
bounded = bounded_module(net, (3, 16, 16))
assert bounded.bound_opts["conv_mode"] == "matrix"
x, y, ball = 0.5 + 0.1 * torch.rand(1, 3, 16, 16), torch.tensor([0]), set_spec("l2=2").build()
certifier = Certifier(net, (3, 16, 16), alpha_iterations=5)
before = peak()
with frozen(net):
    if method == "alpha-CROWN":
        certifier.lower_bound(x, y, set_spec("linf=0.5").build(), method)
    elif method == "CROWN":
        crown_bounds(bounded, x, y, set_spec("linf=0.5").build())
    else:
        CoupledBounds(bounded, 6, 6, 2).bounds(x, y, ball, target=torch.tensor([float("inf")]))
after = peak()
print(after - before, METHODS.make(method).bytes_per_image(bounded, 4))
"""


def printed(script: str, *arguments: str) -> list[int]:
    """The numbers that a script prints last."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tests')\n{script}", *arguments]
    return [int(word) for word in subprocess.run(command, capture_output=True, check=True).stdout.split()]


@pytest.mark.slow
def test_constants_written_out_take_no_more_than_normalize() -> None:
    (reference,) = printed(BEHIND, "Normalize")
    for name in ("sub div", "mul add", "negated", "bytes", "batch norm"):
        assert printed(BEHIND, name)[0] < 1.1 * reference, name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["CROWN", "coupled", "alpha-CROWN"])
@pytest.mark.parametrize("name", NETS)
def test_the_estimate_for_matrix_mode_is_right_by_a_factor_of_two(name: str, method: str) -> None:
    used, estimate = printed(MATRIX, NETS[name], method)
    # coupling and alpha-CROWN leave a LeakyReLU to auto_LiRPA, so that no rows are kept for gradients
    assert 0.5 < estimate / used < (5 if name == "leaky" and method != "CROWN" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["linf=0.001", "l2=0.01", "R(1)"])
def test_a_wide_net_keeps_to_two_gigabytes(text: str) -> None:
    assert printed(WIDE, text)[0] < 2 << 30


def test_constants_written_out_are_expected_to_take_what_normalize_does() -> None:
    for method in ("CROWN", "coupled", "alpha-CROWN"):
        reference = METHODS.make(method).bytes_per_image(bounded_module(net_of("convolutions", normalised()), SHAPE), 4)
        for name in ("sub div", "bytes", "batch norm"):
            bounded = bounded_module(net_of("convolutions", FRONTS[name]()), SHAPE)
            assert 0 < METHODS.make(method).bytes_per_image(bounded, 4) <= reference


def test_relaxations_other_than_relu_count() -> None:
    sizes = set()
    for activation in (nn.ReLU, nn.LeakyReLU, nn.Tanh):
        body = [nn.Conv2d(1, 4, 3, dilation=2), activation(), nn.Conv2d(4, 4, 3), activation()]
        net = nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 3)).eval()
        sizes.add(METHODS.make("CROWN").bytes_per_image(bounded_module(net, (1, 8, 8)), 4))
    assert len(sizes) == 1 and min(sizes) > 16 * 144  # rows of the second convolution over the first


def test_a_warning_says_what_a_single_image_may_take() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    certifier = Certifier(net.eval(), (1, 8, 8), ("IBP", "CROWN"), memory=1e-6)
    x, y, ball = torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), PerturbationLpBall(float("inf"), 0.3)
    with pytest.warns(MemoryWarning, match=r"CROWN of this net may need \S+ GiB for a single image, .* raise memory"):
        certifier.lower_bound(x, y, ball, "CROWN")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certifier.lower_bound(x, y, ball, "CROWN")  # said once
        certifier.lower_bound(x, y, ball, "IBP")
        Certifier(net, (1, 8, 8)).lower_bound(x, y, ball, "CROWN")


def test_bounds_on_a_gpu_may_take_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 2**30, 80 * 2**30))
    assert default_memory(torch.device("cuda:0")) == 20 and default_memory(torch.device("cpu")) == 2
