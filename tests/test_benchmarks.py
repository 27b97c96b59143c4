"""The benchmark scripts' own arithmetic, on a few images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cure_plugin.datasets import load_data

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_certify
import bench_sets
import bench_splitting
import ledger


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


def test_rows_measured_apart_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    ledger.record_rows("r", "command", {"rows": [{"set": "a", "n": 1}, {"set": "b", "n": 2}]}, ("set",))
    monkeypatch.setattr(ledger, "COMMIT", "later")
    path = ledger.record_rows("r", "command", {"rows": [{"set": "b", "n": 3}]}, ("set",))
    rows = json.loads(path.read_text())["figures"]["rows"]
    assert [(row["set"], row["n"], row["commit"] == "later") for row in rows] == [("a", 1, False), ("b", 3, True)]


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
