"""Every set of the package passes the test case that third parties inherit."""

from __future__ import annotations

import math

import torch

from cure_plugin import (
    PerturbationBox,
    PerturbationGeometric,
    PerturbationL0,
    PerturbationLpBall,
    PerturbationPatch,
    PerturbationSet,
    PerturbationUnion,
)
from cure_plugin.testing import PerturbationTestCase


class TestL1(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationLpBall(1, 1.5)


class TestL2(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationLpBall(2, 0.6)


class TestLinf(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationLpBall(math.inf, 0.1)


class TestBox(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationBox(0.0, 1.0).scaled(0.2)


class TestBoxOfTensors(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        generator = torch.Generator().manual_seed(0)
        lower, upper = (torch.rand(1, 8, 8, generator=generator, dtype=torch.float32) / 5 for _ in range(2))
        return PerturbationBox(-lower, 1 + upper)


class TestBallInABox(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationLpBall(1, 1.5, PerturbationBox(-0.1, torch.linspace(1, 1.1, 8, dtype=torch.float32)))


class TestUncutL2(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationLpBall(2, 0.6, domain=None)


class TestPatch(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationPatch(2, 3)


class TestPatchBlock(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationPatch(3, 2, (1, 3, 0, 4))


class TestOnePatch(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationPatch(3, 3, (5, 5, 2, 2))


class TestL0(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationL0(3)


class TestColourPatch(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationPatch(2, 2)

    def images(self) -> torch.Tensor:
        return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class GeometricTestCase(PerturbationTestCase):
    text = ""
    samples = 150
    members = 4

    def make(self) -> PerturbationSet:
        return PerturbationGeometric.parse(self.text)


class TestRotation(GeometricTestCase):
    text = "R(10)"


class TestTranslation(GeometricTestCase):
    text = "T(0.6,0.4)"


class TestRotationAndShear(GeometricTestCase):
    text = "R(2) Sh(2)"


class TestScaleRotationContrastBrightness(GeometricTestCase):
    text = "Sc(1) R(1) C(1) B(0.001)"


class TestContrastAndBrightness(GeometricTestCase):
    text = "C(20) B(0.1)"


class TestUnion(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return PerturbationUnion([PerturbationLpBall(1, 1.0), PerturbationPatch(2, 2), PerturbationL0(1)])
