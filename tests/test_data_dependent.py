"""Nets whose forward does other things for other inputs: a traced graph holds one of them, so they are refused.

Each ``forward`` is one way of letting values, other images, chance or memory decide. What is refused must be refused
at wrapping; what is accepted must keep its bounds below every margin that is attained, on all sides of its switch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification import Certifier
from cure_plugin.errors import SpecError

INPUTS, HIDDEN, CLASSES = 4, 6, 3

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Two layers, and a way to join them."""

    def __init__(self, seed: int, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, CLASSES)
        self.register_buffer("level", torch.tensor(2.0))
        self.calls = 0
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def _hidden(net: Any, x: Tensor) -> Tensor:
    return torch.relu(net.a(x))


def _either(net: Any, x: Tensor, first: Any) -> Tensor:
    return net.b(_hidden(net, x)) if first else net.c(_hidden(net, x))


def _per_image(net: Any, x: Tensor) -> Tensor:
    return torch.cat([_either(net, one[None], one.sum() > 2.0) for one in x])


def _loop(net: Any, x: Tensor) -> Tensor:
    h, rounds = _hidden(net, x), 0
    while h.sum() < 8 and rounds < 5:
        h, rounds = h + 1, rounds + 1
    return net.b(h)


def _counted(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return _either(net, x, net.calls % 2)


def _kept(net: Any, x: Tensor) -> Tensor:
    before = getattr(net, "before", None)
    net.before = x.detach().mean()
    return net.b(_hidden(net, x)) * (1.0 if before is None else 1 + before)


def _caught(net: Any, x: Tensor) -> Tensor:
    try:
        assert x.sum() > 2.0
    except AssertionError:
        return net.c(_hidden(net, x))
    return net.b(_hidden(net, x))


def _scripted(net: Any, x: Tensor) -> Tensor:
    return _leaf(_hidden(net, x)) @ net.b.weight.T


@torch.jit.script
def _leaf(h: Tensor) -> Tensor:
    if bool(h.sum() > 2.0):
        return h
    return -h


READS: dict[str, Forward] = {
    "bool": lambda net, x: _either(net, x, bool(x.sum() > 2.0)),
    "if": lambda net, x: _either(net, x, x.sum() > 2.0),
    "and": lambda net, x: _either(net, x, x.sum() > 2.0 and x[0, 0] > 0.1),
    "not": lambda net, x: _either(net, x, not x.sum() > 2.0),
    "item": lambda net, x: _either(net, x, x.sum().item() > 2.0),
    "float": lambda net, x: net.b(_hidden(net, x)) * float(x.sum()),
    "int": lambda net, x: net.b(_hidden(net, x)) * int(x.sum()),
    "tolist": lambda net, x: net.b(_hidden(net, x)) + x.tolist()[0][0],
    "numpy": lambda net, x: net.b(_hidden(net, x)) + float(x.detach().numpy().sum()),
    "numpy again": lambda net, x: net.b(_hidden(net, torch.from_numpy(np.round(x.detach().numpy())))),
    "array": lambda net, x: _either(net, x, np.asarray(x.detach()).sum() > 2.0),
    "format": lambda net, x: _either(net, x, float(f"{x.sum().detach():.3f}") > 2.0),
    "any": lambda net, x: _either(net, x, (x > 0.5).any()),
    "all": lambda net, x: _either(net, x, torch.all(x > 0.3)),
    "allclose": lambda net, x: _either(net, x, torch.allclose(x, torch.full_like(x, 0.8))),
    "equal": lambda net, x: _either(net, x, torch.equal(x.round(), torch.ones_like(x))),
    "contains": lambda net, x: _either(net, x, 1.0 in x.round()),
    "hidden": lambda net, x: _either(net, x, _hidden(net, x).max() > 0.7),
    "logits": lambda net, x: _either(net, x, net.c(_hidden(net, x)).argmax() == 1),
    "sign": lambda net, x: net.b(_hidden(net, x)) * (1 if net.b(_hidden(net, x))[0, 0] > 0 else -1),
    "index": lambda net, x: net.b(_hidden(net, x)) * x[0, int(x.argmax())],
    "slice": lambda net, x: net.b(F.pad(_hidden(net, x)[:, : int(x.sum())], (0, HIDDEN - int(x.sum())))),
    "shape of a pick": lambda net, x: net.b(_hidden(net, x)) * len(x[x > 0.5]),
    "nonzero": lambda net, x: net.b(_hidden(net, x)) * (x > 0.5).nonzero().shape[0],
    "unique": lambda net, x: net.b(_hidden(net, x)) * torch.unique(x.round()).shape[0],
    "loop": _loop,
    "per image": _per_image,
    "assertion": _caught,
    "weights too": lambda net, x: _either(net, x, x.sum() > net.level),
    "detached": lambda net, x: _either(net, x, x.detach().sum() > 2.0),
    "data": lambda net, x: _either(net, x, x.data.sum() > 2.0),
    "scripted": _scripted,
}
"""Values decide in Python: read by ``bool``, ``item``, ``numpy`` and their like."""

FALSE_TO_GRAPHS: dict[str, Forward] = {
    "data": lambda net, x: net.b(_hidden(net, x) * x.data.sum(1, keepdim=True)),
    "noise": lambda net, x: net.b(_hidden(net, x + torch.rand_like(x))),
    "dropout": lambda net, x: net.b(F.dropout(_hidden(net, x), 0.5, True)),
    "counted": _counted,
    "kept": _kept,
    "tracing": lambda net, x: _either(net, x, torch.jit.is_tracing()),
    "batch size": lambda net, x: _either(net, x, x.shape[0] == 1),
    "large batches": lambda net, x: _either(net, x, x.shape[0] < 7),
    "others' mean": lambda net, x: net.b(_hidden(net, x - x.mean(0))),
    "others' sum": lambda net, x: net.b(_hidden(net, x / x.sum())),
    "batch's maximum": lambda net, x: net.b(_hidden(net, x - x.max())),
    "batch statistics": lambda net, x: net.b(F.batch_norm(_hidden(net, x), None, None, training=len(x) > 1)),
    "rolled": lambda net, x: net.b(_hidden(net, x.roll(1, 0))),
    "first image": lambda net, x: net.b(_hidden(net, x[:1].expand_as(x))),
}
"""Graphs that hold for one batch, one call or one moment."""

SWITCHES: dict[str, Forward] = {
    "where": lambda net, x: torch.where(x.sum(1, keepdim=True) > 2, net.b(_hidden(net, x)), net.c(_hidden(net, x))),
    "mask": lambda net, x: net.b(_hidden(net, x)) * (x.sum(1, keepdim=True) > 2.0).float(),
    "mask filled": lambda net, x: net.b(_hidden(net, x).masked_fill(x.sum(1, keepdim=True) > 2.0, 3.0)),
    "signs": lambda net, x: net.b(_hidden(net, x)) * torch.sign(x.sum(1, keepdim=True) - 2.0),
    "floor": lambda net, x: net.b(_hidden(net, x)) + torch.floor(x.sum(1, keepdim=True)),
    "round": lambda net, x: net.b(_hidden(net, torch.round(2 * x))),
    "heaviside": lambda net, x: net.b(_hidden(net, x)) * torch.heaviside(x.sum(1, keepdim=True) - 2, x[:, :1]),
    "remainder": lambda net, x: net.b(_hidden(net, x)) * torch.remainder(x.sum(1, keepdim=True), 1.0),
    "gather": lambda net, x: net.b(_hidden(net, x)) * x.gather(1, x.argmax(1, keepdim=True)),
    "sort": lambda net, x: net.b(_hidden(net, x.sort(1)[0])),
    "topk": lambda net, x: net.b(_hidden(net, x.topk(INPUTS, 1)[0])),
    "maximum": lambda net, x: torch.maximum(net.b(_hidden(net, x)), net.c(_hidden(net, x))),
    "median": lambda net, x: net.b(_hidden(net, x)) * x.median(1, keepdim=True)[0],
    "one hot": lambda net, x: net.b(_hidden(net, F.one_hot(x.argmax(1), INPUTS).float())),
    "cumulative": lambda net, x: net.b(_hidden(net, x.cumsum(1))),
    "clamped": lambda net, x: net.b(_hidden(net, torch.minimum(x, x.mean(1, keepdim=True)))),
    "whole numbers": lambda net, x: net.b(_hidden(net, x)) * x.sum(1, keepdim=True).int(),
}
"""Values decide within the graph: refused, or bounded by sound bounds."""


def _is_broken(forward: Forward, seed: int) -> bool:
    """Whether a bound is above a margin that its own clean image attains; refusals count as sound."""
    net = Net(seed, forward).eval()
    try:
        certifier = Certifier(net, (INPUTS,))
    except SpecError:
        return False
    ball = PerturbationLpBall(math.inf, 0.05)
    for value in (0.2, 0.4, 0.499, 0.501, 0.6, 0.8):
        x, y = torch.full((1, INPUTS), value), torch.zeros(1, dtype=torch.long)
        points = ball.sample(x.repeat(200, 1), torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits = torch.cat([net(point[None]) for point in (*x, *points)])
        attained = float((logits[:, 0] - logits[:, 1:].amax(1)).min())
        for method in ("IBP", "CROWN-IBP", "CROWN", "coupled", "alpha-CROWN"):
            try:
                if float(certifier.lower_bound(x, y, ball, method)) > attained + 1e-4:
                    return True
            except SpecError:
                continue
    return False


@pytest.mark.parametrize("name", READS)
def test_values_read_by_the_forward_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="reads values"):
        bounded_module(Net(0, READS[name]), (INPUTS,))


@pytest.mark.parametrize("name", FALSE_TO_GRAPHS)
def test_graphs_of_one_moment_are_refused(name: str) -> None:
    with pytest.raises(SpecError):
        bounded_module(Net(0, FALSE_TO_GRAPHS[name]), (INPUTS,))


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_refused_or_bounded_soundly(name: str) -> None:
    assert not any(_is_broken(SWITCHES[name], seed) for seed in range(3))
