"""Small nets with a planted counterexample that attacks miss.

The idea is that of Zhou et al., "SoundnessBench: A Soundness Benchmark for Neural Network Verifiers"
(github.com/MVP-Harry/SoundnessBench): its families of nets without transformers, a counterexample at the set's border,
training on two aims with a window of attack points. Ours are l2 and l1 balls too, a slope that leads attacks away from
the planted point, which keeps the training to seconds, and strong weight decay, which keeps bounds close: a wrong one
is then soon above the planted margin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall
from cure_plugin.attacks import Pgd, pgd, worst_margin_loss

COUNT = 40
STORED = Path(__file__).parent / "fixtures" / "planted.pt"

FAMILIES = (
    "mlp",
    "deep-mlp",
    "conv1",
    "conv2",
    "conv3",
    "average-pool",
    "mlp-tanh",
    "conv2-tanh",
    "mlp-sigmoid",
    "conv2-sigmoid",
)
NORMS = ((math.inf, 0.2), (2, 0.8), (1, 2.0))
"""(p, radius)."""

_ATTEMPTS = 6
"""Trainings per seed at most, each longer or with less weight decay than the one before."""

_STEPS, _ATTACKED_STEPS, _WINDOW = 350, 100, 600
"""Of the first training; the last so many of them with attacks, whose last so many points stay in the loss."""

_CLEAN, _SLOPE = 0.35, 0.2
"""Margin wanted at x, and by how much it shall rise on the way to the planted point: attacks walk the other way."""

_CAP = 0.8
"""From this share of the way on, the margin is left free to fall."""

_PLANTED, _ATTACKED = -0.1, 0.1
"""Margins wanted: at the planted point, and at least at points that attacks find."""

_HIDDEN = -0.02
"""Margin at the planted point with which a training counts as done."""


@dataclass(frozen=True)
class Planted:
    """A net that gets ``x`` (1, 1, side, side) right and ``point``, in the set at its border, wrong."""

    net: nn.Sequential
    x: Tensor
    y: Tensor
    perturbation: PerturbationLpBall
    point: Tensor

    def margin(self, points: Tensor) -> Tensor:
        """z_y - max over j != y of z_j at ``points`` (B, 1, side, side); (B,)."""
        return -worst_margin_loss(self.net(points), self.y.expand(len(points)))


def family(seed: int) -> str:
    """Which of :data:`FAMILIES` the net of ``seed`` belongs to."""
    return FAMILIES[seed % len(FAMILIES)]


def side(seed: int) -> int:
    """Rows and columns of its images."""
    return 5 + seed // 3 % 4


def classes(seed: int) -> int:
    """Number of its logits."""
    return 3 + seed // 7 % 3


def build_net(seed: int) -> nn.Sequential:
    """The untrained net of ``seed``, with torch's global generator; a first layer steep enough for a narrow dip."""
    name, size = family(seed), side(seed)
    activation = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}.get(name.rpartition("-")[2], nn.ReLU)
    layers: list[nn.Module] = []
    if "mlp" in name:
        widths = [size * size, 16, 12, 12, 12] if name == "deep-mlp" else [size * size, 20, 12]
        layers.append(nn.Flatten())
    else:
        convolutions = int(name[4]) if name.startswith("conv") else 2
        stride = 1 if name == "average-pool" else 2
        layers += [nn.Conv2d(1, 6, 3, stride=stride, padding=1), activation()]
        if name == "average-pool":
            layers.append(nn.AvgPool2d(2))
        for _ in range(convolutions - 1):
            layers += [nn.Conv2d(6, 6, 3, padding=1), activation()]
        layers.append(nn.Flatten())
        after = size // 2 if name == "average-pool" else (size + 1) // 2
        widths = [6 * after * after, 12]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    net = nn.Sequential(*layers, nn.Linear(widths[-1], classes(seed)))
    first = next(layer for layer in net if isinstance(layer, nn.Linear | nn.Conv2d))
    assert first.bias is not None
    with torch.no_grad():
        first.weight *= 12 if activation is nn.Sigmoid else 3  # its slope is 1/4
        first.bias -= first.weight.flatten(1).sum(1) / 2  # pixels are about 1/2
    return net


def _untrained(seed: int, generator: torch.Generator) -> Planted:
    """A random net, image and label, and a point at the border of the set around the image."""
    p, radius = NORMS[seed % len(NORMS)]
    x = 0.05 + 0.9 * torch.rand(1, 1, side(seed), side(seed), generator=generator)
    y = torch.randint(classes(seed), (1,), generator=generator)
    point = _border_point(x, p, 0.99 * radius, generator)
    return Planted(build_net(seed), x, y, PerturbationLpBall(p, radius), point)


def _border_point(x: Tensor, p: float, radius: float, generator: torch.Generator) -> Tensor:
    """linf: a corner. l1: some pixels at the domain's ends. l2: a random direction. Cut with [0, 1]."""
    direction = torch.randn(x.shape, generator=generator)
    if p == math.inf:
        return (x + radius * direction.sign()).clamp(0, 1)
    if p == 2:
        offset = direction
        for _ in range(50):  # clamping shortens it, so that it is lengthened again
            offset = (x + offset * radius / offset.norm()).clamp(0, 1) - x
        return x + offset * min(1.0, radius / float(offset.norm()))
    ends = (direction > 0).to(x)
    room = (ends - x).abs().flatten()
    order = torch.randperm(room.numel(), generator=generator)
    spent = room[order].cumsum(0) - room[order]
    share = torch.zeros_like(room)
    share[order] = ((radius - spent) / room[order]).clamp(0, 1)
    return x + share.view_as(x) * (ends - x)


