"""What the options of several commands stand for: sets, nets, the output folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from cure_plugin.certification import Certifier
from cure_plugin.checkpoint import load_net, load_state_dict
from cure_plugin.errors import SpecError
from cure_plugin.export import read_onnx_net
from cure_plugin.inputs import like
from cure_plugin.nets import NetSpec
from cure_plugin.sets import SetSpec, read_sets, set_spec

CURVE_FACTORS = tuple(step / 8 for step in range(17))
"""0 to 2 times a set's size."""


def read_set_options(texts: Sequence[str]) -> list[SetSpec]:
    """The sets that arguments describe, or that the YAML files they name list."""
    return [
        spec for text in texts for spec in (read_sets(text) if text.endswith((".yaml", ".yml")) else [set_spec(text)])
    ]


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        SpecError: CUDA where there is none.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise SpecError(f"device {device!r} is not available here; use cpu")


def read_overrides(texts: Sequence[str]) -> dict[str, str]:
    """Recipe keys to change, from ``key=value`` arguments.

    Raises:
        SpecError: one without ``=``.
    """
    overrides = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise SpecError(f"an override is written key=value, got {text!r}")
        overrides[key] = value
    return overrides


def load_model(path: Path, named: NetSpec | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """(net, its input shape) from a checkpoint, an ONNX file, or a state_dict of the ``named`` net."""
    if named is not None:
        return load_state_dict(path, named), named.input_shape
    if path.name.endswith((".onnx", ".onnx.gz")):
        return read_onnx_net(path)
    spec, net = load_net(path)
    return net, spec.input_shape


def settings_line(options: argparse.Namespace, specs: Sequence[SetSpec], certifier: Certifier) -> str:
    """What a run certified and how, in words."""
    precision = str(like(certifier.net).dtype).removeprefix("torch.")
    return (
        f"First {options.images} test images of {options.on}; sets {', '.join(map(str, specs))}; methods "
        f"{', '.join(map(str, certifier.methods))} in {precision}."
    )
