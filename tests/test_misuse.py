"""What users' scripts do to sets and nets: buffers refilled in place, attributes set, wrong types, odd layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from auto_LiRPA import BoundedModule, BoundedTensor
from conftest import small_net
from torch import Tensor, nn

from cure_plugin import PerturbationGeometric, PerturbationL0, PerturbationLpBall, PerturbationPatch, PerturbationSet
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification import Certifier
from cure_plugin.cli import main
from cure_plugin.datasets import load_data
from cure_plugin.errors import OutputError, SpecError
from cure_plugin.sets import set_spec
from cure_plugin.sets.registry import _KINDS, register_perturbation
from cure_plugin.training import CureObjective, Recipe, SetRecipe, Trainer, TrainingSet

LABELS = torch.tensor([0, 2, 1])


def _refilled(x: Tensor) -> Tensor:
    buffer = x.numpy()
    buffer[...] = 1 - buffer
    return torch.from_numpy(buffer)


def _copied(x: Tensor) -> Tensor:
    x.data.copy_(1 - x)
    return x


class _Bare(PerturbationPatch):
    """A set whose author wrote no __repr__."""

    __repr__ = PerturbationSet.__repr__


def test_sets_without_a_repr_are_not_shown_as_another() -> None:
    assert repr(_Bare(1, 2)) == "<_Bare patch1x2>"


@pytest.mark.parametrize("change", [_refilled, _copied])
@pytest.mark.parametrize("method", ["IBP", "CROWN"])
def test_geometric_bounds_follow_pixels_that_change_in_place(
    change: Callable[[Tensor], Tensor], method: str, images: Tensor
) -> None:
    net = small_net("plain")
    rotation = PerturbationGeometric.parse("R(5)")
    bounded = BoundedModule(net, images)
    x = images.clone()
    bounded.compute_bounds(x=(BoundedTensor(x, rotation),), method=method)
    x = change(x)
    lower, upper = bounded.compute_bounds(x=(BoundedTensor(x, rotation),), method=method)
    clean = net(x)
    assert bool((lower <= clean + 1e-5).all() and (clean <= upper + 1e-5).all())


def test_geometric_bounds_follow_ranges_that_change_in_place(images: Tensor) -> None:
    brighter = PerturbationGeometric.parse("B(0.01)")
    brighter.box(images)
    brighter.upper *= 50
    _, high = brighter.box(images)
    assert torch.allclose(high, images + 0.5)


def test_geometric_bounds_in_inference_mode(images: Tensor) -> None:
    rotation = PerturbationGeometric.parse("R(5)")
    x = images * 0.5
    with torch.inference_mode():
        low, high = rotation.box(x)
    assert bool((low <= high).all())
    weight = torch.ones((), requires_grad=True)
    (weight * rotation.box(x)[0]).sum().backward()
    assert weight.grad is not None


def test_a_normalised_image_is_no_image_to_transform(images: Tensor) -> None:
    normalised = (images - 0.5) / 0.5
    with pytest.raises(SpecError, match=r"outside domain \(0.0, 1.0\)"):
        PerturbationGeometric.parse("R(5)").box(normalised)
    low, high = PerturbationGeometric(("R",), [-5.0], [5.0], domain=None).box(normalised)
    assert bool((low <= normalised).all() and (normalised <= high).all())
    with pytest.raises(SpecError, match="lowest < highest"):
        PerturbationGeometric(("R",), [-5.0], [5.0], domain=(1.0, 0.0))


@pytest.mark.parametrize("own", [PerturbationPatch(2, 2), PerturbationL0(3), PerturbationGeometric.parse("R(5)")])
def test_only_balls_have_an_eps(own: object) -> None:
    with pytest.raises(SpecError, match=r"has no eps to set to 0.5; take scaled\(factor\)"):
        own.set_eps(0.5)  # type: ignore[attr-defined]


def test_a_balls_eps_is_checked_however_it_is_set() -> None:
    ball = PerturbationLpBall(2, np.float32(0.25))
    assert ball.eps == 0.25
    ball.eps = 0.5
    assert ball.eps == 0.5
    for wrong in (-1.0, math.nan, "0.5"):
        with pytest.raises(SpecError, match="eps must be"):
            ball.eps = wrong  # type: ignore[assignment]
    assert ball.eps == 0.5


class OwnNormalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.13) / 0.31


LAYERS = {
    "own normalisation": OwnNormalize(),
    "1": nn.AvgPool2d(1),
    "disjoint": nn.AvgPool2d(2),
    "overlapping": nn.AvgPool2d(3, 2),
    "padded": nn.AvgPool2d(2, 2, 1),
    "padding not counted": nn.AvgPool2d(2, 2, 1, count_include_pad=False),
    "oblong": nn.AvgPool2d((2, 3)),
    "global": nn.AdaptiveAvgPool2d(1),
}


@pytest.mark.parametrize("place", ["first", "later"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("own", ["linf=0.05", "l2=0.3", "patch=2x2"])
def test_normalisation_and_average_pooling_are_bounded(layer: str, place: str, own: str) -> None:
    """auto_LiRPA fails on some of these in its patches mode, and its bounds of many of the pools do not hold."""
    one, convolution = LAYERS[layer], nn.LazyConv2d(4, 2, padding=1)
    front = [one, convolution] if place == "first" else [convolution, nn.ReLU(), one]
    net = nn.Sequential(*front, nn.Flatten(), nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3))
    x, perturbation = torch.rand(2, 2, 8, 11), set_spec(own).build()
    net(x)
    bounded = bounded_module(net.eval(), (2, 8, 11))
    points = [net(perturbation.sample(x)) for _ in range(50)]
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        lower, upper = bounded.compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)
        for logits in points:
            assert bool((lower <= logits + 1e-5).all() and (logits <= upper + 1e-5).all())


def test_gradients_pass_through_average_pools() -> None:
    """CROWN-IBP's bounds of a mean over four pixels, as of the same mean written as a convolution."""
    first, last, x = nn.Conv2d(1, 2, 3), nn.Linear(18, 3), torch.rand(3, 1, 8, 8)
    mean = nn.Conv2d(2, 2, 2, 2, bias=False)
    with torch.no_grad():
        mean.weight.copy_(torch.eye(2)[:, :, None, None].expand(2, 2, 2, 2) / 4)
    given = []
    for pool in (nn.AvgPool2d(2), mean):
        net = nn.Sequential(first, nn.ReLU(), pool, nn.Flatten(), last)
        ball = BoundedTensor(x, PerturbationLpBall(2, 0.3))
        lower, _ = bounded_module(net, (1, 8, 8)).compute_bounds(x=(ball,), method="CROWN-IBP")
        given.append([lower, *torch.autograd.grad(lower.sum(), [first.weight, last.weight])])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*given, strict=True))


