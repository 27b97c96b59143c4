"""Attacks made together, and the net they are made on: same answers, inside the sets, model untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cure_plugin.attacks import Pgd, cross_entropy, pgd, pgd_variable, pgd_variables, worst_margin_loss
from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.folding import AttackNet
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.sets import set_spec

SPECS = ("linf=0.1", "l2=0.5", "l1=2.0", "R(10)", "patch=3x3")


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    return load_data("mnist-slice", True).batch(slice(0, 8))


def with_statistics(name: str = "cnn_small") -> nn.Sequential:
    """A net whose BatchNorm layers have seen data and have weights of their own."""
    net = build_net(NetSpec(name, (1, 28, 28), batch_norm=True), torch.Generator().manual_seed(0)).train()
    generator = torch.Generator().manual_seed(1)
    for module in net:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(16, 1, 28, 28, generator=generator))
    return net


def test_one_job_is_the_plain_attack(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    net, ball = with_statistics(), set_spec("l2=0.5").build()
    alone = pgd_variable(net, x, y, ball, generator=torch.Generator().manual_seed(0))
    (together,) = pgd_variables(net, [(x, y, ball)], generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_options_one_by_one_are_those_of_a_search(batch: tuple[Tensor, Tensor]) -> None:
    """As version 0.1 had them, in their place or by name, with a warning; a wrong one is refused all the same."""
    x, y = batch
    net, ball = with_statistics(), set_spec("l2=0.5").build()
    wanted = pgd(net, x, y, ball, Pgd(3, worst_margin_loss, True, 0.5), torch.Generator().manual_seed(0))
    with pytest.warns(DeprecationWarning, match="options of pgd will go"):
        old = pgd(net, x, y, ball, 3, worst_margin_loss, True, torch.Generator().manual_seed(0), 0.5)
    assert torch.equal(old, wanted)
    with pytest.warns(DeprecationWarning, match="options of pgd_variables will go"):
        named = pgd_variables(net, [(x, y, ball)], steps=3, random_start=False, best=False)
    assert torch.equal(named[0][0], pgd_variables(net, [(x, y, ball)], Pgd(3, random_start=False), best=False)[0][0])
    with pytest.warns(DeprecationWarning, match="will go"), pytest.raises(SpecError, match="steps"):
        pgd_variable(net, x, y, ball, -1)


@pytest.mark.parametrize("best", [False, True])
def test_jobs_of_different_sizes_stay_in_their_sets_and_gain(best: bool, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    net = with_statistics().eval()
    jobs = [(x[k:], y[k:], set_spec(text).build()) for k, text in enumerate(SPECS)]
    found = pgd_variables(net, jobs, generator=torch.Generator().manual_seed(0), best=best)
    for (some, labels, perturbation), (variable, value) in zip(jobs, found, strict=True):
        point = perturbation.decode(some, variable)
        assert bool(perturbation.contains(some, point, 1e-4).all())
        with torch.no_grad():
            reached, clean = cross_entropy(net(point), labels), cross_entropy(net(some), labels)
        assert float((reached - clean).mean()) > 0
        assert not best or torch.allclose(reached, value, atol=1e-4)


def test_the_last_variables_are_those_of_the_separate_attacks(batch: tuple[Tensor, Tensor]) -> None:
    """Without random starts, sets attacked together end where they end alone."""
    x, y = batch
    net = with_statistics()
    jobs = [(x, y, set_spec(text).build()) for text in ("linf=0.1", "l2=0.5")]
    together = pgd_variables(net, jobs, Pgd(random_start=False), best=False, first_steps=[0.5, 0.2])
    for job, step, (variable, _) in zip(jobs, (0.5, 0.2), together, strict=True):
        ((alone, _),) = pgd_variables(net, [job], Pgd(random_start=False), best=False, first_steps=[step])
        assert torch.allclose(variable, alone, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["cnn_small", "cnn7_narrow"])
def test_folding_is_exact_and_leaves_the_model_alone(
    name: str, channels_last: bool, nested: bool, batch: tuple[Tensor, Tensor]
) -> None:
    x, _ = batch
    net = with_statistics(name)
    model = nn.Sequential(net[:4], net[4:]) if nested else net
    before = {key: value.clone() for key, value in model.state_dict().items()}
    formats = [p.is_contiguous() for p in model.parameters()]
    folded = AttackNet(model, channels_last=channels_last)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters()) and all(p.requires_grad for p in model.parameters())
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert formats == [p.is_contiguous() for p in model.parameters()]
    with torch.no_grad():
        assert torch.allclose(folded(x), model.eval()(x), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layer", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 1)}], ids=str)
def test_gradients_of_images_are_those_of_the_model(channels: int, layer: dict[str, Any]) -> None:
    net = nn.Sequential(
        nn.Conv2d(channels, 4, 3, **layer), nn.ReLU(), nn.Conv2d(4, 2, 3, padding="same"), nn.ReLU(), nn.Flatten()
    ).eval()
    x = torch.rand(3, channels, 9, 8, requires_grad=True)
    weights = torch.randn(net(x).shape)
    expected, found = (torch.autograd.grad((one(x) * weights).sum(), x)[0] for one in (net, AttackNet(net)))
    torch.testing.assert_close(found, expected)


def test_layers_that_mind_how_images_lie_in_memory_get_them_as_they_were() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1)

    net = nn.Sequential(nn.Conv2d(3, 2, 3), Rows(), nn.Linear(32, 2)).eval()
    x = torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(AttackNet(net)(x), net(x))


def test_bfloat16_attacks_return_floats_near_the_truth(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    net = with_statistics().eval()
    with torch.no_grad():
        logits = AttackNet(net, amp=True)(x)
        assert logits.dtype == torch.float32 and torch.allclose(logits, net(x), atol=0.2)


def test_a_batch_norm_that_stands_first_or_has_no_statistics_stays(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    net = nn.Sequential(
        nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()
    )
    folded = AttackNet(net.eval())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 2
    with torch.no_grad():
        assert torch.allclose(folded(x), net(x), atol=1e-5)


def test_models_that_are_no_chain_are_called_as_they_are(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = with_statistics()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x.flatten(1)[:, :10]

    model = Residual().train()
    point, _ = pgd_variable(AttackNet(model), x, y, set_spec("linf=0.1").build(), Pgd(2))
    assert point.shape == x.shape and model.training and model.inner.training
    assert all(parameter.grad is None for parameter in model.parameters())


class Shifted(nn.Sequential):
    """A chain by type that does more than its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5)


