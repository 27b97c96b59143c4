"""Benchmark roots, verifiers on instance lists and counterexamples replayed, on a small net."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_net

from cure_plugin.cli import main
from cure_plugin.errors import DataError, SpecError
from cure_plugin.export import Property, onnx_model, read_onnx_net
from cure_plugin.export.command import run_command
from cure_plugin.export.solve import decide_query, solve
from cure_plugin.vnncomp.benchmark import faults
from cure_plugin.vnncomp.generate import STRATA, Root, draw, question, read_root
from cure_plugin.vnncomp.graphs import write_model
from cure_plugin.vnncomp.instances import Instance, read_instances, write_instances
from cure_plugin.vnncomp.query import Query, read_query
from cure_plugin.vnncomp.replay import Answer, Network, answer_text, fault_of, read_answer
from cure_plugin.vnncomp.root import write_root
from cure_plugin.vnncomp.run import check, summary_text, verify
from cure_plugin.vnncomp.verifiers import Verifier, find_verifier
from cure_plugin.vnncomp.vnnlib import vnnlib_text


def candidates_of(net: torch.nn.Module, root: Root, folder: Path) -> None:
    """Fill ``root``: every kind of encoding for a few images, with the verdicts of our certifier on the files."""
    images = root.arrays["images"]
    labels = net(torch.from_numpy(images).float() / 255).argmax(1).tolist()
    encodings: list[tuple[str, dict[str, Any]]] = [
        (f"linf={eps}", {"kind": "linf", "eps": eps}) for eps in (0.001, 0.01, 1.0)
    ]
    encodings += [
        ("l2=0.01", {"kind": "ball", "norm": "l2", "eps": 0.01}),
        ("l1=0.01", {"kind": "ball", "norm": "l1", "eps": 0.01}),
        ("C(1) B(0.001)", {"kind": "parameters", "names": ["C", "B"], "lower": [-1, -0.001], "upper": [1, 0.001]}),
        ("patch=1x1", {"kind": "patch", "sides": [1, 1], "block": [2, 3, 4, 5]}),
        ("patch=2x2 contents", {"kind": "contents", "sides": [2, 2], "corner": [1, 1]}),
        ("cells", {"kind": "boxes"}),
        ("planes", {"kind": "planes"}),
    ]
    for at, label in enumerate(labels):
        flat = images[at].ravel() / 255
        for number, (text, encoding) in enumerate(encodings):
            name = f"net_{number}_{at}"
            if encoding["kind"] == "boxes":
                root.arrays[f"boxes {name}"] = np.stack([[flat - 0.001 * k, flat + 0.001] for k in (1, 2)])
            if encoding["kind"] == "planes":
                root.arrays[f"slope {name}"] = np.full((64, 1), 0.01, dtype=np.float32)
                root.arrays[f"box {name}"] = np.stack([np.append(-0.1, flat), np.append(0.1, flat)])
            candidate = {
                "id": name, "net": "net.onnx", "image": at, "at": at, "label": label, "set": text, "encoding": encoding,
            }  # fmt: skip
            asked = question(root, candidate, "1.0")
            path = folder / "asked.onnx"
            write_model(asked.model, path)
            query = Query(vnnlib_text(asked.wanted))
            if encoding["kind"] == "ball":  # what a linf ball of that radius proves holds for it as well
                smaller = {**candidate, "encoding": {"kind": "linf", "eps": encoding["eps"]}}
                hull = question(root, smaller, "1.0")
                write_model(hull.model, path)
                query = Query(vnnlib_text(hull.wanted))
            decision = solve(path, query)
            if decision.counterexample is not None:
                if encoding["kind"] == "ball":
                    continue
                root.arrays[f"witness {name}"] = decision.counterexample
            stratum = {"robust": "trivial" if decision.stage == "IBP" else "medium", "violated": "violated"}
            entry = {"verdict": decision.verdict, "stage": decision.stage, "margin": decision.margin}
            root.candidates.append({**candidate, "stratum": stratum.get(decision.verdict, "hard"), **entry})
    # a net this small leaves nothing undecided: the claims of a few are forgotten
    for candidate in [one for one in root.candidates if one["verdict"] == "robust"][::4]:
        candidate.update(stratum="hard", verdict="unknown")


@pytest.fixture(scope="module")
def made(made_once: Callable[..., Path]) -> Path:
    return made_once("roots", lambda folder: make_root(folder / "cure_small")) / "cure_small"


def make_root(folder: Path) -> None:
    generator = np.random.default_rng(0)
    spec = {"name": "cure_small", "timeout": 20, "strata": dict.fromkeys(STRATA, 3), "nets": ["net.onnx"]}
    images = generator.integers(0, 256, (3, 1, 8, 8)).astype(np.uint8)
    torch.manual_seed(0)
    net = small_net("plain")
    root = Root(spec, [], {"images": images}, {"net.onnx": onnx_model(net, (1, 8, 8))})
    folder.mkdir(parents=True)
    candidates_of(net, root, folder)
    (folder / "asked.onnx").unlink()
    write_root(folder, root, "# cure_small\n")
    run_generator(folder, 1)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def run_generator(folder: Path, seed: int) -> None:
    subprocess.run([sys.executable, "generate_properties.py", str(seed)], cwd=folder, check=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_generator_repeats_itself_and_seeds_differ(root: Path) -> None:
    first = files_of(root)
    run_generator(root, 1)
    assert files_of(root) == first
    run_generator(root, 2)
    assert files_of(root)["instances.csv"] != first["instances.csv"]
    assert faults(root) == []


def test_a_sound_root_passes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "check", str(made)]) == 0
    assert "as the platform wants it" in capsys.readouterr().out
    kinds = {one["encoding"]["kind"] for one in read_root(made).candidates}
    assert kinds == {"linf", "ball", "parameters", "patch", "contents", "boxes", "planes"}


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content["instances"])
    path.write_text(json.dumps(content, indent=1) + "\n")


def name_of(instances: dict[str, Any], verdict: str) -> str:
    return next(name for name, entry in instances.items() if entry["verdict"] == verdict)


def claimed(root: Path, verdict: str) -> str:
    return name_of(json.loads((root / "metadata.json").read_text())["instances"], verdict)


def spoil_witness(root: Path) -> None:
    path = next((root / "witnesses").iterdir())
    path.write_text(path.read_text().replace("(X_0 ", "(X_0 7"))


def first_row(root: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = (root / "instances.csv").read_text().splitlines()
    (root / "instances.csv").write_text("\n".join(change(lines)) + "\n")


def shrink(root: Path, name: str) -> None:
    path = root / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def first_file(root: Path, side: str) -> str:
    return read_instances(root / "instances.csv")[0].__dict__[side]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no generator": (lambda r: (r / "generate_properties.py").unlink(), "generate_properties.py is missing"),
    "torn list": (lambda r: first_row(r, lambda rows: ["net.onnx", *rows]), "expected onnx,vnnlib,timeout"),
    "long timeouts": (lambda r: first_row(r, lambda rows: [f"{rows[0]}00000", *rows[1:]]), "timeouts sum to"),
    "twice": (lambda r: first_row(r, lambda rows: [rows[0], *rows]), "listed 2 times"),
    "missing property": (lambda r: (r / first_file(r, "vnnlib")).unlink(), "cannot read"),
    "torn property": (lambda r: shrink(r, first_file(r, "vnnlib")), "truncated"),
    "torn net": (lambda r: shrink(r, "onnx/net.onnx"), "cannot read ONNX file"),
    "large file": (lambda r: os.truncate(r / "candidates.npz", 101_000_000), "larger than 100 MB"),
    "false witness": (spoil_witness, "does not replay"),
    "no witness": (lambda r: shutil.rmtree(r / "witnesses"), "without a witness"),
    "no certificate": (
        lambda r: edit_json(r / "metadata.json", lambda e: e[name_of(e, "robust")].pop("margin")),
        "without a certificate",
    ),
    "false claim": (
        lambda r: edit_json(
            r / "metadata.json",
            lambda e: [one.update(verdict="robust", stratum="hard", stage="IBP", margin=1.0) for one in e.values()],
        ),
        "is called robust, but there is a counterexample",
    ),
    "stratum missing": (
        lambda r: edit_json(
            r / "metadata.json",
            lambda e: [one.update(stratum="hard") for one in e.values() if one["stratum"] != "violated"],
        ),
        "no instance is of stratum",
    ),
    "unknown instance": (
        lambda r: edit_json(r / "metadata.json", lambda e: e.update(other={"verdict": "unknown"})),
        "in only one of",
    ),
    "another seed": (
        lambda r: (r / "metadata.json").write_text((r / "metadata.json").read_text().replace('"seed": 1', '"seed": 3')),
        "writes another",
    ),
    "random generator": (
        lambda r: (r / "generate_properties.py").write_text("import sys\nsys.exit(3)\n"),
        "ended with 3",
    ),
    "strange operator": (lambda r: add_softmax(r / "onnx/net.onnx"), "uses Softmax"),
    "shapes": (lambda r: shutil.copy(other_net(r), r / "onnx/net.onnx"), "its network"),
    "no number": (
        lambda r: edit_json(r / "metadata.json", lambda e: e[name_of(e, "robust")].update(margin="abc")),
        "without a certificate",
    ),
    "empty box": (
        lambda r: (r / first_file(r, "vnnlib")).write_text(
            (r / first_file(r, "vnnlib")).read_text() + "(assert (>= X_0 9.0))\n"
        ),
        "holds for no input",
    ),
    "metadata a folder": (
        lambda r: ((r / "metadata.json").unlink(), (r / "metadata.json").mkdir()),
        "metadata.json cannot be read",
    ),
    "torn generator": (lambda r: (r / "generate_properties.py").write_text("def"), "py cannot be read"),
    "no vendored module": (lambda r: (r / "vendor/cure_plugin").mkdir(parents=True), "files.py is missing; pack"),
    "weights elsewhere": (lambda r: weights_elsewhere(r / "onnx/net.onnx"), "keeps weights in another file"),
    "one seed": (
        lambda r: (r / "generate_properties.py").write_text(
            (r / "generate_properties.py").read_text().replace("int(sys.argv[1])", "1")
        ),
        "the same instances with seeds 1 and 2",
    ),
    "link to nothing": (lambda r: (r / "more.txt").symlink_to("nowhere"), "more.txt is a link"),
    "junk beside a claim": (
        lambda r: (r / "witnesses" / f"{claimed(r, 'robust')}.txt").write_text("junk"),
        "has a witness that cannot be read",
    ),
    "wrong version": (
        lambda r: shutil.copy(r / first_file(r, "vnnlib"), r / "2.0" / f"{first_file(r, 'vnnlib')}.gz"),
        "cannot read",
    ),
}  # fmt: skip


def other_net(root: Path) -> Path:
    write_model(onnx_model(small_net("plain")[:-1], (1, 8, 8)), root.parent / "other.onnx")
    return root.parent / "other.onnx"


def weights_elsewhere(path: Path) -> None:
    import onnx

    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="net.data", size_threshold=0)


def add_softmax(path: Path) -> None:
    import onnx

    model = onnx.load(path)
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["Y"]))
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("name", BROKEN)
def test_broken_roots_are_named(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = BROKEN[name]
    change(root)
    assert main(["bench", "check", str(root)]) == 3
    assert message in capsys.readouterr().out


def test_what_cannot_be_drawn_is_refused(made: Path) -> None:
    root = read_root(made)
    with pytest.raises(SpecError, match="seed must be"):
        draw(root, -1)
    root.spec["strata"] = {**root.spec["strata"], "hard": 10_000}
    with pytest.raises(SpecError, match="candidates of stratum hard, needs 10000"):
        draw(root, 1)
    with pytest.raises(DataError, match="is no benchmark root"):
        read_root(made / "onnx")


# -- counterexamples ----------------------------------------------------------------------------


def violated(root: Path) -> tuple[Instance, Network, Query, Answer]:
    metadata = json.loads((root / "metadata.json").read_text())["instances"]
    name = name_of(metadata, "violated")
    one = next(one for one in read_instances(root / "instances.csv") if one.name == name)
    answer = read_answer(root / "witnesses" / f"{name}.txt")
    return one, Network(root / one.onnx), read_query(root / one.vnnlib), answer


def test_counterexamples_count_within_the_tolerances_only(made: Path, tmp_path: Path) -> None:
    _, network, query, answer = violated(made)
    assert answer.inputs is not None
    outputs = network(answer.inputs)
    assert fault_of(network, query, answer) is None
    for claimed in (outputs, outputs + 1, outputs[:-1], outputs * np.nan):  # nobody looks at them
        assert fault_of(network, query, Answer("sat", answer.inputs, claimed)) is None
    low, high = query.cases()[0].lower, query.cases()[0].upper
    for inputs, claimed, message in (
        (None, None, "no counterexample"),
        (answer.inputs[:-1], None, "inputs, the property"),
        (answer.inputs * np.nan, None, "not finite"),
        (np.where(np.arange(len(low)) == 0, high + 1e-3, answer.inputs), None, "does not satisfy"),
    ):
        fault = fault_of(network, query, Answer("sat", inputs, claimed))
        assert fault is not None and message in fault
    (tmp_path / "a.txt").write_text(answer_text(Answer("sat", answer.inputs, outputs)))
    again = read_answer(tmp_path / "a.txt")
    assert again.inputs is not None and np.allclose(again.inputs, answer.inputs, rtol=1e-7)


def slope_net(folder: Path) -> Network:
    """Outputs (x, 0) of one input x."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [0.0]]))
        net[0].bias.zero_()
    write_model(onnx_model(net, (1,)), folder / "slope.onnx")
    return Network(folder / "slope.onnx")


