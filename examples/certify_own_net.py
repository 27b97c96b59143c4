"""Certify your own torch net, whatever trained it, for several sets at once, and write a report's records.

The net here is a small residual one, trained for a moment on the shipped images; put yours in its place. It must map
pixels in [0, 1] to logits: make a normalisation its first layer (``cure_plugin.Normalize``).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from cure_plugin import (
    Certifier,
    ImageData,
    Normalize,
    Summary,
    certify_dataset,
    load_data,
    set_spec,
    summarize,
)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(Normalize([0.13], [0.31]), nn.Conv2d(1, 4, 4, 4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.tail = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(196, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.tail(x + self.block(x))


def trained(data: ImageData) -> nn.Module:
    torch.manual_seed(0)
    net = Residual()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for order in torch.randperm(len(data)).split(100):
        x, y = data.batch(order)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def main() -> Summary:
    net = trained(load_data("mnist-slice", True).first(5000))
    test = load_data("mnist-slice", False).first(10)  # or ImageData(uint8 (N, C, H, W), labels (N,), classes)
    sets = [set_spec(text) for text in ("linf=0.01", "l2=0.1", "l1=0.2", "R(2)", "patch=1x1")]
    with TemporaryDirectory() as folder:
        records = certify_dataset(Certifier(net, (1, 28, 28)), test, sets, Path(folder) / "results.jsonl")
    summary = summarize(records)
    print(f"clean {summary.clean:.2f}, certified {summary.certified}, all at once {summary.groups}")
    return summary


if __name__ == "__main__":
    main()
