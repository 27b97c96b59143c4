"""``cure export``."""

from __future__ import annotations

import argparse

from cure_plugin.cli.options import load_model, read_set_options
from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.export.files import Form, export_instances
from cure_plugin.export.parity import parity


def export(options: argparse.Namespace) -> None:
    """Write the net as ONNX, and a VNNLIB instance per image and set."""
    net, shape = load_model(options.model)
    sets = read_set_options(options.sets)
    data = load_data(options.on, False, options.data).first(options.images)
    if shape != data.shape:
        raise SpecError(f"{options.model} takes inputs of shape {shape}, {options.on} has {data.shape}")
    form = Form(options.encoding, options.vnnlib, options.gz)
    instances = export_instances(net, data, sets, options.out, form, options.timeout)
    path = options.out / "onnx" / "model.onnx"
    x, _ = data.batch(slice(0, len(data)))
    print(f"wrote {path} (largest difference to PyTorch {parity(net, path, x):.1e}) and {len(instances)} instances")