DECLARED = "".join(f"(declare-const {name} Real)\n" for name in ("X_0", "Y_0", "Y_1"))

BY_2026 = [
    ("(<= X_0 0.5)", 0.5 + 0.9e-4, True),
    ("(<= X_0 0.5)", 0.5 + 1.1e-4, False),
    ("(>= X_0 0.5)", 0.5 - 0.9e-4, True),
    ("(>= X_0 0.5)", 0.5 - 1.1e-4, False),
    ("(or (and (<= X_0 0.1)) (and (<= X_0 0.5)))", 0.5 + 0.9e-4, True),
    ("(<= (* X_0 X_0) 0.25)", 0.50002, True),  # the square is off by 2e-5, of 2.5e-5
    ("(<= (* X_0 X_0) 0.25)", 0.50004, False),
    ("(<= Y_0 0.5)", 0.5, True),
    ("(<= Y_0 0.5)", 0.5 + 1e-6, False),  # as a measured distance
    ("(<= Y_0 Y_1)", 1e-6, False),
    ("(<= (- Y_0 Y_1) 0.5)", 0.5 + 1e-6, False),
    ("(<= Y_0 (+ Y_1 0.5))", 0.5 + 1e-6, False),
    ("(and (<= X_0 0.5) (<= Y_0 0.5))", 0.5 + 1e-6, False),
    ("(<= (+ Y_0 X_0) 1.0)", 0.5 + 1e-6, False),  # inputs and outputs in one
    ("(<= Y_0 X_0)", 0.5, True),
    ("(= Y_0 0.5)", 0.5 + 1e-6, False),
    ("(<= 0.50001 0.5)", 0.5, False),  # of nothing
]


