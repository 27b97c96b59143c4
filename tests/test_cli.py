"""The command line: the whole chain on a tiny run, and one-line errors with exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_net

from cure_plugin.checkpoint import load_net
from cure_plugin.cli import main
from cure_plugin.datasets import load_data
from cure_plugin.export import export_onnx

QUICK = ["epochs=1", "batch_size=200", "natural_epochs=1", "ramp_epochs=0", "gradient_projection=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", "demo_linf", *QUICK, "--out", str(folder)]) == 0
    return folder


def test_train_certify_export_report(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len((trained / "training.jsonl").read_text().splitlines()) == 1
    assert main(["train", "demo_linf", "--out", str(trained), *QUICK]) == 0  # the other order, found finished
    model = str(trained / "checkpoint.pt")
    certify = ["certify", model, "linf=1/255", "l2=0.05", "--images", "6", "--methods", "IBP,CROWN-IBP", "--float64"]
    assert main([*certify, "--out", str(tmp_path / "c")]) == 0
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert set(summary["certified"]) == {"linf", "l2"} and summary["images"] == 6
    assert len((tmp_path / "c" / "results.csv").read_text().splitlines()) == 1 + 6 * 2
    assert "| linf cert. / attack leaves |" in (tmp_path / "c" / "report.md").read_text()
    assert (tmp_path / "c" / "report.html").read_text().count('<img class="plot"') == 1
    results = str(tmp_path / "c" / "results.jsonl")
    assert main(["compare", results, results, "--out", str(tmp_path / "d")]) == 0
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"compare.md", "compare.csv"}
    assert main(["export", model, "linf=1/255", "--images", "2", "--out", str(tmp_path / "e")]) == 0
    names = sorted(p.name for p in (tmp_path / "e" / "vnnlib").iterdir())
    assert names == ["linf-1-255_box_0.vnnlib", "linf-1-255_box_1.vnnlib"]
    listed = (tmp_path / "e" / "instances.csv").read_text().splitlines()
    assert listed == [f"onnx/model.onnx,vnnlib/{name},300" for name in names]
    onnx = str(tmp_path / "e" / "onnx" / "model.onnx")
    assert main(["certify", onnx, "linf=1/255", "--images", "2", "--methods", "IBP", "--out", str(tmp_path / "o")]) == 0
    assert main(["export", onnx, "linf=1/255", "--images", "1", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "vnnlib" / names[0]).read_bytes() == (
        tmp_path / "e" / "vnnlib" / names[0]
    ).read_bytes()
    (tmp_path / "sets.yaml").write_text("[linf=1/255]")
    sets = str(tmp_path / "sets.yaml")
    assert main(["export", model, sets, "l2=0.1", "--gz", "--images", "1", "--out", str(tmp_path / "f")]) == 0
    names = sorted(path.name for path in (tmp_path / "f" / "vnnlib").iterdir())
    assert names == ["l2-0.1_distance_0.vnnlib.gz", "linf-1-255_box_0.vnnlib.gz"]
    report = ["report", f"one={model}", "--sets", sets, "--images", "3", "--out", str(tmp_path / "r")]
    assert main(report) == 0
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<table>" in page and "data:image/png" in page
    assert "union cert. / attack leaves" in capsys.readouterr().out


def test_certify_a_state_dict_for_sets_from_a_file(trained: Path, tmp_path: Path) -> None:
    torch.save(load_net(trained / "checkpoint.pt")[1].state_dict(), tmp_path / "weights.pt")
    (tmp_path / "sets.yaml").write_text("sets: [linf=1/255, R(1), {union: [l2=0.05, l1=0.05]}]")
    sets = [str(tmp_path / "sets.yaml"), "patch=1x1"]
    arguments = ["certify", str(tmp_path / "weights.pt"), *sets, "--net", "cnn_small", "--images", "2"]
    assert main([*arguments, "--methods", "IBP,CROWN", "--out", str(tmp_path / "c")]) == 0
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert set(summary["certified"]) == {"linf", "R(1)", "union(l2,l1)", "patch1x1"}
    assert {"geometric", "patch", "universal"} <= set(summary["groups"])


def test_certify_draws_curves_on_demand(trained: Path, tmp_path: Path) -> None:
    arguments = ["certify", str(trained / "checkpoint.pt"), "linf=1/255", "--images", "2", "--methods", "IBP"]
    assert main([*arguments, "--curves", "--out", str(tmp_path)]) == 0
    assert "Certified accuracy as the sets grow" in (tmp_path / "report.html").read_text()


def test_certify_without_matplotlib_writes_the_rest(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["certify", str(trained / "checkpoint.pt"), "linf=1/255", "--images", "2", "--methods", "IBP"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "report.html is left out" in (error := capsys.readouterr().err) and "cure-plugin[plot]" in error
    written = {path.name for path in tmp_path.iterdir()}
    assert {"results.jsonl", "results.csv", "summary.json", "report.md"} <= written and "report.html" not in written


def test_train_again_reuses(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo_linf", *QUICK, "--out", str(trained)]) == 0
    assert "found 1 of 1 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "nope", "--out", "OUT"], "unknown recipe 'nope'"),
        (["train", "demo_cure", "epoch=3", "--out", "OUT"], "did you mean 'epochs'"),
        (["train", "demo_cure", "epochs", "--out", "OUT"], "key=value"),
        (["train", "demo_cure", "data=mnist", "--data", "OUT/none", "--out", "OUT"], "does not exist"),
        (["certify", "none.pt", "linf=0.1", "--out", "OUT"], "cannot read checkpoint none.pt"),
        (["certify", "MODEL", "linf=-1", "--out", "OUT"], "eps must be finite and >= 0"),
        (["certify", "MODEL", "none.yaml", "--out", "OUT"], "cannot read sets from none.yaml"),
        (["certify", "MODEL", "linf=0.1", "--net", "cnn_tiny", "--out", "OUT"], "does not fit net 'cnn_tiny'"),
        (["certify", "MODEL", "l3=1", "--out", "OUT"], "unknown set 'l3'"),
        (["certify", "MODEL", "linf=0.1", "--on", "cifar10", "--data", "OUT/none", "--out", "OUT"], "does not exist"),
        (["certify", "MODEL", "linf=0.1", "--images", "0", "--out", "OUT"], "choose 1 to 1000"),
        (["certify", "MODEL", "linf=0.1", "--timeout", "-1", "--out", "OUT"], "seconds must be finite and > 0, got -1"),
        (["certify", "MODEL", "linf=0.1", "--methods", "CRWN", "--out", "OUT"], "unknown method"),
        (["certify", "CORRUPT.onnx", "linf=0.1", "--out", "OUT"], "cannot read ONNX file"),
        (["certify", "SMALL.onnx", "linf=0.1", "--out", "OUT"], "takes inputs of shape (1, 8, 8)"),
        (["certify", "TRUNCATED.pt", "linf=0.1", "--out", "OUT"], "cannot read checkpoint"),
        (["certify", "MODEL", "linf=0.1", "--images", "1", "--out", "FILE/x"], "cannot create folder"),
        (["export", "MODEL", "--out", "FILE/x"], "cannot write"),
        (["export", "MODEL", "l2=0.1", "--encoding", "ball", "--images", "1", "--out", "OUT"], "needs VNNLIB 2.0"),
        (["export", "MODEL", "l2=0.1", "--encoding", "patch", "--images", "1", "--out", "OUT"], "it is for patches"),
        (["report", "MODEL", "--out", "OUT"], "name=checkpoint.pt"),
        (["certify", "TEXT.pt", "linf=0.1", "--out", "OUT"], "cannot read checkpoint"),
        (["certify", "MODEL", "linf=1e400", "--out", "OUT"], "must be finite"),
        (["train", "demo_cure", "milestones=[1,2", "--out", "OUT"], "'milestones' has the unusable value"),
        (["train", "demo_cure", "epochs=.inf", "--out", "OUT"], "'epochs' has the unusable value"),
    ],
)
def test_faults_are_one_line_and_exit_2(
    arguments: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained / "checkpoint.pt"
    (tmp_path / "corrupt.onnx").write_bytes(b"not a model")
    (tmp_path / "truncated.pt").write_bytes(model.read_bytes()[:500])
    export_onnx(small_net("plain"), (1, 8, 8), tmp_path / "small.onnx")
    (tmp_path / "text.pt").write_text("hello\n")
    (tmp_path / "file").write_text("")
    places = {
        "MODEL": str(model),
        "TEXT.pt": str(tmp_path / "text.pt"),
        "SMALL.onnx": str(tmp_path / "small.onnx"),
        "CORRUPT.onnx": str(tmp_path / "corrupt.onnx"),
        "TRUNCATED.pt": str(tmp_path / "truncated.pt"),
        "FILE": str(tmp_path / "file"),
        "OUT": str(tmp_path / "out"),
    }
    resolved = [
        next((value + a.removeprefix(key) for key, value in places.items() if a.startswith(key)), a) for a in arguments
    ]
    assert main(resolved) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("cure: ")]) == 1
    assert message in error[-1]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_sets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("linf", "l2", "l1", "patch", "l0", "5x5"))


def test_unknown_commands_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_information:
        main(["fly"])
    assert exit_information.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_the_papers_recipes_run_for_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``cure train mnist_small/scratch --device cuda`` on as many images as a CPU can take: every part has its turn."""
    monkeypatch.setattr("cure_plugin.cli.train.load_data", lambda name, train, root: load_data(name, train).first(4))
    quick = [
        "data=mnist-slice",
        "net=cnn7_narrow",
        "batch_size=2",
        "epochs=3",
        "ramp_epochs=1",
        "milestones=[2]",
        "attack_steps=2",
    ]
    assert main(["train", "mnist_small/scratch", *quick, "--out", str(tmp_path)]) == 0
    spec, _ = load_net(tmp_path / "checkpoint.pt")
    assert spec.name == "cnn7_narrow" and spec.batch_norm
    log = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert "natural_loss" in log[-1] and log[-1]["scale"] == 1.0 and "test.ibp.l2" in log[-1]