@pytest.mark.parametrize(
    "layer", [nn.AvgPool2d(2, divisor_override=3), nn.AvgPool2d(3, ceil_mode=True), nn.ELU(), nn.Dropout(0.5)]
)
def test_layers_that_the_graph_gets_wrong_are_refused(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.Flatten(), nn.LazyLinear(3))
    net(torch.rand(1, 1, 9, 9))
    with pytest.raises(
        SpecError, match=r"reads another net|cannot read this net .* its layers: Conv2d|Dropout, is not bounded"
    ):
        bounded_module(net.eval(), (1, 9, 9))


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (8, 8), (1, 9, 9), torch.zeros(1, 8, 8)])
def test_shapes_that_do_not_fit_are_named(shape: object) -> None:
    with pytest.raises(SpecError, match=r"does not fit the net|input_shape must be whole numbers"):
        bounded_module(small_net("plain"), shape)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_refused() -> None:
    net = small_net("plain")
    with torch.no_grad():
        net[0].bias[0] = math.nan
    with pytest.raises(SpecError, match=r"0\.bias of the net holds NaN"):
        Certifier(net, (1, 8, 8))


def test_nan_images_leave_running_statistics_alone(images: Tensor) -> None:
    net = small_net("conv-batch-norm").train()
    before = net[1].running_mean.clone()
    sets = [TrainingSet(PerturbationLpBall(math.inf, 0.1), 0.4), TrainingSet(PerturbationLpBall(2, 0.5), 0.5)]
    with pytest.raises(SpecError, match="x holds NaN") as caught:
        CureObjective(sets)(bounded_module(net, (1, 8, 8)), net, images * math.nan, LABELS)
    assert len(str(caught.value)) < 200 and torch.equal(before, net[1].running_mean)


def test_wrong_types_are_named(images: Tensor) -> None:
    ball = PerturbationLpBall(2, 0.1)
    with pytest.raises(
        SpecError, match=r"sets must be a list of TrainingSet\(perturbation, ...\), got PerturbationLpBall"
    ):
        CureObjective([ball])  # type: ignore[list-item]
    with pytest.raises(SpecError, match="perturbation must be a cure_plugin set, got"):
        TrainingSet("l2=0.1")  # type: ignore[arg-type]
    certifier = Certifier(small_net("plain"), (1, 8, 8), methods=("IBP",))
    with pytest.raises(SpecError, match=r"perturbation must be a cure_plugin set, got 'l2=0\.1'"):
        certifier.decide(images, LABELS, "l2=0.1")  # type: ignore[arg-type]
    verdicts, _ = certifier.decide(images, LABELS.int(), ball)
    assert len(verdicts) == 3


def test_what_a_builder_raises_is_told() -> None:
    @register_perturbation("misuse", "a number")
    def build(text: str) -> PerturbationLpBall:
        return PerturbationLpBall(2, float(text))

    try:
        with pytest.raises(SpecError, match="set 'misuse' refuses the parameters 'a': could not convert"):
            set_spec("misuse=a")
        with pytest.raises(SpecError, match="eps must be finite"):
            set_spec("misuse=-1")
    finally:
        del _KINDS["misuse"]


def test_a_folder_that_cannot_be_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = Recipe("mnist-slice", "cnn_tiny", (SetRecipe("l2=0.2"),), epochs=2, ramp_epochs=0)
    with pytest.raises(OutputError, match=r"cannot create folder .*file/run"):
        Trainer(recipe, load_data("mnist-slice", True).first(20), tmp_path / "file" / "run")


def test_names_of_nets_stay_inside_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("../x", "a/b", "..", ""):
        assert main(["report", f"{name}=net.pt", "--out", str(tmp_path / "report")]) == 2
        assert "one without / or .." in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("cure_plugin ")