@pytest.mark.parametrize("asserted, point, counts", BY_2026)
def test_inputs_have_a_tolerance_and_outputs_none(asserted: str, point: float, counts: bool, tmp_path: Path) -> None:
    query = Query(f"{DECLARED}(assert {asserted})")
    assert (fault_of(slope_net(tmp_path), query, Answer("sat", np.array([point]))) is None) == counts


@pytest.mark.parametrize("claimed", ["(Y_0 7)", "(Y_1 nan)", "(Y_0 abc)", "(Y_0 1)\n(Y_0 2)", "(Y[0,3] 1)\n(Y_0 1)"])
def test_claimed_outputs_are_not_read(claimed: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"sat\n((X_0 0.5)\n{claimed})\n")
    answer = read_answer(tmp_path / "a.txt")
    assert fault_of(slope_net(tmp_path), Query(f"{DECLARED}(assert (>= Y_0 Y_1))"), answer) is None


def line_net(folder: Path, margin: float) -> tuple[Network, Query]:
    """One input in [0, 1], whatever it is class 0 wins by ``margin``."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 2))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([20.0 + margin, 20.0]))
    folder.mkdir(exist_ok=True)
    write_model(onnx_model(net, (1,)), folder / "net.onnx")
    text = vnnlib_text(Property((1, 1), ((np.zeros(1), np.ones(1)),), 0, 2))
    (folder / "p.vnnlib").write_text(text)
    return Network(folder / "net.onnx"), Query(text)


def test_claims_do_not_make_a_counterexample(tmp_path: Path) -> None:
    for margin in (0.02, 5e-5):
        network, query = line_net(tmp_path, margin)
        for claimed in (None, np.array([20.01, 20.01]), network(np.zeros(1))):
            fault = fault_of(network, query, Answer("sat", np.full(1, 0.5), claimed))
            assert fault is not None and "does not satisfy" in fault, (margin, claimed)
        # a margin that float32 could have made is no proof
        verdict = decide_query(read_onnx_net(tmp_path / "net.onnx")[0], (1,), query).verdict
        assert verdict == ("robust" if margin == 0.02 else "unknown")


def test_our_solvers_answer_sat_only_where_onnxruntime_agrees(tmp_path: Path) -> None:
    for margin, said in ((5e-5, "unknown"), (0.0, "sat"), (-5e-5, "sat")):
        line_net(tmp_path, margin)
        files = [str(tmp_path / name) for name in ("net.onnx", "p.vnnlib", "result.txt")]
        assert run_command(lambda *_: ("sat", np.full(1, 0.5)), [*files, "1"]) == 0
        answer = read_answer(files[2])
        assert answer.result == said and (answer.inputs is None) == (said == "unknown")


def test_nets_and_properties_of_other_sizes(tmp_path: Path) -> None:
    network, query = line_net(tmp_path, 1.0)
    wide = Query(vnnlib_text(Property((1, 3), ((np.zeros(3), np.ones(3)),), 0, 2)))
    assert "the network 1" in str(fault_of(network, wide, Answer("sat", np.zeros(3))))
    three = torch.nn.Sequential(torch.nn.Linear(1, 3)).eval()
    with pytest.raises(DataError, match="3 outputs"):
        decide_query(three, (1,), query)
    assert three[0].weight.dtype == torch.float32
    nothing = Query(vnnlib_text(Property((1, 1), ((np.zeros(1), np.ones(1)),), 0, 2)) + "(assert (>= X_0 2.0))")
    assert decide_query(torch.nn.Sequential(torch.nn.Linear(1, 2)), (1,), nothing).verdict == "robust"


def test_results_are_tied_to_the_files(tmp_path: Path, tool: Callable[..., str]) -> None:
    line_net(tmp_path / "r", 1.0)
    write_instances(tmp_path / "r" / "instances.csv", [Instance("net.onnx", "p.vnnlib", 5)])
    verifier = find_verifier(tool("unsat"))
    verify(tmp_path / "r" / "instances.csv", verifier, tmp_path / "v")
    line_net(tmp_path / "r", -1.0)
    with pytest.raises(DataError, match="files that have changed"):
        verify(tmp_path / "r" / "instances.csv", verifier, tmp_path / "v")
    (tmp_path / "v" / "runs.settings.json").write_text("{")
    with pytest.raises(DataError, match="delete both"):
        verify(tmp_path / "r" / "instances.csv", verifier, tmp_path / "v")
    assert (tmp_path / "v" / "runs.jsonl").read_text()
    line_net(tmp_path / "r" / "other", 1.0)
    twice = [Instance("net.onnx", "p.vnnlib", 5), Instance("other/net.onnx", "p.vnnlib", 5)]
    write_instances(tmp_path / "r" / "instances.csv", twice)
    with pytest.raises(DataError, match="could not be told apart"):
        verify(tmp_path / "r" / "instances.csv", verifier, tmp_path / "w")


def test_what_went_wrong_is_tried_again(root: Path, tmp_path: Path, capsys: Any) -> None:
    instances = read_instances(root / "instances.csv")[:1]
    write_instances(root / "instances.csv", instances)
    script = tmp_path / "later.py"
    content = {"name": "later", "run": [sys.executable, str(script), "{results}"]}
    (tmp_path / "later.yaml").write_text(json.dumps(content))
    command = ["verify", str(root / "instances.csv"), "--verifier", str(tmp_path / "later.yaml")]
    command += ["--out", str(tmp_path / "v")]
    assert main(command) == 2 and "failed on every instance" in capsys.readouterr().err
    script.write_text("import sys; open(sys.argv[1], 'w').write('unknown')")
    assert main(command) == 0 and "1 unknown" in capsys.readouterr().out


def test_one_name_for_two_networks_is_no_name(tmp_path: Path) -> None:
    line_net(tmp_path, 1.0)
    line_net(tmp_path / "b", -1.0)
    (tmp_path / "b" / "net.onnx").rename(tmp_path / "other.onnx")
    listed = [Instance("net.onnx", "p.vnnlib", 5), Instance("other.onnx", "p.vnnlib", 5)]
    write_instances(tmp_path / "instances.csv", listed)
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "p.txt").write_text("sat\n((X_0 0.5))\n")
    with pytest.raises(DataError, match="holds no results file"):
        check(tmp_path / "instances.csv", tmp_path / "answers")
    (tmp_path / "answers" / "other_p.counterexample").write_text("sat\n((X_0 0.5))\n")
    runs = check(tmp_path / "instances.csv", tmp_path / "answers")
    assert [run.result for run in runs] == ["unknown", "sat"] and not any(run.contradicts for run in runs)


def test_results_files_of_other_forms(tmp_path: Path) -> None:
    for text in ("sat ((x_0 1) (x_1 2))", "sat ((X[0,1] 2) (X[0,0] 1))"):
        (tmp_path / "r.txt").write_text(text)
        inputs = read_answer(tmp_path / "r.txt").inputs
        assert inputs is not None and inputs.tolist() == [1, 2]
    for text, result in (("holds\n", "unsat"), ("violated\n((X_0 1e-3)\n(Y_0 -2.5E1))", "sat"), ("timeout", "timeout")):
        (tmp_path / "r.txt").write_text(text)
        assert read_answer(tmp_path / "r.txt").result == result
    for text, message in (
        ("maybe", "starts with 'maybe'"),
        ("sat\n((X_1 0.5))", "values of X are missing"),
        ("sat\n((X_0 abc))", "no number"),
        ("sat\n((X_0 1) (X_0 2))", "given twice"),
        ("sat\n((X_0 1) (X[0,1] 2))", "different lengths"),
    ):
        (tmp_path / "r.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            read_answer(tmp_path / "r.txt")


def test_check_writes_results(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.csv"
    command = ["check", str(root / "instances.csv"), "--counterexamples", str(root / "witnesses"), "--out", str(out)]
    assert main(command) == 0
    rows = [line.split(",") for line in out.read_text().splitlines()]
    assert len(rows) == 12 and sum(row[4] == "sat" for row in rows) == 3 and {len(row) for row in rows} == {6}
    assert "3 agree" in capsys.readouterr().out
    spoil_witness(root)
    assert main(command) == 3
    assert "CONTRADICTION" in capsys.readouterr().out
    with pytest.raises(DataError, match="holds no results file"):
        check(root / "instances.csv", tmp_path)


def test_a_generator_says_what_is_wrong_in_a_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = (root / "spec.yaml").read_text()
    command = [sys.executable, "generate_properties.py", "\u00b2"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "usage" in run.stderr and "Traceback" not in run.stderr
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    monkeypatch.setattr(sys, "argv", ["generate_properties.py", "1"])
    for text, message in (
        (spec.replace("timeout", "time"), "timeout"),
        (f"{spec}\nday: 2024-13-45\n", "month"),
        (spec.replace("hard: 3", "hard: some"), "hard in spec.yaml"),
    ):
        (root / "spec.yaml").write_text(text)
        with pytest.raises(SystemExit, match=message):  # with a text, so its exit code is 1
            runpy.run_path(str(root / "generate_properties.py"), run_name="__main__")


# -- verifiers ----------------------------------------------------------------------------------

TOOL = """
import os, sys, time
from pathlib import Path
onnx, vnnlib, results, timeout, mode = sys.argv[1:]
calls = Path(os.environ["CALLS"])
calls.write_text((calls.read_text() if calls.exists() else "") + vnnlib + chr(10))
if mode == "sleep":
    time.sleep(60)
