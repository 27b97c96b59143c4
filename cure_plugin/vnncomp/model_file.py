"""ONNX files as people have them: plain or ``.gz``, weights inside or beside them."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from cure_plugin.errors import CheckpointError

_LARGEST = 2**31 - 1
"""Bytes that a protobuf message may have."""


def load_network(path: str | Path) -> onnx.ModelProto:
    """A checked file with all its weights.

    Raises:
        CheckpointError: missing, larger than 2 GiB, damaged or invalid.
    """
    try:
        model = onnx.load_from_string(unpacked(path)) if str(path).endswith(".gz") else onnx.load(path)
        onnx.checker.check_model(model)
    except (OSError, DecodeError, onnx.checker.ValidationError, ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _fault(path, error) from error
    return model


def unpacked(path: str | Path) -> bytes:
    """The content of a ``.gz`` file.

    Raises:
        CheckpointError: missing, damaged, or it unpacks to more than 2 GiB.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise _fault(path, error) from error
    if len(content) > _LARGEST:
        raise CheckpointError(f"cannot read ONNX file {path}: it unpacks to more than 2 GiB")
    return content


def _fault(path: str | Path, error: Exception) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"cannot read ONNX file {path}: there is no such file; check the path")
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(f"cannot read ONNX file {path}: {reason}; export it again")
