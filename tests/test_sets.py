"""Lp balls and unions: membership, projection, sampling, regions, and refusals."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from cure_plugin import (
    PerturbationL0,
    PerturbationLpBall,
    PerturbationPatch,
    PerturbationSet,
    PerturbationUnion,
    register_perturbation,
)
from cure_plugin.errors import SpecError
from cure_plugin.sets import LpBallSpec, NamedSpec, UnionSpec, parse_number, set_spec

INF = math.inf
BALLS = [(1, 1.5), (2, 0.8), (INF, 0.15)]


def make_sets() -> list[PerturbationSet]:
    balls: list[PerturbationSet] = [PerturbationLpBall(p, eps) for p, eps in BALLS]
    uncut = [PerturbationLpBall(p, eps, domain=None) for p, eps in BALLS]
    return [*balls, *uncut, PerturbationUnion([PerturbationLpBall(p, eps) for p, eps in BALLS])]


def inside(perturbation: PerturbationSet, x: Tensor, point: Tensor) -> bool:
    """Membership from the definition, not from the code under test."""
    if isinstance(perturbation, PerturbationUnion):
        per_member = [inside_each(m, x, point) for m in perturbation.members]  # type: ignore[arg-type]
        return bool(torch.stack(per_member).any(0).all())
    assert isinstance(perturbation, PerturbationLpBall)
    return bool(inside_each(perturbation, x, point).all())


def inside_each(ball: PerturbationLpBall, x: Tensor, point: Tensor) -> Tensor:
    length = torch.linalg.vector_norm((point - x).flatten(1), ord=ball.p, dim=1)
    good = length <= torch.as_tensor(ball.eps) + 1e-5
    if ball.domain is not None:
        good &= ((point >= ball.domain[0]) & (point <= ball.domain[1])).flatten(1).all(1)
    return good


@pytest.mark.parametrize("perturbation", make_sets(), ids=repr)
class TestEverySet:
    def test_points_stay_inside(self, perturbation: PerturbationSet, images: Tensor) -> None:
        part = perturbation.parts()[-1]
        variable = part.random_start(images)
        for _ in range(20):
            for point in (perturbation.sample(images), part.decode(images, variable)):
                assert inside(perturbation, images, point)
                assert bool(perturbation.contains(images, point, 1e-5).all())
            variable = part.ascend(images, variable, torch.randn_like(images), 0.7)
        assert inside(perturbation, images, perturbation.project(images, images + torch.randn_like(images)))

    def test_projection_keeps_members(self, perturbation: PerturbationSet, images: Tensor) -> None:
        point = perturbation.sample(images)
        assert torch.allclose(perturbation.project(images, point), point, atol=1e-6)

    def test_points_outside_are_no_members(self, perturbation: PerturbationSet, images: Tensor) -> None:
        assert not bool(perturbation.contains(images, images + 0.4).any())

    def test_the_box_is_the_hull(self, perturbation: PerturbationSet, images: Tensor) -> None:
        lower, upper = perturbation.box(images)
        for _ in range(50):
            point = perturbation.sample(images)
            assert bool(((point >= lower - 1e-6) & (point <= upper + 1e-6)).all())
        for pixel in (0, 17, 63):  # each box end is reached by a member
            direction = torch.zeros_like(images).flatten(1)
            direction[:, pixel] = 1
            for sign, end in ((1, upper), (-1, lower)):
                towards = sign * direction.view_as(images)
                reached = perturbation.project(images, images + 10 * towards)
                assert inside(perturbation, images, reached)
                target = images + towards * ((end - images).flatten(1)[:, pixel] * sign).view(-1, 1, 1, 1)
                assert inside(perturbation, images, target)

    def test_scaling_and_pickling(self, perturbation: PerturbationSet, images: Tensor) -> None:
        half = perturbation.scaled(0.5)
        lower, upper = perturbation.box(images)
        half_lower, half_upper = half.box(images)
        assert bool((half_lower >= lower).all() and (half_upper <= upper).all())
        clone = pickle.loads(pickle.dumps(perturbation))
        assert repr(clone) == repr(perturbation)


@pytest.mark.parametrize("p, eps", BALLS)
@pytest.mark.parametrize("ratio", [1e-5, 0.4, 1.0])
def test_small_regions_stay_inside_the_ball(p: float, eps: float, ratio: float, images: Tensor) -> None:
    ball = PerturbationLpBall(p, eps)
    for _ in range(20):
        centre, region = ball.small_region(images, ball.sample(images), ratio)
        point = region.sample(centre)
        length = torch.linalg.vector_norm((point - images).flatten(1), ord=p, dim=1)
        assert bool((length <= eps + 1e-5).all())
        assert bool(((centre >= 0) & (centre <= 1)).all())
        if p == INF:  # SABR's box keeps its full width wherever the cut ball has room for it
            lower, upper = ball.box(images)
            width = torch.minimum(torch.tensor(2 * ratio * eps), upper - lower)
            region_lower, region_upper = region.box(centre)
            assert torch.allclose(region_upper - region_lower, width, atol=1e-6)


def test_l2_projection_is_around_the_clean_image_not_the_iterate(images: Tensor) -> None:
    """The public scripts add the projected offset to the iterate; points then drift 6 to 8 radii away."""
    ball = PerturbationLpBall(2, 0.5)
    point = images
    for _ in range(30):
        point = ball.ascend(images, point, torch.ones_like(images), 1.0)
    assert bool(((point - images).flatten(1).norm(dim=1) <= 0.5 + 1e-5).all())


def test_per_sample_radii(images: Tensor) -> None:
    ball = PerturbationLpBall(2, torch.tensor([0.0, 0.5, 1.0]), domain=None)
    lengths = (ball.sample(images) - images).flatten(1).norm(dim=1)
    assert float(lengths[0]) == 0
    assert bool((lengths <= torch.tensor([0.0, 0.5, 1.0]) + 1e-6).all())
    with pytest.raises(SpecError, match="2 radii but x has 3"):
        PerturbationLpBall(2, torch.tensor([0.1, 0.2])).box(images)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PerturbationLpBall(2, -0.1), "eps must be finite and >= 0, got -0.1"),
        (lambda: PerturbationLpBall(2, float("nan")), "eps must be finite"),
        (lambda: PerturbationLpBall(3, 0.1), "norm must be 1, 2 or inf, got 3"),
        (lambda: PerturbationLpBall(2, 0.1, (1, 0)), "lowest <= highest"),
        (lambda: PerturbationLpBall(2, torch.zeros(2, 2)), r"got shape \(2, 2\)"),
        (lambda: PerturbationUnion([]), "at least one member"),
        (lambda: PerturbationUnion([object()]), "must be cure_plugin sets, got object"),  # type: ignore[list-item]
        (lambda: PerturbationUnion([PerturbationLpBall(2, 1)]).set_eps(2.0), "no single eps"),
        (lambda: set_spec("l3=0.1"), "unknown set 'l3'; known:"),
        (lambda: set_spec("rotation=10"), r"without name=, e.g. R\(10\)"),
        (lambda: set_spec("Sh=2"), r"without name=, e.g. R\(10\)"),
        (lambda: set_spec("linf"), "name=parameters"),
        (lambda: set_spec("patch=5"), "HEIGHTxWIDTH, e.g. 5x5, got '5'"),
        (lambda: set_spec("patch=0x5"), "at least 1 pixel"),
        (lambda: set_spec("l0=-1"), "whole number of pixels"),
        (lambda: PerturbationPatch(2, 2, (3, 1, 0, 0)), "r0 <= r1"),
        (lambda: PerturbationPatch(2, 2, (0, 7, 0, 0)).box(torch.zeros(1, 1, 8, 8)), "0 .. 6 and 0 .. 6"),
        (lambda: PerturbationPatch(9, 2).box(torch.zeros(1, 1, 8, 8)), "of that size at least"),
        (lambda: PerturbationL0(1).box(torch.zeros(1, 8)), "images"),
        (lambda: PerturbationPatch(2, 2).box(torch.full((1, 1, 8, 8), 2.0)), "outside domain"),
        (lambda: register_perturbation("a b"), "letters, digits"),
        (lambda: register_perturbation("patch")(lambda text: PerturbationL0(1)), "registered already"),
        (lambda: set_spec("linf=-8/255"), "eps must be finite and >= 0"),
        (lambda: set_spec("linf=eight"), "number like 0.1 or 8/255, got 'eight'"),
        (lambda: set_spec("linf=1/0"), "number like"),
        (lambda: set_spec({"norm": "inf"}), "a set is"),
        (lambda: set_spec({"union": []}), "at least one set"),
        (lambda: parse_number(float("inf"), "eps"), "eps must be finite"),
    ],
)
def test_refusals_name_the_value(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.full((1, 1, 2, 2), float("nan")), "NaN"),
        (torch.zeros(0, 1, 2, 2), "empty"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.long), "float batch"),
        (torch.zeros(4), "batch axis"),
        (torch.full((1, 1, 2, 2), -0.5), "outside domain"),
    ],
)
def test_unusable_images_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        PerturbationLpBall(2, 0.1).init(x)


def test_specs_keep_numbers_as_written() -> None:
    spec = set_spec({"norm": "inf", "eps": "8/255"})
    assert (str(spec), spec.name) == ("linf=8/255", "linf")
    assert spec.build().eps == pytest.approx(8 / 255)
    assert set_spec({"norm": 2, "eps": 0.5, "domain": None}) == LpBallSpec("l2", "0.5", None)
    union = set_spec({"union": ["linf=8/255", {"norm": 1, "eps": 1}]})
    assert str(union) == "linf=8/255 + l1=1"
    assert isinstance(union.build(), PerturbationUnion)


def test_lp_balls_count_as_one_group_however_they_are_spelled() -> None:
    spelled = NamedSpec("linf", "0.1"), LpBallSpec("l2", "0.5")
    assert [one.group for one in spelled] == ["lp", "lp"]
    assert UnionSpec(spelled).group == "lp" and UnionSpec((*spelled, NamedSpec("patch", "2x2"))).group == "mixed"
