"""Sets that cover others, verdicts that follow from them, bounds shared between stages, memory."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from auto_LiRPA import BoundedModule
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall, PerturbationPatch, PerturbationSet, PerturbationUnion
from cure_plugin.attacks import Pgd, find_counterexample, pgd_variable, worst_margin_loss
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.bounds.margins import LayerBounds, crown_bounds
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification import (
    METHODS,
    AlphaCrown,
    BoundMethod,
    Certifier,
    Coupled,
    Crown,
    IbpBound,
    certify_dataset,
)
from cure_plugin.certification.curves import certified_curves
from cure_plugin.certification.method import Piece
from cure_plugin.certification.related import decide_sets
from cure_plugin.datasets import ImageData
from cure_plugin.errors import SpecError
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.sets import set_spec

TEXTS = (
    "linf=0.05", "linf=0.1", "l2=0.1", "l2=0.05", "l1=0.1", "l1=0.3", "patch=2x2", "patch=2x3", "patch=3x3",
    "l0=1", "l0=3", "R(2)", "R(5)", "R(1,4)", "T(1,1)", "T(1,2)", "R(2) Sh(2)",
)  # fmt: skip
SHAPE = (1, 8, 8)


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def labelled(net: nn.Module, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images with the net's own predictions as labels."""
    x = torch.randint(256, (count, *SHAPE), generator=torch.Generator().manual_seed(seed)) / 255
    with torch.no_grad():
        return x, net(x).argmax(1)


def as_data(x: Tensor, y: Tensor) -> ImageData:
    return ImageData((x * 255).round().byte(), y, 3)


def test_points_of_covered_sets_lie_in_the_covering_one() -> None:
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    covered = []
    for large, small in itertools.permutations(TEXTS, 2):
        outer, inner = set_spec(large).build(), set_spec(small).build()
        if outer.covers(inner):
            covered.append((large, small))
            for _ in range(3):
                assert bool(outer.contains(x, inner.sample(x, generator), 1e-4).all()), (large, small)
    expected = {
        ("linf=0.1", "linf=0.05"), ("linf=0.1", "l2=0.1"), ("linf=0.1", "l2=0.05"), ("linf=0.1", "l1=0.1"),
        ("linf=0.05", "l2=0.05"), ("l2=0.1", "l2=0.05"), ("l2=0.1", "l1=0.1"), ("l1=0.3", "l1=0.1"),
        ("patch=2x3", "patch=2x2"), ("patch=3x3", "patch=2x2"), ("patch=3x3", "patch=2x3"), ("l0=3", "l0=1"),
        ("R(5)", "R(2)"), ("R(5)", "R(1,4)"), ("T(1,2)", "T(1,1)"),
    }  # fmt: skip
    assert set(covered) == expected


def test_covering_minds_domains_radii_per_sample_and_unions() -> None:
    ball = PerturbationLpBall
    assert ball(2, 1.0, None).covers(ball(2, 1.0)) and not ball(2, 1.0).covers(ball(2, 1.0, None))
    assert not ball(2, 1.0).covers(ball(2, torch.tensor([0.1, 0.2])))
    union = PerturbationUnion([ball(2, 1.0), ball(1, 3.0)])
    assert union.covers(ball(1, 2.0)) and union.covers(PerturbationUnion([ball(1, 3.0), ball(1, 1.0)]))
    assert not union.covers(ball(2, 1.5)) and not ball(1, 3.0).covers(union)


def test_subclasses_answer_for_themselves_only() -> None:
    """A subclass may be another set: it inherits neither inclusions nor pieces."""

    class Stripe(PerturbationPatch):
        def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return PerturbationPatch(self.height, x.shape[3]).box(x)

    class WithPieces(Stripe):
        def partition(self, x: Tensor) -> tuple[PerturbationSet, ...]:
            return PerturbationPatch(self.height, x.shape[3]).partition(x)

        split_methods = PerturbationPatch.split_methods

    patch = PerturbationPatch(3, 3)
    assert not patch.covers(Stripe(1, 1)) and not Stripe(3, 3).covers(patch) and not Stripe(3, 3).covers(Stripe(1, 1))
    assert patch.split_methods and WithPieces(1, 1).split_methods and not Stripe(1, 1).split_methods


