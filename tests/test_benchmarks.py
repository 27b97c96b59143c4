"""The benchmark scripts' own arithmetic, on a few images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cure_plugin.datasets import load_data

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_sets


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
