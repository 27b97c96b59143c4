"""Questions that are no robustness: against sampling, against Marabou, and through the command line."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from acas import acas_instance, acas_net, inputs_text, outputs_text
from onnx_files import Maker
from torch import Tensor, nn

from cure_plugin.cli.main import main
from cure_plugin.errors import DataError
from cure_plugin.export import read_query
from cure_plugin.export.command import run_command
from cure_plugin.export.search import Search
from cure_plugin.export.solve import _solver, decide_query, solve
from cure_plugin.vnncomp.instances import Instance, write_instances
from cure_plugin.vnncomp.query import Query
from cure_plugin.vnncomp.replay import Answer, Network, fault_of, read_answer

ANSWERS = {"robust": "unsat", "violated": "sat"}


def question(inputs: int, outputs: int, *assertions: str) -> Query:
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)] + [
        f"(declare-const Y_{i} Real)" for i in range(outputs)
    ]
    return Query("\n".join([*lines, *(f"(assert {text})" for text in assertions)]))


def box(*sides: tuple[float, float]) -> list[str]:
    return [
        f"({sign} X_{i} {end:.6f})" for i, (low, high) in enumerate(sides) for sign, end in ((">=", low), ("<=", high))
    ]


def small(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).double().eval()


@pytest.mark.parametrize("seed", range(12))
def test_verdicts_agree_with_dense_sampling(seed: int) -> None:
    """Random conjunctions and disjunctions of random inequalities, over boxes of uneven sides."""
    random = np.random.default_rng(seed)
    net = small(seed)
    sides = [(low, low + size) for low, size in zip(random.uniform(-1, 0, 2), random.uniform(0.1, 2, 2), strict=True)]
    grid = torch.cartesian_prod(*(torch.linspace(low, high, 301, dtype=torch.float64) for low, high in sides))
    with torch.no_grad():
        values = net(grid).numpy()
    verdicts = []
    for _ in range(4):
        parts, holds = [], np.zeros(len(grid), dtype=bool)
        for _ in range(random.integers(1, 4)):
            terms, all_hold = [], np.ones(len(grid), dtype=bool)
            for _ in range(random.integers(1, 3)):
                factors = random.integers(-2, 3, 3)
                factors[random.integers(3)] = 1
                bound = float(np.quantile(values @ factors, random.choice([0, 0.02, 0.3]))) - random.choice([0, 0.01])
                terms.append(f"(<= (+ {' '.join(f'(* {c}.0 Y_{j})' for j, c in enumerate(factors))}) {bound:.9f})")
                all_hold &= values @ factors <= bound
            parts.append(f"(and {' '.join(terms)})")
            holds |= all_hold
        query = question(2, 3, *box(*sides), f"(or {' '.join(parts)})")
        decision = decide_query(net, (2,), query, 10)
        verdicts.append(decision.verdict)
        assert not (decision.verdict == "robust" and holds.any())
        if decision.verdict == "violated":
            point = decision.counterexample
            assert point is not None and query.satisfied(point, net(torch.from_numpy(point)).detach().numpy(), 1e-6)
    assert set(verdicts) <= {"robust", "violated", "unknown"} and verdicts.count("unknown") <= 2


def test_each_kind_of_question() -> None:
    net = small(0)
    sides = box((-1, 1), (-0.5, 0.5))
    with torch.no_grad():
        values = net(torch.rand(5000, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.5]))
    top = values.amax(0).tolist()
    for assertions, verdict in (
        ([f"(>= Y_0 {top[0] + 0.1:.6f})"], "robust"),
        ([f"(>= Y_0 {top[0] - 0.01:.6f})"], "violated"),
        ([f"(>= Y_0 {top[0] - 0.01:.6f})", f"(>= Y_1 {top[1] + 0.1:.6f})"], "robust"),  # one of two cannot hold
        ([f"(or (and (>= Y_0 {top[0] + 0.1:.6f})) (and (>= Y_1 {top[1] - 0.01:.6f})))"], "violated"),
        ([f"(<= (* 2.0 Y_0) (+ (* 2.0 Y_0) Y_1 {-top[1] - 9:.6f}))"], "robust"),
        (["(>= X_0 0.0)"], "violated"),  # nothing is asked of outputs
        (["(>= X_0 2.0)", "(>= Y_0 0.0)"], "robust"),  # no input is allowed
    ):
        assert decide_query(net, (2,), question(2, 3, *sides, *assertions), 10).verdict == verdict, assertions


def test_boxes_that_are_points_or_far_apart() -> None:
    net = small(1)
    with torch.no_grad():
        value = float(net(torch.tensor([[0.3, -0.2]], dtype=torch.float64))[0, 0])
    point = box((0.3, 0.3), (-0.2, -0.2))
    assert decide_query(net, (2,), question(2, 3, *point, f"(>= Y_0 {value + 0.1:.9f})")).verdict == "robust"
    assert decide_query(net, (2,), question(2, 3, *point, f"(>= Y_0 {value - 0.1:.9f})")).verdict == "violated"
    boxes = "(or (and {}) (and {} (<= Y_0 1000000.0)))".format(" ".join(point), " ".join(box((50, 51), (7, 8))))
    found = decide_query(net, (2,), question(2, 3, boxes, f"(>= Y_0 {value + 0.1:.9f})"))
    with torch.no_grad():
        far = net(torch.tensor([[50.5, 7.5]], dtype=torch.float64))[0, 0]
    assert found.verdict == ("violated" if far > value + 0.2 else "robust")


def test_what_float32_could_have_made_is_not_decided() -> None:
    net = nn.Sequential(nn.Linear(1, 1)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(20.0)
    for bound, verdict in ((20.001, "robust"), (20.00005, "unknown"), (20.0, "violated")):
        assert decide_query(net, (1,), question(1, 1, *box((0, 1)), f"(>= Y_0 {bound})")).verdict == verdict


def test_time_runs_out() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(12, 12), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(12, 2)).eval()
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.mul_(3)
    lowest = float(net(torch.rand(20000, 12) * 2 - 1)[:, 0].min())
    query = question(12, 2, *box(*[(-1, 1)] * 12), f"(<= Y_0 {lowest * 1.8 - 1:.6f})")
    assert decide_query(net, (12,), query, 1.0).verdict in ("timeout", "violated")


def softmax_file(folder: Path) -> Path:
    make = Maker(13)
    hidden = make("Relu", make.linear("x", 5, 8))
    model = make.model(make("Softmax", make.linear(hidden, 8), axis=1), (1, 5))
    (folder / "softmax.onnx").write_bytes(model.SerializeToString())
    return folder / "softmax.onnx"


def test_softmax_keeps_comparisons_and_nothing_else(tmp_path: Path) -> None:
    path = softmax_file(tmp_path)
    values = Network(path)(np.zeros(5))
    order = values.argsort()
    near = box(*[(-0.001, 0.001)] * 5)
    assert solve(path, question(5, 3, *near, f"(>= Y_{order[1]} Y_{order[2]})")).verdict == "robust"
    assert solve(path, question(5, 3, *near, f"(>= Y_{order[2]} Y_{order[1]})")).verdict == "violated"
    for asked in ("(>= Y_0 0.99)", "(>= Y_0 (+ Y_1 0.1))", "(>= Y_0 (* 2.0 Y_1))", "(>= Y_0 (+ Y_1 Y_2))"):
        with pytest.raises(DataError, match="ends in Softmax"):
            solve(path, question(5, 3, *near, asked))


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 inputs to 3 outputs"):
        solve(softmax_file(tmp_path), question(4, 3, *box(*[(0, 1)] * 4), "(>= Y_0 Y_1)"))


@pytest.mark.parametrize("number", range(1, 11))
def test_every_kind_of_acas_is_answered(number: int, tmp_path: Path) -> None:
    """6 x 50 neurons; the solver as ``cure verify`` calls it."""
    network, property_ = acas_instance(number, tmp_path, seed=number % 2, size=0.2)
    result = tmp_path / "result.txt"
    assert run_command(_solver, [str(network), str(property_), str(result), "20"]) == 0
    answer = read_answer(result)
    assert answer.result in ("sat", "unsat")
    query = read_query(property_)
    if answer.result == "sat":
        assert fault_of(Network(network), query, answer) is None
    else:  # no sampled point satisfies it
        net = Network(network)
        random = np.random.default_rng(0)
        for case in query.cases():
            for point in case.lower + (case.upper - case.lower) * random.random((300, 5)):
                assert not query.satisfied(point, net(point), 1e-4)


def small_acas(number: int, folder: Path) -> tuple[Path, Path]:
    """As :func:`acas_instance`, of two hidden layers that Marabou settles in no time."""
    network, property_ = acas_instance(number, folder, seed=3, size=0.4)
    network.write_bytes(acas_net(3, hidden=(12, 12)).SerializeToString())
    return network, property_


def test_marabou_agrees(tmp_path: Path) -> None:
    pytest.importorskip("maraboupy", reason="Marabou has wheels for Python 3.11 only")
    from cure_plugin.export.marabou import ask_marabou

    agreed = 0
    for number in range(1, 11):
        network, property_ = small_acas(number, tmp_path)
        query = read_query(property_)
        ours, theirs = ANSWERS.get(solve(network, query, 10).verdict), ask_marabou(network, query, 3).result
        assert {ours, theirs} != {"sat", "unsat"}, number
        agreed += ours == theirs
    assert agreed >= 8


def test_bounds_that_are_no_numbers_prove_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network, property_ = small_acas(1, tmp_path)
    query = read_query(property_)
    assert solve(network, query, 20).verdict == "robust"
    honest = Search._bound

    def broken(self: Search, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        bounds, needed = honest(self, lower, upper)
        return bounds * math.nan, needed

    monkeypatch.setattr(Search, "_bound", broken)
    assert solve(network, query, 0.5).verdict in ("timeout", "unknown")


@pytest.mark.slow
def test_marabou_agrees_on_nets_of_full_size(tmp_path: Path) -> None:
    pytest.importorskip("maraboupy", reason="Marabou has wheels for Python 3.11 only")
    from cure_plugin.export.marabou import ask_marabou

    agreed = 0
    for seed in (0, 1):
        for number in range(1, 11):
            network, property_ = acas_instance(number, tmp_path, seed, 0.3)
            query = read_query(property_)
            ours, theirs = ANSWERS[solve(network, query, 60).verdict], ask_marabou(network, query, 30).result
            assert {ours, theirs} != {"sat", "unsat"}, (seed, number)
            agreed += ours == theirs
    assert agreed >= 10


@pytest.mark.slow
def test_ten_instances_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    instances = [
        Instance(*(path.name for path in acas_instance(number, tmp_path, number % 2, 0.3)), 60)
        for number in range(1, 11)
    ]
    write_instances(tmp_path / "instances.csv", instances)
    assert main(["verify", str(tmp_path / "instances.csv"), "--verifier", "cure", "--out", str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    rows = list(csv.reader((tmp_path / "ours" / "results.csv").read_text().splitlines()))
    assert [row[4] in ("sat", "unsat") for row in rows] == [True] * 10, rows


def test_the_command_line_answers_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, property_ = small_acas(2, tmp_path)
    bad = acas_net(0, hidden=(5,))
    bad.graph.node[0].op_type = "PRelu"
    (tmp_path / "bad.onnx").write_bytes(bad.SerializeToString())
    listed = [Instance(network.name, property_.name, 20), Instance("bad.onnx", property_.name, 20)]
    write_instances(tmp_path / "instances.csv", listed)
    main(["verify", str(tmp_path / "instances.csv"), "--verifier", "cure", "--out", str(tmp_path / "ours")])
    said = capsys.readouterr().out
    assert "PRelu is not read" in said and "1 error" in said and ("1 unsat" in said or "1 sat" in said), said


def test_wide_boxes_of_many_sides(tmp_path: Path) -> None:
    """Property 1's form over the whole input space, and a threshold that a search has to find."""
    path = tmp_path / "net.onnx"
    path.write_bytes(acas_net(5, hidden=(20, 20)).SerializeToString())
    network = Network(path)
    whole = [(-0.5, 0.5), (-0.5, 0.5), (-0.1, 0.5), (0.3, 0.5), (-0.5, -0.45)]
    random = np.random.default_rng(0)
    low, high = (np.array(ends) for ends in zip(*whole, strict=True))
    highest = max(network(point)[0] for point in low + (high - low) * random.random((2000, 5)))
    for threshold, verdict in ((highest + 1.0, "robust"), (highest, "violated")):
        text = inputs_text([whole]) + outputs_text(1, threshold)
        assert solve(path, Query(text), 30).verdict == verdict
    assert math.isfinite(highest) and isinstance(onnx.load(path), onnx.ModelProto)
    assert fault_of(network, Query(text), Answer("sat", solve(path, Query(text)).counterexample)) is None
