"""Draws what each set does to an image, for the pages of the sets: python docs/pictures.py"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cure_plugin import PerturbationSet, load_data, set_spec
from cure_plugin.report.plots import load_pyplot

SHOWN = {
    "linf": ("linf=0.1", "linf=0.3"),
    "l2": ("l2=0.5", "l2=2.0"),
    "l1": ("l1=1.0", "l1=8.0"),
    "patch": ("patch=2x2", "patch=5x5"),
    "l0": ("l0=3", "l0=12"),
    "geometric": ("R(30)", "T(3,3)", "Sc(20) Sh(20)", "C(30) B(0.2)"),
    "union": ("linf=0.1", "l2=2.0", "R(30)"),
}
"""File -> the sets drawn in it."""

IMAGES = Path(__file__).parent / "images"
STEPS = 60


def extreme(perturbation: PerturbationSet, x: Tensor, generator: torch.Generator) -> Tensor:
    """The point of the set that attack steps find where a random linear function of the pixels is to grow."""
    direction = torch.randn(x.shape, generator=generator)
    variable = perturbation.random_start(x, generator)
    for step in range(STEPS):
        variable = variable.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((perturbation.decode(x, variable) * direction).sum(), variable)
        variable = perturbation.ascend(x, variable.detach(), gradient, 0.5 * (1 - step / STEPS))
    return perturbation.decode(x, variable)


def draw(sets: dict[str, PerturbationSet], path: Path) -> None:
    """A row per set: the image, two points of the set's border, and what the second adds (red) and takes (blue)."""
    pyplot = load_pyplot()
    generator = torch.Generator().manual_seed(0)
    x, _ = load_data("mnist-slice", train=False).batch(slice(0, 1))
    figure, axes = pyplot.subplots(len(sets), 4, figsize=(6.4, 1.75 * len(sets)), squeeze=False)
    for row, (name, perturbation) in zip(axes, sets.items(), strict=True):
        points = [x, *(extreme(perturbation, x, generator) for _ in range(2))]
        for axis, point in zip(row, points, strict=False):
            axis.imshow(point[0, 0].detach(), cmap="gray", vmin=0, vmax=1)
        row[3].imshow((points[2] - x)[0, 0].detach(), cmap="bwr", vmin=-1, vmax=1)
        row[0].set_ylabel(name, fontsize=9)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], ("image", "a point of the set", "another", "its difference"), strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    for file, texts in SHOWN.items():
        draw({text: set_spec(text).build() for text in texts}, IMAGES / f"set_{file}.png")