if mode == "crash":
    sys.exit("no licence")
witness = Path(os.environ["WITNESSES"]) / (Path(onnx).stem + "_" + Path(vnnlib).stem + ".txt")
Path(results).write_text(witness.read_text() if witness.exists() else mode + chr(10))
"""


def test_one_answer_that_cannot_be_replayed_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, given = tmp_path / "r", tmp_path / "given"
    line_net(root, -1.0)
    (root / "q.vnnlib").write_text((root / "p.vnnlib").read_text()[:40])
    given.mkdir()
    for name in ("net_p", "net_q"):
        (given / f"{name}.txt").write_text("sat\n((X_0 0.5))\n")
    write_instances(root / "instances.csv", [Instance("net.onnx", f"{one}.vnnlib", 5) for one in "pq"])
    command = ["check", str(root / "instances.csv"), "--counterexamples", str(given), "--out", str(tmp_path / "o.csv")]
    assert main(command) == 2
    assert "1 of 2 answers cannot be read or replayed" in capsys.readouterr().err
    assert [line.split(",")[4] for line in (tmp_path / "o.csv").read_text().split()] == ["sat", "error"]


@pytest.fixture
def tool(root: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Writes the YAML of a verifier that answers what it is told, and ``sat`` where there is a witness."""
    (tmp_path / "tool.py").write_text(TOOL)

    def described(mode: str, **more: object) -> str:
        run = [sys.executable, str(tmp_path / "tool.py"), "{onnx}", "{vnnlib}", "{results}", "{timeout}", mode]
        environment = {"CALLS": str(tmp_path / "calls"), "WITNESSES": str(root / "witnesses")}
        content = {"name": "tool", "run": run, "environment": environment, **more}
        (tmp_path / "tool.yaml").write_text(json.dumps(content))
        return str(tmp_path / "tool.yaml")

    yield described


