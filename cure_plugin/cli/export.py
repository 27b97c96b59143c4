"""``cure export``."""

from __future__ import annotations

import argparse

from cure_plugin.checkpoint import load_net
from cure_plugin.cli.options import read_set_options
from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.export import export_onnx, write_vnnlib
from cure_plugin.export.replay import parity
from cure_plugin.export.vnnlib import box_instance


def export(options: argparse.Namespace) -> None:
    """Write the net as ONNX, and a VNNLIB instance per image and linf set."""
    spec, net = load_net(options.model)
    sets = read_set_options(options.sets)
    if any(one.name != "linf" for one in sets):
        raise SpecError(f"VNNLIB 1.0 holds boxes only: give linf sets, got {', '.join(map(str, sets))}")
    data = load_data(options.on, False, options.data).first(options.images)
    if spec.input_shape != data.shape:
        raise SpecError(f"{options.model} takes inputs of shape {spec.input_shape}, {options.on} has {data.shape}")
    path = options.out / "model.onnx"
    export_onnx(net, spec.input_shape, path)
    x, y = data.batch(slice(0, len(data)))
    for one in sets:
        for index in range(len(data)):
            instance = box_instance(x[index], int(y[index]), spec.classes, one.build())
            target = options.out / "vnnlib" / f"{str(one).replace('=', '_').replace('/', '-')}_{index}.vnnlib"
            write_vnnlib(target, instance, f"{options.on} test image {index}, {one}")
    print(f"wrote {path} (largest difference to PyTorch {parity(net, path, x):.1e})")
