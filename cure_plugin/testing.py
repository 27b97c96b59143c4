"""Base test cases that variants of each kind, ours or a third party's, inherit (they need pytest only to run)."""

from __future__ import annotations

import math
import pickle
import tempfile
from pathlib import Path

import torch
from auto_LiRPA import BoundedTensor
from torch import Tensor, nn

from cure_plugin.attacks import Pgd, cross_entropy, find_counterexample, pgd, pgd_variable
from cure_plugin.bounds.module import bounded_module, default_dtype
from cure_plugin.certification import METHODS, Certifier, Method
from cure_plugin.datasets import ImageData
from cure_plugin.export.files import export_instances
from cure_plugin.sets import LpBallSpec, PerturbationGeometric, PerturbationLpBall, PerturbationPatch, PerturbationSet
from cure_plugin.sets.rows import rows_of_matrix
from cure_plugin.training.alignment import certified
from cure_plugin.training.loss import LOSSES, Batch, Loss
from cure_plugin.vnncomp.run import Run, verify
from cure_plugin.vnncomp.verifiers import Verifier, find_verifier


class PerturbationTestCase:
    """Subclass it, say what to test in :meth:`make`, and run pytest.

    >>> class TestMine(PerturbationTestCase):
    ...     def make(self):
    ...         from cure_plugin import PerturbationLpBall
    ...         return PerturbationLpBall(2, 0.5)
    >>> TestMine().test_contains_the_clean_point()
    """

    methods: tuple[str, ...] = ("IBP", "CROWN-IBP", "CROWN")
    samples: int = 600
    members: int = 20
    """Points whose membership is checked; lower it where :meth:`PerturbationSet.contains` is a search."""
    tolerance: float = 1e-5

    def make(self) -> PerturbationSet:
        """The set to test; a new object each time."""
        raise NotImplementedError

    def images(self) -> Tensor:
        """Inputs (B, C, H, W) that the set accepts, some pixels at the ends of [0, 1]."""
        x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return torch.where(x < 0.3, 0.0, torch.where(x > 0.8, 1.0, x))

    def net(self) -> nn.Sequential:
        """A small classifier of those inputs, in eval mode."""
        torch.manual_seed(0)
        channels = self.images().shape[1]
        flat = 4 * ((self.images().shape[2] + 1) // 2) * ((self.images().shape[3] + 1) // 2)
        front = [nn.Conv2d(channels, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*front, nn.Flatten(), nn.Linear(flat, 10), nn.ReLU(), nn.Linear(10, 3)).eval()

    def bounds(self, x: Tensor, method: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Bounds of :meth:`net` over the set around ``x`` by stock auto_LiRPA."""
        bounded = bounded_module(self.net().to(dtype), tuple(x.shape[1:]), self_check=False)  # bounds are attacked here
        with default_dtype(dtype):
            lower, upper = bounded.compute_bounds(x=(BoundedTensor(x.to(dtype), self.make()),), method=method)
        return lower.detach(), upper.detach()

    # -- the checks ----------------------------------------------------------------------------

    def test_it_has_a_name_for_reports(self) -> None:
        name = getattr(self.make(), "name", None)
        assert isinstance(name, str) and name and not set(name) & set("/\\\n"), "set self.name in __init__"

    def test_contains_the_clean_point(self) -> None:
        x = self.images()
        assert bool(self.make().contains(x, x).all())
        lower, upper = self.make().box(x)
        assert bool(((lower <= x + self.tolerance) & (x - self.tolerance <= upper)).all())

    def test_samples_are_members_inside_the_box(self) -> None:
        x, perturbation = self.images(), self.make()
        lower, upper = perturbation.box(x)
        for _ in range(self.members):
            point = perturbation.sample(x)
            assert bool(perturbation.contains(x, point, 10 * self.tolerance).all())
            assert bool(((point >= lower - self.tolerance) & (point <= upper + self.tolerance)).all())

    def test_attacks_stay_inside(self) -> None:
        x, perturbation = self.images(), self.make()
        y = torch.zeros(len(x), dtype=torch.long)
        assert bool(perturbation.contains(x, pgd(self.net(), x, y, perturbation), 10 * self.tolerance).all())

    def test_no_linear_function_falls_below_its_minimum(self) -> None:
        x, perturbation = self.images(), self.make()
        rows = rows_of_matrix(torch.randn(len(x), 5, x[0].numel()), tuple(x.shape[1:]))
        deviation = perturbation.deviation(x, rows)
        for _ in range(100):
            offset = (perturbation.sample(x) - x).flatten(1).unsqueeze(2)
            assert bool((rows.coefficients @ offset >= deviation.unsqueeze(2) - 10 * self.tolerance).all())

    def test_no_point_crosses_a_bound(self) -> None:
        x, perturbation, net = self.images(), self.make(), self.net()
        points = [perturbation.sample(x) for _ in range(self.samples // len(x))]
        every, y = x.repeat(3, 1, 1, 1), torch.arange(3).repeat_interleave(len(x))
        for objective in (cross_entropy, lambda z, label: z.gather(1, label[:, None])[:, 0]):
            points += pgd(net, every, y, perturbation, Pgd(20, objective)).split(len(x))
        with torch.no_grad():
            outputs = torch.stack([net(point) for point in points])
        for method in self.methods:
            lower, upper = self.bounds(x, method)
            assert bool(((outputs >= lower - self.tolerance) & (outputs <= upper + self.tolerance)).all()), method

    def test_smaller_sets_have_tighter_bounds(self) -> None:
        x = self.images()
        rows = rows_of_matrix(torch.randn(len(x), 5, x[0].numel()), tuple(x.shape[1:]))
        whole, half = (self.make().scaled(factor).deviation(x, rows) for factor in (1.0, 0.5))
        assert bool((half >= whole - self.tolerance).all())

    def test_samples_of_a_batch_do_not_mix(self) -> None:
        x = self.images()
        lower, _ = self.bounds(x, "IBP")
        for i in range(len(x)):
            alone, _ = self.bounds(x[i : i + 1], "IBP")
            assert torch.allclose(alone, lower[i : i + 1], atol=1e-4)

    def test_pickles(self) -> None:
        perturbation = self.make()
        assert repr(pickle.loads(pickle.dumps(perturbation))) == repr(perturbation)

    def test_works_in_float64(self) -> None:
        x = self.images()
        single, double = self.bounds(x, "CROWN-IBP"), self.bounds(x, "CROWN-IBP", torch.float64)
        assert double[0].dtype == torch.float64
        assert torch.allclose(single[0].double(), double[0], atol=1e-3)

    def test_parts_and_splits_lie_inside(self) -> None:
        x, perturbation = self.images(), self.make()
        for piece in (*perturbation.parts(), *perturbation.split(x[:1])):
            for _ in range(max(1, self.members // 4)):
                assert bool(perturbation.contains(x, piece.sample(x), 10 * self.tolerance).all())

    def test_pieces_cover_the_set(self) -> None:
        x, perturbation = self.images()[:1], self.make()
        if perturbation.split_methods:
            pieces = perturbation.partition(x)
            for points in (perturbation.sample(x) for _ in range(3)):
                assert any(bool(piece.contains(x, points, 10 * self.tolerance)) for piece in pieces)

    def test_small_regions_lie_inside(self) -> None:
        x = self.images()
        for part in self.make().parts():
            centre, region = part.small_region(x, part.random_start(x), 0.3)
            for _ in range(max(1, self.members // 4)):
                point = region.sample(centre)
                cut = point.clamp(0, 1)  # a region may stick out of a set's domain, but not of the set otherwise
                inside = part.contains(x, point, 10 * self.tolerance) | part.contains(x, cut, 10 * self.tolerance)
                assert bool(inside.all())


class LossTestCase:
    """Subclass it, say what to test in :meth:`make`, and run pytest.

    >>> class TestMine(LossTestCase):
    ...     def make(self):
    ...         from cure_plugin.training import Sabr
    ...         return Sabr(0.5)
    >>> TestMine().test_every_parameter_is_trained()
    """

    def make(self) -> Loss:
        """The loss to test; a new object each time."""
        raise NotImplementedError

    def perturbation(self) -> PerturbationSet:
        """A set that the loss can be trained for."""
        return PerturbationLpBall(2, 0.1)

    def batch(self, scale: float = 1.0) -> Batch:
        """Two images, a small net, and the attack on them; the set ``scale`` times its size."""
        x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        y = torch.tensor([0, 2])
        torch.manual_seed(0)
        hidden = [nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)]
        net, perturbation = nn.Sequential(*hidden).eval(), self.perturbation().scaled(scale)
        variable, _ = pgd_variable(net, x, y, perturbation, generator=torch.Generator().manual_seed(0))
        return Batch(bounded_module(net, (1, 8, 8)), net, perturbation.around(x), y, variable)

    def test_values_and_vectors_are_those_of_the_samples(self) -> None:
        found = self.make().of(self.batch())
        assert found.values.shape == (2,) and found.vector.shape == (2, 3)
        assert bool(found.values.isfinite().all() and found.vector.isfinite().all())
        assert bool((found.vector[:, 0] == 0).all())

    def test_every_parameter_is_trained(self) -> None:
        batch = self.batch()
        self.make().of(batch).values.sum().backward()
        for name, parameter in batch.model.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name

    def test_a_vector_that_certifies_bounds_the_margins(self) -> None:
        """Over the whole set where the loss says that it certifies; a region's loss holds for its own region alone."""
        batch, loss = self.batch(), self.make()
        if loss.certifies and not loss.needs_attack(batch.perturbation):
            vector = loss.of(batch).vector
            for seed in range(50):
                z = batch.model(batch.perturbation.sample(batch.x, torch.Generator().manual_seed(seed)))
                others = torch.stack([row[torch.arange(3) != label] for row, label in zip(z, batch.y, strict=True)])
                margins = others - z.gather(1, batch.y[:, None])
                assert bool((margins.sort(1)[0] <= vector[:, 1:].sort(1)[0] + 1e-5).all())

    def test_a_set_of_size_0_leaves_the_clean_images(self) -> None:
        batch = self.batch(0.0)
        vector = self.make().of(batch).vector
        assert bool((certified(vector) == (batch.model(batch.x).argmax(1) == batch.y)).all())

    def test_it_is_registered_and_made_again_from_its_options(self) -> None:
        loss = self.make()
        name = LOSSES.name_of(loss)
        assert LOSSES.make(name, {key: getattr(loss, key) for key in LOSSES.options(name)}) == loss


class MethodTestCase:
    """Subclass it, say what to test in :meth:`make`, and run pytest.

    >>> class TestMine(MethodTestCase):
    ...     def make(self):
    ...         from cure_plugin.certification import Crown
    ...         return Crown()
    >>> TestMine().test_nothing_proved_is_broken()
    """

    def make(self) -> Method:
        """The method to test; a new object each time."""
        raise NotImplementedError

    def sets(self) -> tuple[PerturbationSet, ...]:
        """Sets that it may be tried on."""
        balls = [PerturbationLpBall(norm, eps) for norm, eps in ((math.inf, 0.03), (2, 0.2), (1, 0.5))]
        return (*balls, PerturbationPatch(2, 2), PerturbationGeometric.parse("R(5)"))

    def work(self) -> tuple[Certifier, Tensor, Tensor]:
        """(a certifier that has this method alone, images, the labels that the net gives them)."""
        torch.manual_seed(0)
        front = [nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10), nn.ReLU()]
        net = nn.Sequential(*front, nn.Linear(10, 3)).eval()
        x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return Certifier(net, (1, 8, 8), [self.make()]), x, net(x).argmax(1)

    def test_nothing_proved_is_broken(self) -> None:
        certifier, x, y = self.work()
        for perturbation in self.sets():
            proved = certifier.proved(x, y, perturbation)
            found, _ = find_counterexample(certifier.net, x, y, perturbation, 40, 2, torch.Generator().manual_seed(0))
            assert not bool((proved & found).any()), perturbation

    def test_what_it_refutes_is_misclassified_and_in_the_set(self) -> None:
        certifier, x, y = self.work()
        for perturbation in self.sets():
            verdicts, points = certifier.decide(x, y, perturbation, torch.Generator().manual_seed(0))
            broken = torch.tensor([verdict.status == "falsified" for verdict in verdicts])
            assert bool((certifier.net(points).argmax(1) != y)[broken].all()), perturbation
            assert bool(perturbation.contains(x, points, 1e-4).all()), perturbation

    def test_images_of_a_batch_do_not_mix(self) -> None:
        certifier, x, y = self.work()
        for perturbation in self.sets()[::3]:
            together = certifier.proved(x, y, perturbation)
            alone = torch.cat([certifier.proved(x[i : i + 1], y[i : i + 1], perturbation) for i in range(len(x))])
            assert torch.equal(together, alone), perturbation

    def test_labels_that_the_net_does_not_give_are_not_proved(self) -> None:
        certifier, x, y = self.work()
        assert not any(bool(certifier.proved(x, (y + 1) % 3, perturbation).any()) for perturbation in self.sets())

    def test_it_is_registered_and_made_again_from_its_options(self) -> None:
        method = self.make()
        name = METHODS.name_of(method)
        assert METHODS.make(name, {key: getattr(method, key) for key in METHODS.options(name)}) == method


class VerifierTestCase:
    """Subclass it, say what to test in :meth:`make`, and run pytest.

    >>> class TestMine(VerifierTestCase):
    ...     def make(self):
    ...         from cure_plugin.export import CureVerifier
    ...         return CureVerifier()
    >>> TestMine().test_nothing_that_it_answers_is_wrong()
    """

    timeout: float = 60
    """Seconds for each question."""

    def make(self) -> Verifier:
        """The verifier to test; a new object each time."""
        raise NotImplementedError

    def answers(self) -> tuple[Run, Run]:
        """What it says of a net that a box leaves robust by far, and of one that it does not.

        The classes tie where the mean of the pixels is 0.5; it is 0.7, in boxes of 0.1 and 0.3.
        """
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
        with torch.no_grad():
            numbers = ([[0.25] * 4], [0.0], [[1.0], [-1.0]], [0.0, 1.0])
            for parameter, values in zip(net.parameters(), numbers, strict=True):
                parameter.copy_(torch.tensor(values))
        data = ImageData(torch.full((1, 1, 2, 2), 178, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), 2)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sets = [LpBallSpec("linf", eps) for eps in ("0.1", "0.3")]
            export_instances(net, data, sets, folder, timeout=self.timeout)
            robust, broken = verify(folder / "instances.csv", self.make(), folder / "out")
        return robust, broken

    def test_nothing_that_it_answers_is_wrong(self) -> None:
        robust, broken = self.answers()
        assert robust.result in ("unsat", "unknown", "timeout"), robust
        assert broken.result in ("sat", "unknown", "timeout") and not broken.fault, broken

    def test_it_is_registered_under_its_name(self) -> None:
        verifier = self.make()
        assert find_verifier(verifier.name) == verifier