def test_a_tool_that_agrees(root: Path, tool: Callable[..., str], tmp_path: Path, capsys: Any) -> None:
    prepare = [sys.executable, "-c", "import sys; print('{category} {onnx}')"]
    command = ["verify", str(root / "instances.csv"), "--verifier", tool("unsat", prepare=prepare), "--jobs", "2"]
    assert main([*command, "--out", str(tmp_path / "v")]) == 0
    out = capsys.readouterr().out
    assert "9 unsat, 3 sat" in out and "agree" in out
    rows = (tmp_path / "v" / "results.csv").read_text().splitlines()
    assert [row.split(",")[1:3] for row in rows] == [
        [one.onnx, one.vnnlib] for one in read_instances(root / "instances.csv")
    ]
    assert rows[0].startswith("cure_small,") and len(list((tmp_path / "v" / "counterexamples").iterdir())) == 3


def test_a_tool_that_is_wrong_is_a_failure(root: Path, tool: Callable[..., str], tmp_path: Path, capsys: Any) -> None:
    shutil.rmtree(root / "witnesses")
    command = ["verify", str(root / "instances.csv"), "--verifier", tool("unsat"), "--out", str(tmp_path / "v")]
    assert main(command) == 3
    assert capsys.readouterr().out.count("CONTRADICTION") == 3
    command[-1] = str(tmp_path / "w")
    command[3] = tool("sat")
    assert main(command) == 3
    assert capsys.readouterr().out.count("no counterexample is given") == 12