def test_splitting_reports_points_of_the_set_only() -> None:
    """A misclassified clean image is no counterexample of a set that does not hold it."""
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    perturbation = set_spec("R(20,30)").build()
    with torch.no_grad():
        turned = perturbation.decode(x, torch.tensor([[25.0]])).flatten()
        for parameter in net.parameters():
            parameter.zero_()
        net[1].weight[0] = turned - x.flatten()
        net[1].bias[0] = -float((turned - x.flatten()) @ (turned + x.flatten())) / 2
    certifier = Certifier(net, SHAPE, ("CROWN", "splitting"), pieces=64)
    with torch.no_grad():
        assert int(net(x).argmax(1)) == 1
    result = certifier.split(x, torch.tensor([0]), perturbation)
    assert result.counterexample is None or bool(perturbation.contains(x, result.counterexample[None], 1e-3).all())


def test_proofs_go_down_and_counterexamples_up() -> None:
    net = small_net()
    x, y = labelled(net, 12)
    certifier = Certifier(net, SHAPE, ("IBP", "CROWN"), attack_steps=10)
    sets = {text: set_spec(text).build() for text in ("l2=0.05", "l2=0.4", "linf=0.4", "linf=0.01")}
    together = decide_sets(certifier, x, y, sets, lambda name: torch.Generator().manual_seed(0))
    assert list(together) == list(sets)
    stages = {verdict.stage for verdicts in together.values() for verdict in verdicts}
    assert "by l2=0.4" in stages
    for name, verdicts in together.items():
        alone, _ = certifier.decide(x, y, sets[name], torch.Generator().manual_seed(0))
        for one, other in zip(verdicts, alone, strict=True):
            assert {one.status, other.status} != {"proved", "falsified"}
            assert one.status == other.status or other.status == "undecided"


def test_a_small_sets_counterexample_breaks_the_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net()
    x, y = labelled(net, 3)
    small, large = PerturbationLpBall(2, 3.0), PerturbationLpBall(2, 4.0)

    def blind_on_the_large(model: nn.Module, x: Tensor, y: Tensor, perturbation: PerturbationLpBall, *_: object):  # type: ignore[no-untyped-def]
        found = torch.full((len(x),), perturbation.eps == 3.0)
        return found, x

    monkeypatch.setattr("cure_plugin.certification.attack.find_counterexample", blind_on_the_large)
    certifier = Certifier(net, SHAPE, ("IBP",))
    found = decide_sets(certifier, x, y, {"large": large, "small": small}, lambda name: torch.Generator())
    assert [(v.status, v.stage) for v in found["large"]] == [("falsified", "by small")] * 3


@pytest.mark.parametrize("norm", [1, 2])
def test_known_layer_bounds_change_no_coupled_margin(norm: int) -> None:
    net = small_net().double()
    x, y = labelled(small_net(), 3)
    x, ball = x.double(), PerturbationLpBall(norm, 0.3)
    bounded = bounded_module(net, SHAPE)
    known = crown_bounds(bounded, x, y, ball)
    assert len(known.boxes) == 3
    fresh = CoupledBounds(bounded, 10, 3, 2).bounds(x, y, ball)
    shared = CoupledBounds(bounded, 10, 3, 2).bounds(x, y, ball, known=known)
    assert torch.equal(fresh.margins, shared.margins)
    joined = LayerBounds.join([known.select(torch.tensor([0])), known.select(torch.tensor([1, 2]))])
    for name, box in known.boxes.items():
        assert all(torch.equal(one, other) for one, other in zip(box, joined.boxes[name], strict=True))


