"""Shared fixtures: small nets of every front end that the sets must survive, seeded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is there, and for the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

import cure_plugin  # noqa: F401  (mends auto_LiRPA before any test imports it)
from cure_plugin import registry
from cure_plugin.nets import Normalize

SIDE = 8


class RawNormalize(nn.Module):
    """``(x - mean) / std`` with plain buffers, as users write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.register_buffer("mean", torch.full(shape, 0.3))
        self.register_buffer("std", torch.full(shape, 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def shifted_batch_norm(channels: int) -> nn.BatchNorm2d:
    """A BatchNorm in eval mode that scales (by a negative factor too) and shifts."""
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.running_mean.fill_(0.2)
        layer.running_var.fill_(0.1)
        layer.weight.copy_(torch.linspace(-1.5, 1.5, channels) if channels > 1 else torch.tensor([-1.5]))
        layer.bias.fill_(0.3)
    return layer


def tail(channels: int) -> list[nn.Module]:
    """A small convolutional classifier of 8 x 8 images with 3 classes."""
    return [
        nn.Conv2d(channels, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    ]


FRONTS = ("plain", "normalize", "raw-normalize", "batch-norm", "conv-batch-norm", "linear")


def small_net(front: str, channels: int = 1) -> nn.Sequential:
    """The classifier behind one of :data:`FRONTS`, in eval mode."""
    if front == "linear":
        layers = [nn.Flatten(), nn.Linear(channels * SIDE * SIDE, 10), nn.ReLU(), nn.Linear(10, 3)]
    else:
        layers = tail(channels)
    if front == "normalize":
        layers.insert(0, Normalize([0.3] * channels, [0.25] * channels))
    elif front == "raw-normalize":
        layers.insert(0, RawNormalize(channels))
    elif front == "batch-norm":
        layers.insert(0, shifted_batch_norm(channels))
    elif front == "conv-batch-norm":
        layers.insert(1, shifted_batch_norm(4))
    return nn.Sequential(*layers).eval()


def one_fast(names: Sequence[str]) -> list[Any]:
    """Parameters of a test, of which the last runs in the fast suite and the others in the slow one."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names[:-1]] + [names[-1]]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


Shared = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """``made_once(name, make)``: a folder that ``make`` fills, once for all processes that run tests."""
    together = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        together = together.parent

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path = together / f"once {name}"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                unfinished = path.with_suffix(".part")
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(path)
        return path

    return folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``installed(group=(name, module), ...)``: as if packages declared these entry points of ``cure_plugin.GROUP``."""

    def declare(**declared: tuple[str, str]) -> None:
        found = [EntryPoint(*named, f"cure_plugin.{group}") for group, named in declared.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: [one for one in found if one.group == group])
        registry.load_installed.cache_clear()

    yield declare
    registry.load_installed.cache_clear()


@pytest.fixture
def images() -> Tensor:
    """Three 8 x 8 images with pixels at the ends of the domain as well as inside."""
    x = torch.rand(3, 1, SIDE, SIDE)
    x[x < 0.3] = 0
    x[x > 0.8] = 1
    return x


class ResidualNet(nn.Module):
    """As people write their nets: no chain, BatchNorm behind a sum, sizes of the batch in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 2, 3, padding=1), shifted_batch_norm(2)
        self.block = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), shifted_batch_norm(2), nn.ReLU())
        self.pool, self.last = nn.AvgPool2d(2), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(x))
        hidden = self.norm(hidden + self.block(hidden))
        return self.last(self.pool(hidden).view(x.size(0), -1))