def test_a_contradiction_shows_in_every_tree_and_after_resuming(
    root: Path, tool: Callable[..., str], tmp_path: Path
) -> None:
    shutil.rmtree(root / "witnesses")
    verifier = find_verifier(tool("unsat"))
    assert sum(run.contradicts for run in verify(root / "2.0" / "instances.csv", verifier, tmp_path / "a")) == 3
    metadata = (root / "metadata.json").read_text()
    (root / "metadata.json").unlink()
    assert not any(run.contradicts for run in verify(root / "instances.csv", verifier, tmp_path / "b"))
    (root / "metadata.json").write_text(metadata)
    assert sum(run.contradicts for run in verify(root / "instances.csv", verifier, tmp_path / "b")) == 3


def test_runs_resume(root: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    verifier, out = find_verifier(tool("unknown")), tmp_path / "v"
    first = verify(root / "instances.csv", verifier, out)
    lines = (out / "runs.jsonl").read_text().splitlines()
    (out / "runs.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    (tmp_path / "calls").unlink()
    assert [r.result for r in verify(root / "instances.csv", verifier, out)] == [r.result for r in first]
    assert len((tmp_path / "calls").read_text().splitlines()) == 7
    with pytest.raises(DataError, match="another verifier or list"):
        verify(root / "instances.csv", find_verifier(tool("timeout")), out)
    (out / "runs.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"runs.jsonl, line 2, is no record .*; delete it and runs.settings.json"):
        verify(root / "instances.csv", verifier, out)


def test_what_cannot_be_replayed_is_no_contradiction(tmp_path: Path, tool: Callable[..., str], capsys: Any) -> None:
    """A net that takes whole numbers: onnxruntime refuses our point, and the run goes on and says so."""
    import onnx

    line_net(tmp_path / "r", -1.0)
    model = onnx.load(tmp_path / "r" / "net.onnx")
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["X"], ["x"], to=onnx.TensorProto.FLOAT))
    model.graph.node[1].input[0] = "x"
    (tmp_path / "r" / "net.onnx").write_bytes(model.SerializeToString())
    write_instances(tmp_path / "r" / "instances.csv", [Instance("net.onnx", "p.vnnlib", 5)])
    command = ["verify", str(tmp_path / "r" / "instances.csv"), "--verifier", tool("sat ((X_0 0.5))")]
    assert main([*command, "--out", str(tmp_path / "v")]) == 2
    said = capsys.readouterr()
    assert "answers sat, but its counterexample cannot be replayed" in said.out and "CONTRADICTION" not in said.out
    assert "1 error" in said.out and "failed on every instance" in said.err


def test_weights_in_another_file(tmp_path: Path, tool: Callable[..., str]) -> None:
    import onnx

    line_net(tmp_path / "r", -1.0)
    model = onnx.load(tmp_path / "r" / "net.onnx")
    path = tmp_path / "r" / "net.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    write_instances(tmp_path / "r" / "instances.csv", [Instance("net.onnx", "p.vnnlib", 5)])
    (run,) = verify(tmp_path / "r" / "instances.csv", find_verifier(tool("sat ((X_0 0.5))")), tmp_path / "v")
    assert run.result == "sat" and not run.contradicts and not run.message
    (run,) = verify(tmp_path / "r" / "instances.csv", find_verifier("cure"), tmp_path / "w")
    assert run.result == "sat" and not run.contradicts
    (tmp_path / "r" / "net.data").unlink()
    (run,) = verify(tmp_path / "r" / "instances.csv", find_verifier("cure"), tmp_path / "x")
    assert run.result == "error" and "cannot unpack" in run.message


def test_a_torn_file_is_one_error(root: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    tree = root / "2.0"
    listed = read_instances(tree / "instances.csv")[:2]
    write_instances(tree / "instances.csv", listed)
    shrink(tree, listed[0].vnnlib)
    answered = "sat" if (root / "witnesses" / f"{listed[1].name}.txt").exists() else "unknown"
    runs = verify(tree / "instances.csv", find_verifier(tool("unknown")), tmp_path / "v")
    assert [run.result for run in runs] == ["error", answered] and "cannot unpack" in runs[0].message


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: 2024-13-45\nrun: [a]", "month must be"),
        (f"name: a\nrun: [0x{'f' * 6000}]", "digits"),
        ("name: a\nrun: [b]\ngrace: .inf", "grace must be finite"),
        ("name: a\nrun: ['{onnx:>9999999999}']", "is malformed"),
        ("name: a\nrun: ['{onnx']", "is malformed"),
        ("name: a\nrun: [b]\ngrace: soon", "grace must be a number"),
    ],
)
def test_verifier_files_that_make_no_sense(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises((SpecError, DataError), match=message):
        find_verifier(str(tmp_path / "v.yaml"))


@pytest.mark.parametrize("more", [{"environment": {"A=B": "1"}}, {"folder": "a\0"}, {"prepare": ["\ud800"]}])
def test_commands_that_no_process_can_be_given(
    more: dict[str, Any], root: Path, tool: Callable[..., str], tmp_path: Path
) -> None:
    write_instances(root / "instances.csv", read_instances(root / "instances.csv")[:1])
    (run,) = verify(root / "instances.csv", find_verifier(tool("unknown", **more)), tmp_path / "v")
    assert run.result == "error" and run.message
    with pytest.raises(SpecError, match="jobs must be >= 1"):
        verify(root / "instances.csv", find_verifier("cure"), tmp_path / "w", jobs=0)


def test_a_tool_that_fails_or_hangs(root: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    instances = read_instances(root / "instances.csv")
    write_instances(root / "instances.csv", [Instance(instances[0].onnx, instances[0].vnnlib, 0.5)])
    (run,) = verify(root / "instances.csv", find_verifier(tool("crash")), tmp_path / "a")
    assert run.result == "error" and "no licence" in run.message and "no licence" in summary_text([run])
    started = time.perf_counter()
    (run,) = verify(root / "instances.csv", find_verifier(tool("sleep", grace=0.5)), tmp_path / "b")
    assert run.result == "timeout" and time.perf_counter() - started < 20
    (run,) = verify(root / "instances.csv", Verifier("none", ("/does/not/exist",)), tmp_path / "c")
    assert run.result == "error" and "No such file" in run.message
    (run,) = verify(root / "instances.csv", find_verifier(tool("unsat", prepare=["false"])), tmp_path / "d")
    assert run.result == "error" and "prepare ended with 1" in run.message


def test_verifiers_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for content, message in (
        ("{name: a}", "must map name and run"),
        ("{name: a, run: [x], speed: 3}", "must map name and run"),
        ("{name: a, run: x}", "must be a list of words"),
        ("{name: a, run: ['{net}']}", "placeholders are"),
        ("{name: a, run: [x], environment: [y]}", "environment must map"),
        ("{name: a, run: [x], grace: -1}", "grace must be"),
        ("{name: '', run: [x]}", "needs a name"),
    ):
        (tmp_path / "v.yaml").write_text(content)
        with pytest.raises(SpecError, match=message):
            find_verifier(str(tmp_path / "v.yaml"))
    (tmp_path / "v.yaml").write_text("{")
    for name, error, message in (
        ("abcrwn", SpecError, "known: cure, marabou"),
        (str(tmp_path / "v.yaml"), DataError, "cannot read verifier"),
        (str(tmp_path / "none.yaml"), DataError, "cannot read verifier"),
    ):
        with pytest.raises(error, match=message):
            find_verifier(name)


def test_lists_that_cannot_be_run_are_refused(root: Path, tmp_path: Path) -> None:
    for text, message in (("", "lists no instances"), ("a,b,-1\n", "timeout > 0"), ("a,b\n", "expected onnx")):
        (root / "instances.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            verify(root / "instances.csv", find_verifier("marabou"), tmp_path / "v")
    (root / "instances.csv").write_text("onnx/net.onnx,vnnlib/none.vnnlib,5\n")
    with pytest.raises(DataError, match=r"none\.vnnlib, which does not exist"):
        verify(root / "instances.csv", find_verifier("marabou"), tmp_path / "v")


def test_marabou_runs_the_compressed_tree(root: Path, tmp_path: Path) -> None:
    """A process per instance, on the 2.0 files, which it gets unpacked; it never contradicts us."""
    pytest.importorskip("maraboupy")
    tree, metadata = root / "2.0", json.loads((root / "metadata.json").read_text())["instances"]
    small = [name for name, entry in metadata.items() if entry["encoding"]["kind"] in ("parameters", "contents")]
    listed = [one for one in read_instances(tree / "instances.csv") if one.name in small][:2]
    write_instances(tree / "instances.csv", listed)
    (tree / "metadata.json").write_text((root / "metadata.json").read_text())
    runs = verify(tree / "instances.csv", find_verifier("marabou"), tmp_path / "v", jobs=2)
    assert len(runs) == 2 and not any(run.contradicts for run in runs)
    assert all(run.result in ("sat", "unsat") for run in runs)


def test_our_certifier_is_a_verifier_too(root: Path, tmp_path: Path) -> None:
    metadata = json.loads((root / "metadata.json").read_text())["instances"]
    verdicts = [name_of(metadata, "robust"), name_of(metadata, "violated")]
    listed = [one for one in read_instances(root / "instances.csv") if one.name in verdicts]
    write_instances(root / "instances.csv", listed)
    runs = verify(root / "instances.csv", find_verifier("cure"), tmp_path / "v")
    assert {run.result for run in runs} <= {"sat", "unsat", "unknown"} and not any(run.contradicts for run in runs)
    assert (tmp_path / "v" / "counterexamples" / f"{verdicts[1]}.txt").is_file()