def test_hopeless_images_keep_coupled_bounds_and_cost_no_alpha_crown(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = labelled(small_net(), 3)
    certifier, ball = Certifier(small_net(), SHAPE), PerturbationLpBall(2, 3.0)
    crown = certifier.lower_bound(x, y, ball, "CROWN")
    found = certifier._bounder.bound(Piece(region=ball.around(x), y=y), Coupled())
    coupled, layers = found.lower, found.layers
    assert layers is not None and bool(layers.hopeless.all()) and bool((coupled >= crown).all())
    monkeypatch.setattr("cure_plugin.certification.bound_methods.AlphaCrown._optimised", None)
    assert torch.equal(
        certifier._bounder.bound(Piece(region=ball.around(x), y=y, known=layers), AlphaCrown()).lower, coupled
    )
    bounds = certifier._bounder.coupled
    rest = bounds.bounds(x, y, ball, torch.full((3,), torch.inf))
    assert not bool(rest.hopeless.any()) and bool((rest.margins >= layers.margins).all())


@pytest.mark.parametrize(
    "text, dtype",
    [
        ("linf=0.05", torch.float64),
        ("l2=0.2", torch.float32),
        pytest.param("l2=0.2", torch.float64, marks=pytest.mark.slow),
        pytest.param("l1=0.4", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_alpha_crown_from_known_boxes_holds(text: str, dtype: torch.dtype) -> None:
    x, y = labelled(small_net(1), 3, 1)
    net, x = small_net(1).to(dtype), x.to(dtype)
    ball = set_spec(text).build()
    for methods in (("CROWN", "alpha-CROWN"), ("CROWN", "coupled", "alpha-CROWN")):
        certifier = Certifier(net, SHAPE, methods, attack_steps=10, alpha_iterations=5)
        verdicts = certifier.decide(x, y, ball)[0]
        assert "proved" in [verdict.status for verdict in verdicts]
        for verdict, image, label in zip(verdicts, x, y, strict=True):
            if verdict.status == "falsified":
                continue
            point_loss = pgd_variable(net, image[None], label[None], ball, Pgd(40, worst_margin_loss))[1]
            assert verdict.margin <= -float(point_loss) + 1e-5
        crown = Certifier(net, SHAPE, ("CROWN",), attack_steps=10)
        for one, other in zip(certifier.decide(x, y, ball)[0], crown.decide(x, y, ball)[0], strict=True):
            assert one.margin >= other.margin - 1e-5 or one.status == "falsified"


def test_batches_follow_memory_and_change_no_verdict() -> None:
    net = small_net()
    x, y = labelled(net, 9)
    data = as_data(x, y)
    whole, tight = Certifier(net, SHAPE, memory=2.0), Certifier(net, SHAPE, memory=1e-6)
    assert whole._bounder.batch(Crown()) == 20
    assert tight._bounder.batch(Crown()) == 1 and tight._bounder.batch(IbpBound()) == 20
    sets = [set_spec("l2=0.1"), set_spec("linf=0.02")]
    results = [certify_dataset(certifier, data, sets) for certifier in (whole, tight)]
    for one, other in zip(*results, strict=True):
        for name in one.sets:
            assert one.sets[name].status == other.sets[name].status
            assert one.sets[name].margin == pytest.approx(other.sets[name].margin, abs=1e-4)
    for memory in (0, float("inf"), float("nan")):
        with pytest.raises(SpecError, match=r"memory must be a finite number of GiB above 0, got"):
            Certifier(net, SHAPE, memory=memory)


def bytes_of(name: str, bounded: BoundedModule, itemsize: int) -> int:
    method = METHODS.make(name)
    assert isinstance(method, BoundMethod)
    return method.bytes_per_image(bounded, itemsize)


def test_memory_grows_with_the_net_and_precision() -> None:
    small, wide = (
        bounded_module(build_net(NetSpec(name, (1, 28, 28))).eval(), (1, 28, 28))
        for name in ("cnn_small", "cnn7_narrow")
    )
    for method in ("CROWN", "coupled", "alpha-CROWN"):
        assert 0 < bytes_of(method, small, 4) < bytes_of(method, wide, 4)
        assert bytes_of(method, small, 8) == 2 * bytes_of(method, small, 4)
    assert bytes_of("IBP", small, 4) == 0


MEASURED = """
import sys, torch
sys.path.insert(0, "tests")
from peak_memory import peak
from cure_plugin.certification import METHODS
from cure_plugin.certification.method import Piece
from cure_plugin.certification.bounder import Bounder
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.sets import set_spec
method, count = sys.argv[1], int(sys.argv[2])
net = build_net(NetSpec("cnn_small", (1, 28, 28)), torch.Generator().manual_seed(0)).eval()
bounder = Bounder(net, (1, 28, 28), 100, 100.0)
x = 0.5 + 0.1 * torch.rand(count, 1, 28, 28)
before = peak()
piece = Piece(region=set_spec("linf=0.5").build().around(x), y=torch.zeros(count, dtype=torch.long))
bounder.bound(piece, METHODS.make(method))
after = peak()
print(after - before, METHODS.make(method).bytes_per_image(bounder.bounded, 4))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["CROWN", "coupled", "alpha-CROWN"])
def test_memory_stays_within_the_estimate(method: str) -> None:
    used = {}
    for count in (4, 12):
        command = [sys.executable, "-c", MEASURED, method, str(count)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        used[count], estimate = int(output[-2]), int(output[-1])
    per_image = (used[12] - used[4]) / 8
    assert 0.2 * estimate < per_image < 1.1 * estimate


class Blocks(nn.Module):
    """``count`` residual blocks of two branches each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(count))
        self.last = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.last(x.flatten(1))


def test_memory_of_deep_residual_and_grouped_nets() -> None:
    deep = bounded_module(Blocks(24).eval(), SHAPE)
    assert bytes_of("alpha-CROWN", deep, 4) > bytes_of("CROWN", deep, 4) > 0
    twins = [
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups), nn.ReLU(), nn.Flatten())
        for groups in (1, 4)
    ]
    plain, grouped = (bounded_module(nn.Sequential(*twin, nn.Linear(128, 3)).eval(), SHAPE) for twin in twins)
    assert bytes_of("CROWN", grouped, 4) > 2 * bytes_of("CROWN", plain, 4)  # rows over everything


def test_curves_of_sets_that_cannot_grow() -> None:
    net = small_net()
    data = as_data(*labelled(net, 3))
    certifier = Certifier(net, SHAPE, ("IBP", "CROWN"))
    curves = certified_curves(certifier, data, [set_spec("patch=6x6"), set_spec("Sc(60)")], (0.0, 1.0, 2.0))
    assert all(shares[2] == 0 for shares in curves.values())


def test_alpha_crown_leaves_no_gradients_on_the_users_parameters() -> None:
    net = small_net()
    x, y = labelled(net, 2)
    Certifier(net, SHAPE, alpha_iterations=2).lower_bound(x, y, PerturbationLpBall(2, 0.1), "alpha-CROWN")
    assert all(parameter.grad is None for parameter in net.parameters())


def test_geometric_bounds_follow_the_images_of_a_view() -> None:
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    perturbation = set_spec("R(10)").build()
    perturbation.box(x)
    low, _ = perturbation.box(x[:1].expand(4, -1, -1, -1))
    assert torch.equal(low[0], low[3])


def test_bisection_finds_what_trying_every_factor_does() -> None:
    net = small_net()
    x, y = labelled(net, 10)
    certifier = Certifier(net, SHAPE, ("IBP", "CROWN"))
    factors, specs = tuple(i / 4 for i in range(12)), [set_spec("l2=0.2"), set_spec("linf=0.02")]
    curves = certified_curves(certifier, as_data(x, y), specs, factors)
    alive = {spec.name: torch.ones(10, dtype=torch.bool) for spec in specs}
    for position, factor in enumerate(factors):
        for spec in specs:
            alive[spec.name] &= certifier.proved(x, y, spec.build().scaled(factor))
            assert curves[spec.name][position] == pytest.approx(float(alive[spec.name].float().mean()))
        both = torch.stack(list(alive.values())).all(0)
        assert curves["union"][position] == pytest.approx(float(both.float().mean()))


def test_curves_split_sets_that_have_pieces() -> None:
    net = small_net()
    x, y = labelled(net, 4)
    certifier = Certifier(net, SHAPE, ("IBP", "CROWN", "splitting"), pieces=64)
    whole = certifier.proved(x, y, set_spec("R(10)").build())
    statuses = [v.status for v in certifier.decide(x, y, set_spec("R(10)").build())[0]]
    assert whole.tolist() == [status == "proved" for status in statuses]
    assert bool(whole.any())


@pytest.mark.parametrize("text", ["linf=0.1", "l2=0.5", "l1=1", "patch=2x2", "R(10)"])
def test_attack_with_momentum_stays_inside(text: str) -> None:
    net = small_net()
    x, y = labelled(net, 5)
    perturbation = set_spec(text).build()
    generator = torch.Generator().manual_seed(0)
    variable, value = pgd_variable(net, x, y, perturbation, Pgd(10, worst_margin_loss, momentum=0.5), generator)
    point = perturbation.decode(x, variable)
    assert bool(perturbation.contains(x, point, 1e-4).all())
    with torch.no_grad():
        assert torch.allclose(worst_margin_loss(net(point), y), value, atol=1e-5)
    _, points = find_counterexample(net, x, y, perturbation, 10, 4, generator)
    assert bool(perturbation.contains(x, points, 1e-4).all())
