"""Run an exported file on onnxruntime: parity with PyTorch, and counterexamples again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from cure_plugin.errors import CheckpointError


class OnnxNet:
    """An ONNX classifier on onnxruntime's CPU provider.

    Raises:
        CheckpointError: the file cannot be loaded.
    """

    def __init__(self, path: str | Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise CheckpointError(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error
        self._input = self._session.get_inputs()[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, ...), one by one, reshaped to the file's input."""
        shape = [1, *self._input.shape[1:]]
        rows = [
            self._session.run(None, {self._input.name: image.reshape(shape).astype(np.float32)})[0]
            for image in x.detach().cpu().numpy()
        ]
        return torch.from_numpy(np.concatenate(rows))


def parity(net: nn.Module, path: str | Path, x: Tensor) -> float:
    """Largest difference between the logits of ``net`` and of the ONNX file on images ``x``."""
    with torch.no_grad():
        return float((net(x).cpu() - OnnxNet(path)(x)).abs().max())