@contextmanager
def _one_thread(seed: int) -> Iterator[None]:
    """One torch thread and a global generator of its own, for results that can be repeated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def make_planted(seed: int) -> Planted:
    """Train the net of ``seed``, anew from another start while PGD finds a counterexample.

    Raises:
        RuntimeError: no training hid the point.
    """
    for attempt in range(_ATTEMPTS):
        start = seed + COUNT * attempt
        generator = torch.Generator().manual_seed(start)
        with _one_thread(start):
            planted = _untrained(seed, generator)
            _train(planted, 0.4 / 2**attempt, 1 + attempt // 2, generator)
            if _is_hidden(planted, generator):
                return planted
    raise RuntimeError(f"seed {seed}: attacks find the planted point after each of {_ATTEMPTS} trainings")


def found_by_pgd(planted: Planted, copies: int, steps: int, restarts: int, generator: torch.Generator) -> int:
    """How many of so many PGD attacks on the worst margin find a misclassified point.

    Each has ``restarts`` runs of ``steps``: the first from the clean image, the others from random points, every second
    one with momentum.
    """
    x, y = planted.x.repeat(copies, 1, 1, 1), planted.y.repeat(copies)
    found = torch.zeros(copies, dtype=torch.bool)
    for restart in range(restarts):
        momentum = 0.5 if restart % 2 else 0.0
        search = Pgd(steps, worst_margin_loss, restart > 0, momentum)
        points = pgd(planted.net, x, y, planted.perturbation, search, generator)
        with torch.no_grad():
            found |= planted.margin(points) <= 0
    return int(found.sum())


def _is_hidden(planted: Planted, generator: torch.Generator) -> bool:
    """Whether ``point`` is misclassified clearly and ``x`` is not, and 20 PGD attacks find nothing."""
    with torch.no_grad():
        if float(planted.margin(planted.point)) > _HIDDEN or float(planted.margin(planted.x)) <= 0:
            return False
    return found_by_pgd(planted, 20, 40, 2, generator) == 0


def _train(planted: Planted, decay: float, effort: int, generator: torch.Generator) -> None:
    """Fit the slope at random points; push the planted point below 0 and attack points above it.

    Args:
        decay: of the weights; effort: factor of the steps.
    """
    net, x, ball, target = planted.net, planted.x, planted.perturbation, planted.point
    steps, unattacked = effort * _STEPS, effort * (_STEPS - _ATTACKED_STEPS)
    offset = (target - x).flatten()
    direction = offset if ball.p == 2 else offset.sign()  # the planted point is the set's furthest along it
    direction = direction / (offset @ direction)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    many, labels = x.repeat(32, 1, 1, 1), planted.y.repeat(8)
    attacked = x[:0]
    for step in range(steps):
        if step >= unattacked:
            momentum = 0.5 * (step % 2)
            new = pgd(net, many[:8], labels, ball, Pgd(8, worst_margin_loss, momentum=momentum), generator)
            attacked = torch.cat([attacked, new])[-_WINDOW:]
        anywhere = ball.random_start(many, generator)
        share = 2 * torch.rand(len(many), 1, 1, 1, generator=generator) - 1
        towards = ball.project(many, x + (anywhere - x) * (1 - share.abs()) + share * (target - x))
        points = torch.cat([x, anywhere, towards, attacked])
        way = (points - x).flatten(1) @ direction  # 0 at x, 1 at the planted point
        margins = planted.margin(torch.cat([points, target]))
        reached = margins[len(points) - len(attacked) : -1]
        loss = 4 * ((margins[:-1] - _CLEAN - _SLOPE * way).square() * (way < _CAP)).mean()
        loss = loss + (margins[-1] - _PLANTED).abs()
        if len(attacked):
            loss = loss + 2 * F.relu(_ATTACKED - reached).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10)
        optimizer.step()
        schedule.step()


def save_planted(made: dict[int, Planted], path: Path = STORED) -> None:
    """Write nets by their seeds, as plain tensors."""
    nets = {
        seed: {"x": one.x, "y": one.y, "point": one.point, "net": dict(one.net.state_dict())}
        for seed, one in made.items()
    }
    torch.save({"made with": made_with(), "nets": nets}, path)


def made_with() -> str:
    """What the last bits of a training depend on."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


@cache
def _stored() -> dict[str, Any]:
    return torch.load(STORED, weights_only=True)


def stored_seeds() -> list[int]:
    """Whose nets are stored."""
    return list(_stored()["nets"]) if STORED.exists() else []


def stored_with() -> str:
    """:func:`made_with` of the stored nets."""
    return _stored()["made with"]


def load_planted(seed: int) -> Planted:
    """The stored net of ``seed``, which :func:`make_planted` made."""
    record = _stored()["nets"][seed]
    net = build_net(seed)
    net.load_state_dict(record["net"])
    p, radius = NORMS[seed % len(NORMS)]
    return Planted(net, record["x"], record["y"], PerturbationLpBall(p, radius), record["point"])
