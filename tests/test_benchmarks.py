"""The benchmark scripts' own arithmetic, on a few images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cure_plugin.certification import branch_and_bound
from cure_plugin.certification.dataset import set_names
from cure_plugin.checkpoint import load_checkpoint
from cure_plugin.datasets import DATASETS, ImageData, load_data
from cure_plugin.errors import CheckpointError, DataError, SpecError
from cure_plugin.relaxation.search import Limits
from cure_plugin.sets import set_spec
from cure_plugin.training import load_recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_branching
import bench_certify
import bench_generalization
import bench_sets
import bench_splitting
import bench_training
import ledger
import reproduce
import reproduce_report
import runs
import step_beside


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nets of two steps leave open takes branch and bound all its seconds."""
    monkeypatch.setattr(branch_and_bound, "Limits", lambda seconds, _, batch: Limits(seconds, 50, batch))


@pytest.mark.parametrize("angle", bench_sets.ANGLES)
@pytest.mark.parametrize("width", bench_sets.WIDTHS)
def test_hull_is_close_to_the_truth_and_far_tighter_than_weight_intervals(angle: float, width: float) -> None:
    x, _ = load_data("mnist-slice", False).batch(slice(0, 3))
    widths = bench_sets.hull_widths(x, angle, angle + width)
    assert widths["truth"] <= widths["hull"] <= 1.35 * widths["truth"]
    assert widths["cgt"] >= 3 * widths["truth"]


def test_comparison_counts_the_images_that_are_left() -> None:
    net = bench_sets.load_recipe(
        bench_sets.RECIPES / "linf.yaml", {"data": "mnist-slice", "epochs": 2, "ramp_epochs": 1}
    )
    data = load_data("mnist-slice", True).first(1000)
    certifier = bench_sets.Certifier(bench_sets.Trainer(net, data).run(), data.shape, batch_size=32)
    whole = bench_sets.PerturbationGeometric.parse("R(2)")
    cells = bench_sets.grid_of_boxes(whole, (0.5,))
    assert len(cells[0]) == 8 and float(cells[0].min()) == -2 and float(cells[1].max()) == 2

    def by_boxes(x: bench_sets.Tensor, y: bench_sets.Tensor) -> bool:
        return bench_sets.proved_by_boxes(certifier, x, y, whole.names, cells)

    test = load_data("mnist-slice", False).first(8)
    row = bench_sets.compare(certifier, test, "R(2)", lambda: bench_sets.PerturbationGeometric.parse("R(2)"), by_boxes)
    assert row["attacked"] + row["splitting"]["proved"] <= 8
    assert row["splitting"]["pieces_per_image"] > 0 and row["other"]["proved"] <= 8 - row["attacked"]


def test_the_plain_loop_starts_with_what_the_cascade_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_certify, "ALPHA_ITERATIONS", 1)
    data = load_data("mnist-slice", False).first(6)
    _, net = bench_certify.load_net(bench_certify.FIXTURES / "ball.pt")
    ours = bench_certify.cascade(net.eval(), data, "l2=0.5", ("IBP", "CROWN", "coupled"))
    assert set(ours["proved"]).isdisjoint(ours["undecided"]) and ours["proved"]
    whole = bench_certify.plain_loop(net, data, "l2=0.5", range(6))
    assert whole["unreached"] == 0 and set(whole["proved"]) <= set(ours["proved"])
    stopped = bench_certify.plain_loop(net, data, "l2=0.5", [5, 4, 3, 2, 1, 0], limit=0.0)
    assert stopped["crown"] == whole["crown"] and len(stopped["proved"]) == stopped["crown"]
    assert stopped["unreached"] == 6 - stopped["crown"]


