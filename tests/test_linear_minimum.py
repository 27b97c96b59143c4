"""The closed-form minima against an independent LP and an independent convex solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog

from cure_plugin.sets import linear_minimum
from cure_plugin.sets.linear_minimum import box_minimum, in_chunks, l1_box_minimum, l2_box_minimum

BLOCKS = [range(first, first + 100) for first in range(0, 1000, 100)]
"""Seeds of 1,000 random problems."""


def random_problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 12))
    a = rng.normal(size=size) * rng.choice([0.0, 1.0, 1e-3, 10.0], size=size)
    low = -rng.uniform(0, 1, size) * rng.choice([0.0, 1.0], size)
    high = rng.uniform(0, 1, size) * rng.choice([0.0, 1.0], size)
    return a, low, high, float(rng.choice([0.0, 0.05, 0.4, 1.5, 20.0]))


def tensors(*arrays: np.ndarray | float) -> list[torch.Tensor]:
    return [torch.as_tensor(array, dtype=torch.float64) for array in arrays]


@pytest.mark.parametrize("seeds", BLOCKS, ids=str)
def test_l1_equals_linear_program(seeds: range) -> None:
    for seed in seeds:
        a, low, high, eps = random_problem(seed)
        budget = np.ones((1, 2 * len(a)))  # d = p - n with p, n >= 0
        bounds = [(0, h) for h in high] + [(0, -lo) for lo in low]
        expected = linprog(np.concatenate([a, -a]), A_ub=budget, b_ub=[eps], bounds=bounds).fun
        found = l1_box_minimum(*tensors(a, low, high), torch.tensor([eps], dtype=torch.float64))
        assert float(found) == pytest.approx(expected, abs=1e-7), seed


def l2_minimum_by_root_finding(a: np.ndarray, low: np.ndarray, high: np.ndarray, eps: float) -> float:
    """Minimum of a . d over low <= d <= high, ||d||_2 <= eps, from its optimality condition."""

    def step(multiplier: float) -> np.ndarray:
        return np.clip(-a / multiplier, low, high)

    corner = np.where(a > 0, low, np.where(a < 0, high, 0))
    if np.linalg.norm(corner) <= eps:
        return float(a @ corner)
    if eps == 0:
        return 0.0
    log = brentq(lambda t: np.linalg.norm(step(np.exp(t))) - eps, -40, 40, xtol=1e-14)
    return float(a @ step(np.exp(log)))


@pytest.mark.parametrize("seeds", BLOCKS, ids=str)
def test_l2_equals_root_finding_on_the_optimality_condition(seeds: range) -> None:
    for seed in seeds:
        a, low, high, eps = random_problem(seed)
        found = l2_box_minimum(*tensors(a, low, high), torch.tensor([eps], dtype=torch.float64))
        assert float(found) == pytest.approx(l2_minimum_by_root_finding(a, low, high, eps), abs=1e-7), seed


@pytest.mark.parametrize("minimum", [l1_box_minimum, l2_box_minimum])
def test_gradient_matches_finite_differences(minimum) -> None:
    a, low, high, _ = random_problem(3)
    a, low, high = tensors(a + 0.1, low - 0.1, high + 0.1)
    eps = torch.tensor([0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: minimum(v, low, high, eps), a.requires_grad_())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, low, high = torch.randn(5, 1, 7, 6), -torch.rand(1, 4, 7, 6), torch.rand(1, 4, 7, 6)
    eps = torch.rand(1, 4, 1, 1)
    whole = [in_chunks(box_minimum, a, low, high), in_chunks(l2_box_minimum, a, low, high, eps)]
    monkeypatch.setattr(linear_minimum, "_CHUNK_ELEMENTS", 100)
    pieces = [in_chunks(box_minimum, a, low, high), in_chunks(l2_box_minimum, a, low, high, eps)]
    for one, other in zip(whole, pieces, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
