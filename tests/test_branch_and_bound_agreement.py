"""Branch and bound beside what is exact or was not written by us, and its leaves beside points of the set."""

from __future__ import annotations

import collections
import copy
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from net_attacks import image, sets_for, worst
from random_nets import Drawn, draw
from searches import Recording, smallest_margin, unstable_values
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall, PerturbationSet
from cure_plugin.attacks import Pgd, pgd, worst_margin_loss
from cure_plugin.certification import BranchAndBound, Certifier
from cure_plugin.certification.bounder import Bounder
from cure_plugin.errors import SpecError
from cure_plugin.export import encode, onnx_model, read_query, write_vnnlib
from cure_plugin.export.marabou import ask_marabou
from cure_plugin.proofs import Question, check_proofs, write_proofs
from cure_plugin.relaxation.root import root
from cure_plugin.relaxation.search import Limits
from cure_plugin.vnncomp.graphs import write_model

TOLERANCE = 1e-6
"""Margins so near 0 that solvers in floating point may differ about their sign."""


def exact_margin(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The margins (B,) of the real-number function of the weights, up to float64."""
    with torch.no_grad():
        return -worst_margin_loss(copy.deepcopy(net).double()(x.double()), y.expand(len(x)))


def small_net(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """(a net of 2 to 4 layers and at most 40 ReLUs, its input's shape)."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    classes = pick.randint(2, 4)
    if seed % 2:
        channels = pick.randint(2, 3)
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 2), nn.ReLU()]
        maps = (channels, 3, 3)
        if pick.random() < 0.4:
            layers += [nn.Conv2d(channels, 2, 2), nn.ReLU()]
            maps = (2, 2, 2)
        layers.append(nn.Flatten())
        sizes, shape = [math.prod(maps), pick.randint(3, 5)], (1, 4, 4)
    else:
        sizes = [pick.randint(3, 8), *(pick.randint(4, 12) for _ in range(pick.randint(1, 3)))]
        shape = (1, 1, sizes[0])
        layers = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(sizes[-1], classes)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    return net, shape


