"""CIFAR-10's python batches, read without trusting the pickle format."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from cure_plugin.errors import DataError

_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_PICKLED_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")
        return _PICKLED_NAMES[module, name]


def _read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    try:
        with path.open("rb") as file:
            content = _unpickle(file)
        data, labels = content[b"data"], content[b"labels"]
        return np.asarray(data, dtype=np.uint8).reshape(-1, 3, 32, 32), [int(label) for label in labels]
    except (OSError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"cannot read CIFAR-10 batch {path}: {error}; fetch the file again") from error


def _unpickle(file: BinaryIO) -> Any:
    return _ArraysOnly(file, encoding="bytes").load()


def read_cifar10(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """(images (N, 3, 32, 32) uint8, labels (N,) int64) from the batches in ``folder``."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    batches = [_read_batch(folder / name) for name in names]
    images = np.concatenate([images for images, _ in batches])
    return torch.from_numpy(images), torch.tensor([label for _, labels in batches for label in labels])
