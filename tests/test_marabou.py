"""Marabou, a complete verifier that we did not write, reads our files and never contradicts our verdicts."""

from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import small_net
from test_encodings import SETS, built

from cure_plugin import PerturbationPatch
from cure_plugin.export import encode, marabou, onnx_model, read_query, write_vnnlib
from cure_plugin.export.marabou import ask_marabou
from cure_plugin.export.solve import solve
from cure_plugin.sets import set_spec
from cure_plugin.vnncomp.graphs import write_model
from cure_plugin.vnncomp.replay import Answer, Network, fault_of

ASKED = (
    ("linf=0.002", "box"),
    ("linf=0.1", "box"),
    ("R(2)", "box"),
    ("C(3) B(0.01)", "parameters"),
    ("C(30) B(0.5)", "parameters"),
    ("B(3)", "parameters"),
    ("R(1)", "planes"),
    ("patch", "patch"),
)


def test_marabou_never_contradicts_us(tmp_path: Path) -> None:
    core = pytest.importorskip("maraboupy.MarabouCore")
    from maraboupy import Marabou

    decided, agreed = 0, {"sat": 0, "unsat": 0}
    for seed in range(3):
        torch.manual_seed(seed)
        net = small_net("conv-batch-norm" if seed % 2 else "plain")
        model = onnx_model(net, (1, 8, 8))
        x = torch.rand(1, 1, 8, 8)
        label = int(net(x).argmax())
        for text, name in ASKED:
            own = PerturbationPatch(2, 1, (3, 3, 4, 4)) if text == "patch" else set_spec(text).build()
            encoding = encode(model, x[0], label, own, name)
            onnx, vnnlib = tmp_path / "net.onnx", tmp_path / "p.vnnlib"
            write_model(encoding.model, onnx)
            write_vnnlib(vnnlib, encoding.wanted)
            query = read_query(vnnlib)
            with contextlib.redirect_stdout(io.StringIO()):
                read = Marabou.read_onnx(str(onnx)).getInputQuery()
                core.loadProperty(read, str(vnnlib))
            (lower, upper) = query.box()
            for index in range(query.inputs):
                assert (read.getLowerBound(index), read.getUpperBound(index)) == (lower[index], upper[index])
            theirs, ours = ask_marabou(onnx, query, 10), solve(onnx, query)
            decided += theirs.result in ("sat", "unsat")
            if theirs.result == "sat":
                assert ours.verdict != "robust"
                assert fault_of(Network(onnx), query, Answer("sat", theirs.counterexample)) is None
            if theirs.result == "unsat":
                assert ours.verdict != "violated"
            agreed["sat"] += (theirs.result, ours.verdict) == ("sat", "violated")
            agreed["unsat"] += (theirs.result, ours.verdict) == ("unsat", "robust")
    assert decided >= 20 and min(agreed.values()) >= 2, (decided, agreed)


@pytest.mark.parametrize("text", SETS)
def test_every_file_of_version_1_reads_in_marabou(text: str, tmp_path: Path) -> None:
    """The file, with as many bare inputs and outputs as it speaks of; its reader knows distances and unions too."""
    core = pytest.importorskip("maraboupy.MarabouCore")
    torch.manual_seed(0)
    model = onnx_model(small_net("plain"), (1, 8, 8))
    x = torch.rand(1, 8, 8)
    for name in SETS[text]:
        wanted = encode(model, x, 0, built(text), name)
        if "1.0" not in wanted.versions:
            continue
        path = tmp_path / "p.vnnlib"
        write_vnnlib(path, wanted.wanted)
        query = read_query(path)
        read = core.InputQuery()
        read.setNumberOfVariables(query.inputs + query.outputs)
        for index in range(query.inputs):
            read.markInputVariable(index, index)
        for index in range(query.outputs):
            read.markOutputVariable(query.inputs + index, index)
        with contextlib.redirect_stdout(io.StringIO()):
            core.loadProperty(read, str(path))
        if len(wanted.wanted.boxes) > 1:
            continue  # a disjunction, not bounds
        lower, upper = query.box()
        for index in range(query.inputs):
            assert (read.getLowerBound(index), read.getUpperBound(index)) == (lower[index], upper[index])


@pytest.mark.parametrize(("fault", "result"), [("hangs", "timeout"), ("dies", "unknown")])
def test_marabou_is_stopped_where_it_does_not_stop(
    fault: str, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen once in some hundred questions: it caught an exception of its own and went on for half an hour."""
    pytest.importorskip("maraboupy.MarabouCore")
    from maraboupy.MarabouNetwork import MarabouNetwork

    net, x, ball = small_net("plain"), torch.rand(1, 1, 8, 8), set_spec("linf=0.01").build()
    encoding = encode(onnx_model(net, (1, 8, 8)), x[0], int(net(x).argmax()), ball, "box")
    write_model(encoding.model, tmp_path / "net.onnx")
    write_vnnlib(tmp_path / "p.vnnlib", encoding.wanted)
    monkeypatch.setattr(marabou, "_GRACE", 0.5)
    ends = {"hangs": lambda *_, **__: time.sleep(60), "dies": lambda *_, **__: os._exit(1)}
    monkeypatch.setattr(MarabouNetwork, "solve", ends[fault])
    started = time.monotonic()
    assert ask_marabou(tmp_path / "net.onnx", read_query(tmp_path / "p.vnnlib"), 1).result == result
    assert time.monotonic() - started < 10