def instance(seed: int) -> tuple[nn.Module, Tensor, Tensor, PerturbationLpBall]:
    """(net, x, its label, an linf ball): radii from well below to well above where an attack starts to win."""
    net, shape = small_net(seed)
    x = torch.rand(1, *shape)
    y = net(x).argmax(1)
    low, high = 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        points = pgd(net, x, y, PerturbationLpBall(math.inf, middle), Pgd(10, worst_margin_loss))
        low, high = (low, middle) if float(exact_margin(net, points, y)) <= 0 else (middle, high)
    return net, x, y, PerturbationLpBall(math.inf, high * (0.4, 0.8, 0.95, 1.05, 1.3, 2.0)[seed // 2 % 6])


def verdicts(seed: int, folder: Path, seconds: float) -> tuple[str, str]:
    """(ours, Marabou's, which may take so many seconds) of an instance, each checked where the other refutes."""
    net, x, y, ball = instance(seed)
    (ours,), points = Certifier(net, tuple(x.shape[1:]), [BranchAndBound(seconds=30)]).decide(x, y, ball)
    encoding = encode(onnx_model(net, tuple(x.shape[1:])), x[0], int(y), ball, "box")
    write_model(encoding.model, folder / "net.onnx")
    write_vnnlib(folder / "p.vnnlib", encoding.wanted)
    theirs = ask_marabou(folder / "net.onnx", read_query(folder / "p.vnnlib"), seconds)
    if ours.status == "falsified":
        assert bool(ball.contains(x, points))
        margin = float(exact_margin(net, ball.project(x.double(), points.double()), y))
        assert margin < TOLERANCE, f"seed {seed}: no counterexample, its margin is {margin:.3g}"
        assert theirs.result != "unsat" or margin > -TOLERANCE, f"seed {seed}: Marabou missed a margin of {margin:.3g}"
    if ours.status == "proved" and theirs.counterexample is not None:
        point = encoding.to_image(theirs.counterexample)[None].double()
        margin = float(exact_margin(net, ball.project(x.double(), point), y))
        assert margin > -TOLERANCE, f"seed {seed}: proved, though Marabou met a margin of {margin:.3g}"
    return ours.status, theirs.result


def test_a_few_verdicts_agree_with_marabou(tmp_path: Path) -> None:
    pytest.importorskip("maraboupy.MarabouCore", reason="Marabou is not installed")
    found = collections.Counter(verdicts(seed, tmp_path, 2) for seed in (2, 3, 7, 8, 10, 16))
    assert found["proved", "unsat"] >= 1 and found["falsified", "sat"] >= 1, found


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 200, 10))
def test_a_hundred_verdicts_agree_with_marabou(
    first: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Marabou leaves about a tenth of them open, now one and now another."""
    pytest.importorskip("maraboupy.MarabouCore", reason="Marabou is not installed")
    found = collections.Counter(verdicts(seed, tmp_path, 10) for seed in range(first, first + 10))
    record_property("verdicts", dict(found))
    assert found["proved", "unsat"] + found["falsified", "sat"] >= 4, found


_UNREADABLE = re.compile(
    r"Leaky|Sigmoid|Tanh|MaxPool|Function|ELU\(|SiLU|Softplus|ReLU6|Product|Quotient|GroupNorm|LayerNorm|GELU"
)
"""Layers that are neither linear nor a ReLU."""


def readable(first: int, count: int) -> Iterator[tuple[Drawn, nn.Module, Bounder]]:
    """The first ``count`` nets from a seed on that branch and bound reads, every second in float64."""
    seed = first
    while count:
        drawn = draw(seed, exotic=seed % 3 == 0)
        seed += 1
        if _UNREADABLE.search(drawn.text):
            continue
        net = drawn.build()
        net = net.double() if seed % 2 else net
        try:
            bounder = Bounder(net, drawn.shape, 1, 2.0)
        except SpecError:
            continue
        if bounder.affine() is not None:
            count -= 1
            yield drawn, net, bounder


def only_just_robust(net: nn.Module, x: Tensor, y: Tensor, perturbation: PerturbationSet, share: float) -> Tensor:
    """Moves a logit until the smallest margin that attacks meet is that ``share`` of what they take; their points."""
    exact, wide = copy.deepcopy(net).double(), x.double()
    labels, generator = y.expand(20), torch.Generator().manual_seed(0)
    many = wide.expand(20, *x.shape[1:])
    points = torch.cat(
        [
            wide,
            worst(exact, wide, y, perturbation, 30),
            pgd(exact, many, labels, perturbation, Pgd(15, worst_margin_loss), generator),
        ]
    )
    margins = exact_margin(net, points, y)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.bias[y] += (share * (margins[0] - margins.min()) + 1e-3 - margins.min()).to(last.bias)
    return points


def look_at_leaves(search: Recording, net: nn.Module, y: int, points: Tensor) -> float:
    """Whether the leaves cover points of the set once and hold there; how near a bound comes, at best."""
    with torch.no_grad():
        logits = copy.deepcopy(net).double()(points)
    margins = logits[:, y, None] - logits
    margins = margins[:, [j for j in range(logits.shape[1]) if j != y]]
    values, slack = unstable_values(search.start, points), 1e-9 * max(1.0, float(logits.abs().max()))
    covers, holds = (torch.zeros(len(search.start.margins), len(points), dtype=torch.long) for _ in range(2))
    nearest = math.inf
    for leaf in search.leaves:
        bound, reach = search.bound(leaf), leaf.reach(values)
        assert bound > 0, (leaf.row, bound)
        above = (margins[:, leaf.row] - bound)[reach >= 0]
        assert bool((above >= -slack).all()), (leaf.row, float(above.min()), bound)
        nearest = min(nearest, float(above.min())) if len(above) else nearest
        covers[leaf.row] += reach >= -slack
        holds[leaf.row] += reach > slack
    assert bool((covers >= 1).all()) and bool((holds <= 1).all())
    return nearest


def recorded(drawn: Drawn, net: nn.Module, bounder: Bounder, name: str) -> tuple[bool, int, float]:
    """(whether a net that is only just robust is proved, by how many leaves, how near one comes); all looked at."""
    x, perturbation = image(drawn).to(next(net.parameters())), sets_for(drawn.shape, drawn.seed)[name]
    y = net(x).argmax(1)
    share = (0.2, 0.05, 0.02)[drawn.seed % 3]
    points = only_just_robust(net, x, y, perturbation, share)
    affine = bounder.affine()
    assert affine is not None
    with torch.no_grad():
        start = root(affine, bounder.bounded, perturbation.around(x), int(y), {})
        search = Recording(start, Limits(20.0, 600))
        found = search.run()
        if not found.proved:
            return False, 0, math.inf
        region = perturbation.around(x.double().expand(300, *x.shape[1:]))
        points = torch.cat([points, region.sample(torch.Generator().manual_seed(drawn.seed))])
        nearest = look_at_leaves(search, net, int(y), points)
    assert abs(found.margin - min(search.bound(leaf) for leaf in search.leaves)) <= 1e-9
    return True, len(search.leaves), nearest


def counted(first: int, count: int) -> collections.Counter[str]:
    """What :func:`recorded` says of so many nets, each with three sets."""
    counts: collections.Counter[str] = collections.Counter()
    for drawn, net, bounder in readable(first, count):
        for name in ("linf", "l2", "l1"):
            proved, leaves, nearest = recorded(drawn, net, bounder, name)
            counts["proved"] += proved
            counts["leaves"] += leaves
            counts["by splits"] += leaves >= drawn.classes
            counts["within 1e-3"] += nearest < 1e-3
    return counts


def test_leaves_of_a_few_nets() -> None:
    counts = counted(19_240, 2)
    assert counts["by splits"] >= 2, counts


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20_000, 40_000, 1000))
def test_leaves_of_three_hundred_nets(first: int, record_property: Callable[[str, object], None]) -> None:
    """900 nets and sets: of every 45 at least 20 are proved, so 400 in all, a part of them by splits."""
    counts = counted(first, 15)
    record_property("leaves", dict(counts))
    assert counts["proved"] >= 20 and counts["by splits"] >= 5, counts


def proofs_checked(first: int, wanted: int, folder: Path) -> int:
    """How many of so many proofs of float32 nets that are only just robust the checker takes for proofs."""
    found = 0
    for drawn, net, _ in readable(first, 4 * wanted):
        if found == wanted or next(net.parameters()).dtype != torch.float32:
            continue
        x = image(drawn).to(next(net.parameters()))
        y, name = net(x).argmax(1), ("linf", "l2", "l1")[found % 3]
        perturbation = sets_for(drawn.shape, drawn.seed)[name]
        only_just_robust(net, x, y, perturbation, 0.05)
        path, limits = folder / f"{drawn.seed}.npz", BranchAndBound(20.0, nodes=600)
        if write_proofs(path, Certifier(net, drawn.shape), [Question("0", x, y, perturbation)], limits)[0]:
            found += 1
            (checked,) = check_proofs(path)
            assert checked.fault == "" and checked.bound > 0, (drawn.seed, name, checked)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("first", range(60_000, 80_000, 1000))
def test_two_hundred_proofs_of_float32_nets_are_checked(first: int, tmp_path: Path) -> None:
    assert proofs_checked(first, 10, tmp_path) == 10


class Residual(nn.Module):
    """Three layers, the last ReLU of which sees two; 12 ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.third((self.second(y) + y).relu())


def enumerable(seed: int) -> nn.Module:
    """A net of at most 12 ReLUs over 5 numbers."""
    torch.manual_seed(seed)
    sizes = ((5, 6, 6, 3), (5, 4, 4, 4, 3), None)[seed % 3]
    if sizes is None:
        net: nn.Module = Residual()
    else:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        net = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return net.eval()


def decided(seed: int, p: float, shifts: Sequence[float]) -> Iterator[tuple[float, str]]:
    """(exact smallest margin, verdict) of a net whose logits are moved to each; some pixels at the domain's ends."""
    net = enumerable(seed)
    x = (torch.rand(1, 5) * 1.4 - 0.2).clamp(0, 1)
    y = net(x).argmax(1)
    ball = PerturbationLpBall(p, 0.3 if p == math.inf else 0.9)
    least = smallest_margin(net, x, int(y), ball)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    for by in shifts:
        with torch.no_grad():
            last.bias[y] -= least - by
        least = by
        yield by, Certifier(net, (5,), [BranchAndBound(seconds=30)]).decide(x, y, ball)[0][0].status


@pytest.mark.parametrize("seed", [9, 24])
def test_a_subdomain_without_neurons_to_split_gives_its_counterexample(seed: int) -> None:
    """The mean of the minimisers on the way finds what no descent from any of them does."""
    assert dict(decided(seed, math.inf, (-1e-3,))) == {-1e-3: "falsified"}


@pytest.mark.slow
@pytest.mark.parametrize("p", [math.inf, 1])
@pytest.mark.parametrize("seed", range(30))
def test_thirty_nets_agree_with_exhaustive_enumeration(
    seed: int, p: float, record_property: Callable[[str, object], None]
) -> None:
    """Only just robust, and only just not. None is decided wrongly, and all are decided whose margin is 1e-3 or more.

    Nearer ones may be left open, where ascent ends below the minimum over a subdomain that is convex.
    """
    for by, status in decided(seed, p, (1e-2, -1e-2, 1e-3, -1e-3, 1e-4, -1e-4)):
        record_property(f"{by:g}", status)
        right = "proved" if by > 0 else "falsified"
        assert status == right or (abs(by) < 1e-3 and status == "undecided"), by
