"""An exported file on onnxruntime, beside PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cure_plugin.vnncomp.replay import Network


class RuntimeNet:
    """An ONNX classifier on onnxruntime's CPU provider.

    Raises:
        CheckpointError: the file cannot be loaded.
    """

    def __init__(self, path: str | Path) -> None:
        self._network = Network(path)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, ...), one by one, reshaped to the file's input."""
        return torch.from_numpy(np.stack([self._network(image) for image in x.detach().cpu().numpy()])).float()


def parity(net: nn.Module, path: str | Path, x: Tensor) -> float:
    """Largest difference between the logits of ``net`` and of the ONNX file on images ``x``."""
    with torch.no_grad():
        return float((net(x).cpu() - RuntimeNet(path)(x)).abs().max())
