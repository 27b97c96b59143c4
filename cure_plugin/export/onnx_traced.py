"""Any net as torch's own exporter writes it, with the inputs, outputs and operator set of our files."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from torch import nn

from cure_plugin.bounds.faithful import check_reads_no_values
from cure_plugin.errors import SpecError, first_line
from cure_plugin.modes import evaluation_mode
from cure_plugin.vnncomp.graphs import OPSET, make_model


def traced_model(net: nn.Module, input_shape: tuple[int, ...], classes: int) -> onnx.ModelProto:
    """``net``, as it is in eval mode and float32, traced at one input (1, *input_shape).

    Raises:
        SpecError: a net whose forward reads values, so that its graph would be another one at other inputs, or what
            torch.onnx does not know; the message says which operator.
    """
    plain = copy.deepcopy(net).cpu().float()
    x = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    check_reads_no_values(plain, x)
    try:
        with TemporaryDirectory() as folder, evaluation_mode(plain), torch.no_grad(), _silence():
            path = Path(folder) / "net.onnx"
            torch.onnx.export(
                plain, (x,), path, dynamo=False, opset_version=OPSET, input_names=["X"], output_names=["Y"]
            )
            graph = onnx.load(path).graph
        return make_model(graph.node, graph.initializer, (1, *input_shape), classes)
    except Exception as error:  # what torch and onnx raise there has no common class
        raise SpecError(f"cannot export {type(net).__name__}: torch.onnx fails ({first_line(error)})") from error


@contextmanager
def _silence() -> Iterator[None]:
    """No word of what torch deprecates, and of shapes that become constants."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