def test_finetuning_without_a_start_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mnist_small/finetune", "data=mnist-slice", "--out", str(tmp_path)]) == 2
    assert "give start=PATH" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["train", "demo_linf"], ["certify", "net.pt", "linf=0.1"]], ids=" ".join)
def test_a_device_that_is_not_there_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "device 'cuda' is not available here; use cpu" in capsys.readouterr().err


def test_the_demo_ends_with_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What it returns is a summary, no exit code."""
    monkeypatch.setattr(
        sys.modules["cure_plugin.cli.main"],
        "run_demo",
        lambda folder, say, quick: say(f"to {folder}, {quick}") or {"images": 200},
    )
    assert main(["demo", "--out", "somewhere"]) == 0
    assert main(["demo", "--quick", "--out", "somewhere"]) == 0
    assert capsys.readouterr().out == "to somewhere, False\nto somewhere, True\n"


def test_refusals_lead_on(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What newcomers did, and what they should have been told."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    model, out = str(trained / "checkpoint.pt"), ["--images", "1", "--methods", "IBP", "--out", str(tmp_path / "out")]
    assert main(["certify", model, "linf=1/255", *out]) == 0
    for arguments, said in (
        (["certify", str(tmp_path / "whole.pt"), "linf=0.1"], "give its ONNX file"),
        (["certify", str(tmp_path / "weights.pt"), "linf=0.1"], "--net"),
        (["certify", "nowhere.pt", "linf=0.1"], "there is no such file; check the path"),
        (["certify", "nowhere.onnx", "linf=0.1"], "there is no such file; check the path"),
        (["certify", "nowhere.onnx.gz", "linf=0.1"], "there is no such file; check the path"),
        (["certify", model, "linf=2/255"], "what differs: sets"),
    ):
        assert main([*arguments, *out]) == 2
        assert said in capsys.readouterr().err
