"""Any net as torch's own exporter writes it, with the inputs, outputs and operator set of our files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from onnx import AttributeProto, numpy_helper
from torch import nn

from cure_plugin.bounds.faithful import check_reads_no_values
from cure_plugin.errors import SpecError, first_line
from cure_plugin.vnncomp.graphs import OPSET, make_model


def traced_model(net: nn.Module, input_shape: tuple[int, ...], classes: int) -> onnx.ModelProto:
    """``net``, which is in eval mode and becomes float32, traced at one input (1, *input_shape).

    Raises:
        SpecError: a net whose forward reads values, so that its graph would be another one at other inputs, what
            torch.onnx does not know (the message says which operator), or a graph with branches.
    """
    x = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    check_reads_no_values(net.float(), x)
    name = type(net).__name__
    try:
        with TemporaryDirectory() as folder, torch.no_grad(), _silence():
            path = Path(folder) / "net.onnx"
            torch.onnx.export(net, (x,), path, dynamo=False, opset_version=OPSET, input_names=["X"], output_names=["Y"])
            graph = onnx.load(path).graph
    except Exception as error:  # what torch raises there has no common class
        raise SpecError(f"cannot export {name}: torch.onnx fails ({first_line(error)})") from error
    for node in graph.node:
        if any(one.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for one in node.attribute):
            raise SpecError(f"cannot export {name}: its graph has branches ({node.op_type} {node.name})")
    _free_batch(graph)
    try:
        return make_model(graph.node, graph.initializer, (1, *input_shape), classes)
    except Exception as error:  # onnx's checks have several classes
        raise SpecError(
            f"cannot export {name}: {first_line(error)}; its output must be (1, classes) in float32"
        ) from error


def _free_batch(graph: onnx.GraphProto) -> None:
    """Let reshapes of one image keep however many there are: verifiers work on several copies at once."""
    constants = {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    known = {tensor.name: tensor for tensor in graph.initializer} | constants
    for number, node in enumerate(graph.node):
        if node.op_type != "Reshape" or node.input[1] not in known:
            continue
        shape = numpy_helper.to_array(known[node.input[1]])
        if len(shape) > 1 and shape[0] == 1:
            # 0: as many as come in; where no other size is left open, -1 says the same and more tools read it
            free = np.concatenate([[0 if -1 in shape[1:] else -1], shape[1:]]).astype(np.int64)
            node.input[1] = f"{node.input[1]}_free_{number}"
            graph.initializer.append(numpy_helper.from_array(free, node.input[1]))


@contextmanager
def _silence() -> Iterator[None]:
    """No word of what torch deprecates, and of shapes that become constants."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
