"""ONNX files as torch nets: read node by node, compared with onnxruntime, or refused with the node and the reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from cure_plugin.errors import CheckpointError, DataError
from cure_plugin.export.onnx_builder import Given, Node, Refused, Step, Value
from cure_plugin.export.onnx_folding import folded
from cure_plugin.export.onnx_layers import Graph
from cure_plugin.export.onnx_operators import CONVERTERS
from cure_plugin.nets import Reshape
from cure_plugin.vnncomp.model_file import load_network
from cure_plugin.vnncomp.property import InputBox
from cure_plugin.vnncomp.query import Linear, Query
from cure_plugin.vnncomp.replay import Network

_TYPES = {TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64}

_FIRST_OPSET = 7
"""Before it, constants were broadcast by other rules."""

_CONSTANT = {
    "Abs",
    "Add",
    "Cast",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Div",
    "Equal",
    "Exp",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "Identity",
    "Max",
    "Min",
    "Mul",
    "Neg",
    "Pow",
    "Reciprocal",
    "Reshape",
    "Shape",
    "Slice",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Transpose",
    "Unsqueeze",
    "Where",
}
"""Operators that are computed at reading where all they read is constant."""

_LARGEST = 100_000_000
"""Entries of a constant that is computed at reading."""

_POINTS = 8
"""Inputs at which a net is compared with onnxruntime."""

_ROUNDINGS = 256
"""Units of rounding, relative to the largest value met inside the net, by which its outputs may differ from
onnxruntime's: it adds in another order, and layers may be folded into each other. A node that is misread shows at the
first digits."""


@dataclass(frozen=True)
class OnnxNet:
    """What a file holds.

    Attributes:
        net: in eval mode, (B, *shape) to (B, outputs): a ``nn.Sequential`` where the file is a chain; float32, or
            float64 as the file is.
        shape: of one sample as the net takes it.
        normalised: whether a Softmax or LogSoftmax over all outputs at the file's end is left out of ``net``. It keeps
            the order of outputs, so what compares two of them holds of both; what bounds one by a number does not.
    """

    net: nn.Module
    shape: tuple[int, ...]
    normalised: bool


def read_onnx_net(path: str | Path) -> tuple[nn.Module, tuple[int, ...]]:
    """(net in eval mode, input shape without batch) of a classifier; see :func:`read_network`.

    Raises:
        CheckpointError: as there.
    """
    found = read_network(path)
    return found.net, found.shape


def read_network(path: str | Path, box: InputBox | None = None) -> OnnxNet:
    """The net of an ``.onnx`` or ``.onnx.gz`` file, which onnxruntime agrees with at random inputs.

    Args:
        box: flattened inputs (d,) between which to compare; default: some in [0, 1], some normal.

    Raises:
        CheckpointError: missing, damaged, of several inputs or outputs, a node that is not read (the message names it
            and says why), or outputs that differ from onnxruntime's.
    """
    model = load_network(path)
    shape, dtype = _input(path, model)
    steps: list[Step] = []
    output = _built(path, model, Value(0, shape), dtype, steps)
    tail = _tail(path, steps, output.number)
    if tail:
        output = Value(steps[tail - 1].sources[0], (1, math.prod(output.shape)))
    sample = Value(0, shape).sample
    net = _assembled(*folded(steps, sample, output.number))
    if next(net.parameters(), None) is None:
        raise CheckpointError(f"{path} holds no weights: there is nothing to certify")
    _compare(path, net, sample, steps[tail - 1].layer if tail else nn.Identity(), _TYPES[dtype], box)
    return OnnxNet(net.to(_TYPES[dtype]).eval(), sample, bool(tail))


def read_asked(path: str | Path, query: Query) -> OnnxNet:
    """The net of a file that ``query`` asks about, compared with onnxruntime between the ends of the query's boxes.

    Raises:
        CheckpointError: see :func:`read_network`.
        DataError: sizes that do not fit each other, inputs that are bound in another way than by boxes, or outputs that
            are bound by numbers where the net ends in Softmax.
    """
    cases = query.cases()
    hull = (np.min([c.lower for c in cases], 0), np.max([c.upper for c in cases], 0)) if cases else None
    found = read_network(path, hull)
    with torch.no_grad():
        outputs = found.net(torch.zeros(1, *found.shape, dtype=next(found.net.parameters()).dtype)).shape[1]
    if (math.prod(found.shape), outputs) != (query.inputs, query.outputs):
        raise DataError(
            f"{path} maps {math.prod(found.shape)} inputs to {outputs} outputs, {query.source} has {query.inputs} and "
            f"{query.outputs}"
        )
    asked = [linear for case in cases for alternative in case.alternatives for linear in alternative]
    if found.normalised and not all(map(_compares_two, asked)):
        raise DataError(
            f"{path} ends in Softmax, which is left out, and {query.source} asks more than which of two outputs is "
            "larger; export the net without it, or ask about what it puts out before"
        )
    return found


def _compares_two(linear: Linear) -> bool:
    """Whether a constraint says that one output is at most another."""
    factors = sorted(linear.coefficients.values())
    return linear.bound == 0 and len(factors) == 2 and factors[0] == -factors[1]


def _input(path: str | Path, model: onnx.ModelProto) -> tuple[tuple[int, ...], int]:
    """(shape in the file with a batch of 1, type of numbers) of the only input."""
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 1)
    if opset < _FIRST_OPSET:
        raise CheckpointError(f"{path} is of opset {opset}, files are read from {_FIRST_OPSET} on; export it again")
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    for side, values in (("input", inputs), ("output", list(model.graph.output))):
        if len(values) != 1:
            names = ", ".join(value.name for value in values)
            raise CheckpointError(f"{path} has {len(values)} {side}s ({names}); a net with one {side} is read")
    kind = inputs[0].type.tensor_type
    if kind.elem_type not in _TYPES:
        given = TensorProto.DataType.Name(kind.elem_type).lower()
        raise CheckpointError(f"{path} takes numbers of type {given}; export it with an input of float32")
    sizes = [d.dim_value if d.WhichOneof("value") == "dim_value" else d.dim_param for d in kind.shape.dim]
    if len(sizes) > 1 and not (isinstance(sizes[0], int) and sizes[0] > 0):
        sizes[0] = 1  # a batch whose size is left open
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        shown = tuple(d.dim_value or d.dim_param or "?" for d in kind.shape.dim)
        raise CheckpointError(f"{path} takes inputs of shape {shown}; only the first of several sizes may be left open")
    return tuple(int(size) for size in sizes), kind.elem_type


def _built(path: str | Path, model: onnx.ModelProto, start: Value, dtype: int, steps: list[Step]) -> Value:
    """The output, with the ``steps`` to it filled in."""
    known: dict[str, Given] = {"": None}
    for tensor in model.graph.initializer:
        try:
            known[tensor.name] = np.asarray(numpy_helper.to_array(tensor))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: weight {tensor.name} is damaged: {' '.join(str(error).split())[:150]}"
            ) from error
    known[next(value.name for value in model.graph.input if value.name not in known)] = start
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    for node in model.graph.node:
        label = f"{node.name or node.output[0]} ({node.op_type})"
        try:
            missing = [name for name in node.input if name not in known]
            if missing:
                raise Refused(f"reads {missing[0]}, which no node before it puts out")
            given = [known[name] for name in node.input]
            found = _outputs(model, node, given, opset, dtype, label, steps)
        except Refused as error:
            raise CheckpointError(f"{path}: node {label} {error}") from error
        except Exception as error:  # attributes of another kind, sizes that do not fit: whatever a damaged file holds
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise CheckpointError(f"{path}: node {label} cannot be read: {reason}") from error
        known.update(zip(node.output, found, strict=False))
    output = known.get(model.graph.output[0].name)
    if not isinstance(output, Value):
        raise CheckpointError(f"{path}: output {model.graph.output[0].name} does not depend on its input")
    if len(output.sample) != 1:
        steps.append(Step(nn.Flatten(), (output.number,), (math.prod(output.shape),), "the output"))
        output = Value(len(steps), (1, math.prod(output.shape)))
    return output


def _outputs(
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    given: list[Given],
    opset: int,
    dtype: int,
    label: str,
    steps: list[Step],
) -> list[Given]:
    """What a node puts out."""
    if node.domain not in ("", "ai.onnx"):
        raise Refused(f"is of domain {node.domain}; only ONNX's own operators are read")
    if node.op_type == "Shape" and isinstance(given[0], Value):
        given = [np.zeros(given[0].shape, dtype=np.int8)]
    if node.op_type in _CONSTANT and not any(isinstance(value, Value) for value in given):
        return list(_computed(model, node, given))
    if node.op_type not in CONVERTERS:
        raise Refused(f"cannot be read: {node.op_type} is not read; known are {', '.join(sorted(CONVERTERS))}")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    own = Node(node.op_type, label, opset, attributes, given, len(node.output), dtype, steps)
    value = CONVERTERS[node.op_type](own)
    return [*value] if isinstance(value, list) else [value]


def _computed(model: onnx.ModelProto, node: onnx.NodeProto, given: list[Given]) -> Iterator[np.ndarray]:
    """What a node makes of constants."""
    pairs = zip(node.input, given, strict=True)
    constants = {name: value for name, value in pairs if isinstance(value, np.ndarray)}
    sizes = [value.ravel()[:9].tolist() for value in constants.values() if value.dtype.kind in "iu"]
    if node.op_type in ("ConstantOfShape", "Expand") and any(math.prod(size) > _LARGEST for size in sizes):
        raise Refused("makes a constant that is too large")
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape))
        for name, value in constants.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "constant", inputs, outputs)
    alone = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    for value in ReferenceEvaluator(alone).run(None, constants):
        yield np.asarray(value)


def _tail(path: str | Path, steps: list[Step], output: int) -> int:
    """The number of a Softmax that the output is made of, 0 where there is none.

    Raises:
        CheckpointError: a Softmax elsewhere that the output needs.
    """
    needed, pending, tail = set[int](), [output], output
    while pending:
        number = pending.pop()
        if number and number not in needed:
            needed.add(number)
            pending += steps[number - 1].sources
    while tail and isinstance(steps[tail - 1].layer, nn.Flatten | Reshape):
        tail = steps[tail - 1].sources[0]
    normal = [number for number in needed if isinstance(steps[number - 1].layer, nn.Softmax | nn.LogSoftmax)]
    for number in normal:
        if number != tail:
            raise CheckpointError(f"{path}: node {steps[number - 1].label} is not the net's end; only there is it read")
    return tail if normal else 0


def _assembled(steps: dict[int, Step], output: int) -> nn.Module:
    """A net of the steps: a chain where they are one."""
    places = {number: place for place, number in enumerate([0, *steps])}
    sources = [tuple(places[number] for number in step.sources) for step in steps.values()]
    layers = [step.layer for step in steps.values()]
    if sources == [(place,) for place in range(len(layers))]:
        return nn.Sequential(*layers).eval()
    return Graph(layers, sources).eval()


def _compare(
    path: str | Path, net: nn.Module, shape: tuple[int, ...], tail: nn.Module, dtype: torch.dtype, box: InputBox | None
) -> None:
    """Refuse a net (in float64) that computes something else than onnxruntime does."""
    runtime = Network(path)
    random = np.random.default_rng(0)
    if box is None or len(box[0]) != math.prod(shape):
        points = random.random((_POINTS, math.prod(shape)))
        points[1::2] = random.standard_normal(points[1::2].shape)
    else:
        points = box[0] + (box[1] - box[0]) * random.random((_POINTS, math.prod(shape)))
    points = points.astype(np.float32)  # which float64 nets can hold too
    expected = torch.from_numpy(np.stack([runtime(point) for point in points]))
    x = torch.from_numpy(points).double().view(-1, *shape)
    found, largest = _watched(net, x)
    with torch.no_grad():
        found = tail(found)
    if found.shape != expected.shape:
        raise CheckpointError(
            f"{path}: it is read as a net of {found.shape[1]} outputs, onnxruntime has {expected.shape[1]}"
        )
    apart = float((found - expected).abs().max())
    if not apart <= _ROUNDINGS * torch.finfo(dtype).eps * largest:
        raise CheckpointError(
            f"{path}: its outputs as they are read differ from onnxruntime's by {apart:.2g} at random inputs: a node "
            "is not understood, or its numbers are too large"
        )


def _watched(net: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """(outputs, largest absolute value of the input and any layer)."""
    sizes = [float(x.abs().max())]

    def look(_: nn.Module, __: Any, value: Tensor) -> None:
        sizes.append(float(value.abs().max()))

    watched = copy.deepcopy(net)
    for layer in watched.modules():
        layer.register_forward_hook(look)
    with torch.no_grad():
        return watched(x), max(sizes)
