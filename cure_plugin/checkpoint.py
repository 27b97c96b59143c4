"""Trained nets on disk: safe to load, never half-written."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cure_plugin.errors import CheckpointError, first_line
from cure_plugin.files import write_atomically
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.zoo import resolved

_FORMAT = 1

_AS_ONNX = "its ONNX file (torch.onnx.export, or cure_plugin.export_onnx)"
"""How a net that is none of ours is given."""


def save_checkpoint(path: str | Path, spec: NetSpec, net: nn.Module, extra: dict[str, Any] | None = None) -> None:
    """Write the net's description and weights, and ``extra`` plain values or tensors, to ``path``.

    Raises:
        OutputError: the file cannot be written.
    """
    payload = {"format": _FORMAT, "net": asdict(spec), "model": net.state_dict(), **(extra or {})}
    write_atomically(path, lambda file: torch.save(payload, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, loaded with ``weights_only=True``; ``path`` may be ``zoo:NAME``.

    Raises:
        CheckpointError: missing, truncated, damaged, or no checkpoint of ours.
    """
    payload = _load(path)
    if not isinstance(payload, dict) or payload.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is no cure_plugin checkpoint of format {_FORMAT}; a plain state_dict needs the net's name (cure "
            f"certify --net), a net of your own {_AS_ONNX}"
        )
    return payload


def _load(path: str | Path) -> Any:
    path = resolved(path)
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"its part {damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise almost anything on a file that is no checkpoint
        reason, remedy = first_line(error), "train again or fetch it anew"
        if isinstance(error, FileNotFoundError):
            reason, remedy = "there is no such file", "check the path"
        if isinstance(error, pickle.UnpicklingError | KeyError):  # torch would advise to load it unsafely
            reason = "it is no file of tensors and plain values, and nothing else is loaded"
            remedy = f"of a net of your own give {_AS_ONNX}, or fetch the file anew"
        raise CheckpointError(f"cannot read checkpoint {path}: {reason}; {remedy}") from error


_NESTS = ("state_dict", "model_state_dict", "model", "net", "module", "weights")
"""Where files keep the ``state_dict`` beside accuracy, epoch and optimiser."""

_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, ``torch.compile`` and modules that hold the net put in front of its names."""


def load_state_dict(path: str | Path, spec: NetSpec) -> nn.Sequential:
    """The net that ``spec`` names with the weights of a ``state_dict`` file, in eval mode.

    The file may keep the ``state_dict`` under a name (:data:`_NESTS`), and its names may be those of a wrapped net
    (:data:`_WRAPPERS`). Weights in half precision become float32, which holds the same numbers; where one is float64,
    all become float64.

    Raises:
        CheckpointError: unreadable, no state_dict, or weights that do not fit the net.
    """
    return _fitted(_load(path), spec, path).eval()


def _state_dict(payload: Any) -> Any:
    """The innermost dictionary of tensors, its names as the bare net has them."""
    while isinstance(payload, dict):
        inner = next((payload[name] for name in _NESTS if isinstance(payload.get(name), dict) and payload[name]), None)
        if inner is None:
            break
        payload = inner
    if not isinstance(payload, dict) or not all(isinstance(name, str) for name in payload):
        return payload
    names = {name: name.replace("_orig_mod.", "") for name in payload}
    while names and (front := next((w for w in _WRAPPERS if all(n.startswith(w) for n in names.values())), None)):
        names = {name: bare.removeprefix(front) for name, bare in names.items()}
    return {bare: payload[name] for name, bare in names.items()}


def _fitted(payload: Any, spec: NetSpec, path: str | Path) -> nn.Sequential:
    net, weights = build_net(spec), _state_dict(payload)
    try:
        if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in weights.values()):
            net = net.double()
        net.load_state_dict(weights)
    except (TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} does not fit net {spec.name!r} for {spec.input_shape}: {reason}") from error
    return net


def load_start(path: str | Path, spec: NetSpec) -> dict[str, Tensor]:
    """Float32 weights to go on training from, of the net ``spec`` describes: of a checkpoint of ours, or of a file as
    :func:`load_state_dict` reads it.

    Raises:
        CheckpointError: unreadable, or weights that do not fit the net.
    """
    return _fitted(_load(path), spec, path).float().state_dict()


def load_net(path: str | Path) -> tuple[NetSpec, nn.Sequential]:
    """The net in a checkpoint, in eval mode; ``path`` may name a net of the :mod:`~cure_plugin.zoo`.

    Raises:
        CheckpointError: see :func:`load_checkpoint`, or weights that do not fit the described net.
    """
    return net_of(load_checkpoint(path), str(path))


def net_of(payload: dict[str, Any], source: str) -> tuple[NetSpec, nn.Sequential]:
    """The net in a loaded checkpoint; ``source`` names it in errors."""
    try:
        values: dict[str, Any] = payload["net"]
        described: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        spec = NetSpec(**described)
        net = build_net(spec)
        net.load_state_dict(payload["model"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{source} does not hold the net it describes: {str(error).splitlines()[0]}") from error
    return spec, net.eval()