def test_what_branch_and_bound_closes_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With and without it, on the images that are open without."""
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)

    def cascade(_: object, data: ImageData, text: str, methods: list[str]) -> dict[str, Any]:
        complete = "branch-and-bound" in methods
        assert len(data) == (3 if complete else 5) and text.startswith("l1=")
        return {"proved": [0, 2] if complete else [1], "undecided": [1] if complete else [0, 2, 4], "seconds": 10.0}

    monkeypatch.setattr(bench_branching, "cascade", cascade)
    bench_branching.main(["--images", "5", "--record"])
    assert "| ball, l1=1.75 | 5 | 1, 3 | 3, 1 | 2.0, 3.3 |" in ledger.branching_table()


def test_rows_measured_apart_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    ledger.record_rows("r", "command", {"rows": [{"set": "a", "n": 1}, {"set": "b", "n": 2}]}, ("set",))
    first = ledger.hardware()
    monkeypatch.setattr(ledger, "COMMIT", "later")
    monkeypatch.setattr(ledger, "hardware", lambda: ledger.Hardware("another", 2, "3.11"))
    path = ledger.record_rows("r", "command", {"rows": [{"set": "b", "n": 3}], "threads": 1}, ("set",))
    rows = json.loads(path.read_text())["figures"]["rows"]
    assert [(row["set"], row["n"], row["commit"] == "later") for row in rows] == [("a", 1, False), ("b", 3, True)]
    assert [row["cpu"] for row in rows] == [first.cpu, "another"]
    assert f"1 thread, {first.cpu} and another, commit" in ledger.shown_origin(ledger.read_entry(path))


def test_splitting_is_measured_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = bench_sets.Certifier(
        bench_certify.load_net(bench_certify.FIXTURES / "ball.pt")[1], (1, 28, 28), attack_steps=5
    )
    monkeypatch.setattr(bench_splitting, "trained", lambda *_: net)
    monkeypatch.setattr(bench_splitting, "IMAGES", 3)
    case = bench_splitting.Case("linf", "mnist", "R(1)", 7)
    first, again = (bench_splitting.measure(case, "mnist-slice", None, tmp_path) for _ in range(2))
    assert {**first, "peak_gigabytes": 0} == {**again, "peak_gigabytes": 0}
    assert first["images"] == 3 and first["certified"] <= first["pgd"] <= 1 and first["cgt_splits"] == 7
    assert "R(1)" in bench_splitting.shown(first)


def test_reproduce_trains_certifies_records_once_and_reports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "load_data", lambda name, train, root: load_data(name, train).first(40))
    monkeypatch.setattr(reproduce, "IMAGES", 2)
    monkeypatch.setattr(reproduce, "ABLATION_IMAGES", 1)
    quick = {"data": "mnist-slice", "net": "cnn_tiny", "epochs": 2, "natural_epochs": 1, "ramp_epochs": 0}
    quick["batch_size"] = 20
    for module in (reproduce, runs):
        monkeypatch.setattr(module, "load_recipe", lambda name, more: load_recipe(name, {**quick, **more}))
    arguments = ["small_mnist_small", "--methods", "finetune", "ba_only", "--no-progress"]
    command = ["reproduce.py", *arguments, "--seeds", "0", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    reproduce.main()
    first = capsys.readouterr().out
    assert "small_mnist_small-finetune-0: clean" in first and "small_mnist_small-ba_only-0: clean" in first
    entry = json.loads((tmp_path / "results" / "reproduce" / "small_mnist_small-finetune-0.json").read_text())
    figures = entry["figures"]
    assert figures["radii"] == ["linf=0.1", "l2=0.5", "l1=1.0"] and figures["images"] == 2
    assert {"clean", "certified", "union", "train_seconds", "certify_seconds", "overrides"} <= set(figures) and entry[
        "seed"
    ] == 0
    assert figures["recipe"]["epochs"] == 2 and figures["recipe"]["start"] == "small_mnist_small/linf_slow"
    tries = ["small_mnist_small", "--methods", "ba_only", "--images", "2", "--no-progress", "--seeds", "0"]
    attempt = ["reproduce.py", *tries, "--out", str(tmp_path / "try")]
    monkeypatch.setattr(sys, "argv", [*attempt, "learning_rate=0.001"])
    reproduce.main()  # a try, so on other images, and not in the ledger
    assert capsys.readouterr().out.startswith("figures: clean")
    tried = json.loads((tmp_path / "try" / "small_mnist_small" / "ba_only-0" / "figures.json").read_text())["figures"]
    assert tried["overrides"] == ["learning_rate=0.001"] and tried["recipe"]["learning_rate"] == 0.001
    monkeypatch.setattr(sys, "argv", [*attempt, "learning_rate=0.002"])
    with pytest.raises(CheckpointError, match="another recipe"):
        reproduce.main()  # the folder of one try is not taken for another's
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(runs, "Trainer", None)  # what is in the ledger is not run again
    reproduce.main()
    assert capsys.readouterr().out == first
    path = tmp_path / "results" / "reproduce" / "small_mnist_small-finetune-0.json"
    path.write_text(path.read_text().replace('"decay": 0.2', '"decay": 0.3'))
    with pytest.raises(SpecError, match="is of another recipe; delete it"):
        reproduce.main()
    monkeypatch.undo()
    text = reproduce_report.tables(tmp_path / "results")
    assert "first 2 test images" in text and "union, attack leaves" in text
    assert "| CURE-Finetune | 2 | 0 |" in text and "| Max + BA (first 1 images) | 2 | 0 |" in text
    pytest.importorskip("matplotlib")
    reproduce_report.plot(tmp_path / "results", "small_mnist_small", tmp_path / "plot.svg")
    assert "CURE-Finetune" in (tmp_path / "plot.svg").read_text()


def test_shares_are_shown_with_their_spread() -> None:
    assert reproduce_report.shown([0.5]) == "50.0" and reproduce_report.shown([0.5, 0.6]) == "55.0 ± 5.0"


@pytest.mark.parametrize("net", ["cnn_small", pytest.param("cnn7_narrow", marks=pytest.mark.slow)])
def test_training_steps_are_measured_against_a_floor(net: str) -> None:
    row = bench_training.measure(net, 2, 0.0, {})
    for name in ("cure", "sabr"):
        assert row[name]["floor"] > 0 and row[name]["peak_mib"] > 0
    assert row["memory_ratio"] > 0


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def allocate() -> None:
        kept = bench_training.torch.zeros(1 << 18)
        for _ in range(3):
            bench_training.torch.zeros(1 << 18)
        del kept

    assert bench_training.peak_bytes(allocate) == pytest.approx(2 * (4 << 18), rel=0.05)


def test_generalization_certifies_what_the_lists_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"epochs": 1, "natural_epochs": 1, "ramp_epochs": 0, "gradient_projection": 0, "milestones": []}
    quick["net"] = "cnn_tiny"
    (tmp_path / "tiny.yaml").write_text("{data: mnist-slice, images: 2, seen: [linf=0.01], unseen: [C(1), linf=0.02]}")
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench_generalization, "SPECS", tmp_path)
    for module in (bench_generalization, runs):
        monkeypatch.setattr(module, "load_data", lambda name, train, data: load_data(name, train, data).first(200))
    monkeypatch.setattr(runs, "load_recipe", lambda name, more: load_recipe(name, {**quick, **more}))
    command = ["bench_generalization.py", "tiny", "--images", "2", "--out", str(tmp_path / "out"), "--record"]
    monkeypatch.setattr(sys, "argv", [*command, "linf=slice/linf"])
    bench_generalization.main()
    monkeypatch.setattr(
        sys, "argv", [*command, f"again={tmp_path / 'out' / 'nets' / 'slice' / 'linf' / 'checkpoint.pt'}"]
    )
    bench_generalization.main()
    rows = json.loads((tmp_path / "results" / "generalization.json").read_text())["figures"]["rows"]
    assert [row["net"] for row in rows] == ["linf", "again"] and rows[0]["certified"] == rows[1]["certified"]
    assert rows[0]["epochs"] == 1 and set(rows[0]["certified"]) == {"linf=0.01", "C(1)", "linf=0.02"}
    text = ledger.generalization_tables()
    assert "| tiny | clean | linf=0.01 | *C(1)* | *linf=0.02* |" in text and "| again |" in text


def test_shipped_lists_of_sets_make_sense() -> None:
    for path in bench_generalization.SPECS.glob("*.yaml"):
        spec = bench_generalization.yaml.safe_load(path.read_text())
        names = set_names([set_spec(text) for text in (*spec["seen"], *spec["unseen"])])
        assert len(names) >= 3 and spec["unseen"] and spec["data"] in DATASETS, path


def test_tries_stay_out_of_the_ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "load_data", lambda name, train, root: load_data(name, train).first(40))
    changes = ["data=mnist-slice", "net=cnn_tiny", "epochs=1", "natural_epochs=1", "ramp_epochs=0"]
    arguments = ["small_mnist_small", *changes, "--methods", "linf", "--images", "2", "--no-progress"]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments, "--seeds", "0", "--out", str(tmp_path / "out")])
    reproduce.main()
    figures = json.loads((tmp_path / "out" / "small_mnist_small" / "linf-0" / "figures.json").read_text())["figures"]
    assert figures["overrides"] == changes and not (tmp_path / "results").exists()
    checkpoint = load_checkpoint(tmp_path / "out" / "small_mnist_small" / "linf-0" / "checkpoint.pt")
    assert checkpoint["data"] == load_data("mnist-slice", True).first(36).digest()  # the last four of 40 are looked at


def test_other_training_code_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    net, x, y = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    for make, folder in ((step_beside.sabr_step, tmp_path / "none"), (step_beside.ctrain_step, tmp_path)):
        with pytest.raises(DataError, match=r"is no folder|cannot import"):
            make(folder, net, x, y, 0.1, 0.4, 8)
