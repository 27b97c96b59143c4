"""MNIST's idx files, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cure_plugin.errors import DataError

_MAGIC_UINT8 = 0x0800


def read_idx(path: Path) -> Tensor:
    """The uint8 array in an idx file.

    Raises:
        DataError: missing, truncated or malformed.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; fetch the file again") from error
    header = np.frombuffer(content[:4], dtype=">u4")
    if header.size == 0 or (int(header[0]) & ~0xFF) != _MAGIC_UINT8:
        raise DataError(f"{path} is no idx file of bytes (wrong magic number); fetch the file again")
    axes = int(header[0]) & 0xFF
    start = 4 + 4 * axes
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    body = np.frombuffer(content[start:], dtype=np.uint8)
    if len(shape) != axes or body.size != int(np.prod(shape)):
        raise DataError(f"{path} is truncated: its header says {shape}, it holds {body.size} bytes; fetch it again")
    return torch.from_numpy(body.reshape(shape).copy())


def read_mnist(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """(images (N, 1, 28, 28) uint8, labels (N,) int64) from MNIST's files in ``folder``."""
    prefix = "train" if train else "t10k"
    images = read_idx(_either(folder / f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(_either(folder / f"{prefix}-labels-idx1-ubyte"))
    return images.unsqueeze(1), labels.long()


def _either(path: Path) -> Path:
    """``path`` if it is there unpacked, else the gzipped one."""
    return path if path.exists() else path.with_name(path.name + ".gz")
