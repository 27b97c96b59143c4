"""Patch and l0 sets against brute-force enumeration, in every layout of rows."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from auto_LiRPA import BoundedTensor
from torch import Tensor, nn

from cure_plugin import PerturbationL0, PerturbationPatch, PerturbationSet
from cure_plugin.bounds.module import bounded_module
from cure_plugin.sets.rows import Rows, rows_of_convolution, rows_of_matrix


def enumerate_patch(a: Tensor, x: Tensor, height: int, width: int, block: tuple[int, int, int, int]) -> Tensor:
    """Smallest a . (x' - x) over every position and every corner of the square's box; a (S, C, H, W), x (C, H, W)."""
    gain = torch.minimum(-a * x, a * (1 - x)).sum(1)
    r0, r1, c0, c1 = block
    sums = [gain[:, r : r + height, c : c + width].sum((1, 2)) for r in range(r0, r1 + 1) for c in range(c0, c1 + 1)]
    return torch.stack(sums).amin(0)


def enumerate_l0(a: Tensor, x: Tensor, pixels: int) -> Tensor:
    """Smallest a . (x' - x) over every choice of pixels."""
    gain = torch.minimum(-a * x, a * (1 - x)).sum(1).flatten(1)
    choices = [gain[:, list(chosen)].sum(1) for chosen in combinations(range(gain.shape[1]), pixels)]
    return torch.stack(choices).amin(0)


BLOCKS = [range(first, first + 10) for first in range(0, 100, 10)]
"""Seeds; each makes 10 random problems (2 images, 5 linear functions), so 1,000 in all."""


def random_problems(seed: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    """Images (2, C, S, S) and linear functions (2, 5, C, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, channels, side, side, generator=generator, dtype=torch.float64)
    return x, torch.randn(2, 5, channels, side, side, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seeds", BLOCKS, ids=str)
def test_patch_minimum_equals_enumeration(seeds: range) -> None:
    for seed in seeds:
        channels, side = (1, 7) if seed % 2 else (3, 6)
        x, a = random_problems(seed, channels, side)
        rng = random.Random(seed)
        height, width = rng.randint(1, 4), rng.randint(1, 4)
        r0, r1 = sorted(rng.randint(0, side - height) for _ in range(2))
        c0, c1 = sorted(rng.randint(0, side - width) for _ in range(2))
        block = (r0, r1, c0, c1)
        found = PerturbationPatch(height, width, block).deviation(x, rows_of_matrix(a, (channels, side, side)))
        expected = torch.stack([enumerate_patch(a[b], x[b], height, width, block) for b in range(2)])
        assert torch.allclose(found, expected, atol=1e-9), seed


@pytest.mark.parametrize("seeds", BLOCKS, ids=str)
def test_l0_minimum_equals_enumeration(seeds: range) -> None:
    for seed in seeds:
        x, a = random_problems(seed, 2, 3)
        pixels = seed % 5
        found = PerturbationL0(pixels).deviation(x, rows_of_matrix(a, (2, 3, 3)))
        expected = torch.stack([enumerate_l0(a[b], x[b], pixels) for b in range(2)])
        assert torch.allclose(found, expected, atol=1e-9), seed


@pytest.mark.parametrize(
    "perturbation",
    [PerturbationPatch(3, 2), PerturbationPatch(2, 2, (2, 4, 1, 5)), PerturbationL0(3)],
    ids=repr,
)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 1), (3, 0)])
def test_rows_of_a_convolution_equal_its_dense_matrix(
    perturbation: PerturbationSet, stride: int, padding: int, dilation: int
) -> None:
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    pairs = (stride, stride), (padding, padding), (dilation, dilation)
    output = F.conv2d(x, weight, None, *pairs)
    rows = rows_of_convolution(weight, *pairs, (output.shape[2], output.shape[3]))
    local = rows.restore(perturbation.deviation(x, rows))
    jacobian = torch.autograd.functional.jacobian(lambda v: F.conv2d(v, weight, None, *pairs).flatten(1).sum(0), x[:1])
    dense: Rows = rows_of_matrix(jacobian.view(-1, 2, 8, 8).expand(2, -1, -1, -1, -1), (2, 8, 8))
    exact = perturbation.deviation(x, dense).view_as(local)
    assert bool((local <= exact + 1e-9).all())
    if dilation == 1:
        assert torch.allclose(local, exact, atol=1e-9)


def test_the_first_layer_is_touched_only_within_reach() -> None:
    layer = nn.Conv2d(1, 3, 3, padding=1)
    net = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.rand(1, 1, 12, 12)
    bounded = bounded_module(net, (1, 12, 12))
    bounded.compute_bounds(x=(BoundedTensor(x, PerturbationPatch(2, 2, (5, 5, 7, 7))),), method="IBP")
    node = bounded.relus[0].inputs[0]
    touched = (node.upper - node.lower).amax(1)[0] > 1e-6
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[4:8, 6:10] = True  # (p + k - 1)^2 outputs
    assert torch.equal(touched, expected)


def test_per_sample_blocks_and_splits() -> None:
    x = torch.rand(2, 1, 6, 6)
    a = rows_of_matrix(torch.randn(2, 4, 1, 6, 6), (1, 6, 6))
    blocks = torch.tensor([[0, 0, 1, 2], [3, 4, 0, 4]])
    together = PerturbationPatch(2, 2, blocks).deviation(x, a)
    for i, block in enumerate(blocks.tolist()):
        alone = PerturbationPatch(2, 2, tuple(block)).deviation(x, a)
        assert torch.allclose(together[i], alone[i])
    whole = PerturbationPatch(2, 2, (0, 4, 0, 4))
    halves = torch.stack([half.deviation(x, a) for half in whole.split(x[:1])])
    assert torch.allclose(halves.amin(0), whole.deviation(x, a))
    assert PerturbationPatch(2, 2, (1, 1, 2, 2)).split(x[:1]) == ()
    pieces = PerturbationPatch(2, 2).split(x[:1])
    assert torch.allclose(pieces[0].stack(pieces).deviation(x, a)[1], pieces[1].deviation(x, a)[1])
