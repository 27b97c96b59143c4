"""Bound a net's outputs under a perturbation, as auto_LiRPA's own introductory example does.

Everything below is a stock auto_LiRPA script but for the two lines marked "cure_plugin": the import and
the perturbation. Change the norm to 1, 2 or inf, or hand over a union.
"""

from __future__ import annotations

import torch
from torch import nn

from cure_plugin import PerturbationLpBall  # cure_plugin (also mends auto_LiRPA 0.3 on modern stacks)

from auto_LiRPA import BoundedModule, BoundedTensor  # isort: skip


def mnist_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def main() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = mnist_model().eval()
    image = torch.rand(2, 1, 28, 28)
    lirpa_model = BoundedModule(model, torch.empty_like(image))

    ptb = PerturbationLpBall(norm=2, eps=0.3)  # cure_plugin; was: PerturbationLpNorm(norm=2, eps=0.3)
    bounded_image = BoundedTensor(image, ptb)

    bounds = {}
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        lower, upper = lirpa_model.compute_bounds(x=(bounded_image,), method=method)
        bounds[method] = (lower.detach(), upper.detach())
        print(f"{method}: mean width {(upper - lower).mean().item():.4f}")
    return bounds


if __name__ == "__main__":
    main()