@pytest.mark.parametrize("nested", [False, True])
def test_chains_with_a_forward_of_their_own_are_not_taken_apart(nested: bool, batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    inner = Shifted(*with_statistics())
    net = nn.Sequential(inner, nn.ReLU()) if nested else inner
    with torch.no_grad():
        assert torch.allclose(AttackNet(net)(x), net.eval()(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["no affine", "weight norm", "spectral norm", "hook", "shared ReLU"])
def test_unusual_layers_keep_their_meaning(kind: str, batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    linear, relu = nn.Linear(784, 6), nn.ReLU()
    norm = nn.BatchNorm1d(6, affine=kind != "no affine")
    norm.running_mean = torch.linspace(-1, 1, 6)
    layers: list[nn.Module] = [nn.Flatten(), linear, norm, relu, nn.Linear(6, 4), relu]
    if kind == "weight norm":
        nn.utils.parametrizations.weight_norm(linear)
    elif kind == "spectral norm":
        nn.utils.parametrizations.spectral_norm(linear)
    elif kind == "hook":
        linear.register_forward_hook(lambda module, inputs, output: output + 1)
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        assert torch.allclose(AttackNet(net)(x), net(x), atol=1e-5)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x) + 1


@pytest.mark.parametrize("kind", ["subclass", "channels in the middle", "as many"])
def test_only_what_folds_exactly_is_folded(kind: str) -> None:
    torch.manual_seed(0)
    layers, x = {
        "subclass": ([nn.Conv2d(1, 2, 3), OwnNorm(2)], torch.rand(3, 1, 5, 5)),
        "channels in the middle": ([nn.Linear(4, 6), nn.BatchNorm1d(5)], torch.rand(3, 5, 4)),
        "as many": ([nn.Linear(4, 4), nn.BatchNorm1d(4)], torch.rand(3, 4, 4)),
    }[kind]
    net = nn.Sequential(*layers)
    net(torch.rand_like(x) + 2)  # statistics of their own
    assert torch.allclose(AttackNet(net)(x), net.eval()(x), atol=1e-5)
