"""ONNX classifiers with other inputs or outputs: layers put in front of a net, a distance beside its logits.

The layers are made of Conv, Relu, Flatten, Reshape, Gemm, MatMul and Add, which every verifier of VNN-COMP reads. An
l2 distance takes a Mul of a difference with itself too, which not all of them do (Marabou refuses it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cure_plugin.errors import CheckpointError, SpecError
from cure_plugin.files import write_atomically

OPSET, IR_VERSION = 13, 8
"""What the exported files declare."""


def write_model(model: onnx.ModelProto, path: str | Path) -> None:
    """Write a model, the same one with the same bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    content = model.SerializeToString(deterministic=True)
    write_atomically(path, lambda file: file.write(content))


def input_shape(model: onnx.ModelProto) -> tuple[int, ...]:
    """Shape of the only input, with the batch axis.

    Raises:
        CheckpointError: several inputs, or sizes left open.
    """
    return _shape([v for v in model.graph.input if v.name not in {t.name for t in model.graph.initializer}], "input")


def output_size(model: onnx.ModelProto) -> int:
    """Entries of the only output.

    Raises:
        CheckpointError: as :func:`input_shape`.
    """
    return math.prod(_shape(list(model.graph.output), "output"))


def _shape(values: list[onnx.ValueInfoProto], side: str) -> tuple[int, ...]:
    if len(values) != 1:
        raise CheckpointError(f"the net has {len(values)} {side}s; one is supported")
    shape = tuple(int(dimension.dim_value) for dimension in values[0].type.tensor_type.shape.dim)
    if not shape or min(shape) < 1:
        raise CheckpointError(f"the net's {side} has shape {shape}; export it with fixed sizes")
    return shape


def make_model(
    nodes: Sequence[onnx.NodeProto],
    tensors: Sequence[onnx.TensorProto],
    shape: Sequence[int],
    outputs: int,
) -> onnx.ModelProto:
    """A checked model with input ``X`` of ``shape`` and output ``Y`` of shape (1, ``outputs``)."""
    graph = helper.make_graph(
        list(nodes),
        "cure_plugin",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, outputs])],
        list(tensors),
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, producer_name="cure_plugin", opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def with_linear_front(model: onnx.ModelProto, weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """The net of inputs X (1, n), run on the image ``weight @ X + bias``.

    Args:
        weight: (d, n) float32, d the size of the net's input. bias: (d,) float32.

    Raises:
        SpecError: sizes that do not fit the net.
    """
    shape = input_shape(model)
    if weight.ndim != 2 or weight.shape[0] != math.prod(shape) or bias.shape != weight.shape[:1]:
        raise SpecError(f"front of shapes {weight.shape}, {bias.shape} does not make inputs of shape {shape}")
    nodes = [
        helper.make_node("Gemm", ["X", "front_W", "front_B"], ["front_flat"], name="front_gemm", transB=1),
        helper.make_node("Reshape", ["front_flat", "front_shape"], ["front"], name="front_reshape"),
    ]
    tensors = [
        _tensor("front_W", weight),
        _tensor("front_B", bias),
        # -1: verifiers work on several copies at once
        numpy_helper.from_array(np.array([-1, *shape[1:]], dtype=np.int64), "front_shape"),
    ]
    inner_nodes, inner_tensors = _inner(model, "front", "Y")
    return make_model([*nodes, *inner_nodes], [*tensors, *inner_tensors], (1, weight.shape[1]), output_size(model))


def with_channel_front(model: onnx.ModelProto, weight: np.ndarray) -> onnx.ModelProto:
    """The net of several images stacked along channels, run on the sums of channels that ``weight`` says.

    Args:
        weight: (C, n C) float32, C the channels of the net's input.

    Raises:
        SpecError: the net's input is no image, or sizes do not fit it.
    """
    _, channels, height, width = _image_shape(model)
    if weight.ndim != 2 or weight.shape[0] != channels:
        raise SpecError(f"front of shape {weight.shape} does not make {channels} channels")
    nodes = [helper.make_node("Conv", ["X", "front_W"], ["front"], name="front_conv", kernel_shape=[1, 1])]
    inner_nodes, inner_tensors = _inner(model, "front", "Y")
    tensors = [_tensor("front_W", weight[:, :, None, None]), *inner_tensors]
    return make_model([*nodes, *inner_nodes], tensors, (1, weight.shape[1], height, width), output_size(model))


def with_distance(model: onnx.ModelProto, norm: str) -> onnx.ModelProto:
    """The net of X (1, 2C, H, W), a reference image and then a point; run on the point.

    After the logits comes one more output: the squared l2 distance, or the l1 distance, of the two.

    Args:
        norm: ``l2`` or ``l1``.

    Raises:
        SpecError: another norm, or a net whose input is no image.
    """
    _, channels, height, width = _image_shape(model)
    identity = np.eye(channels, dtype=np.float32)
    point = np.concatenate([0 * identity, identity], axis=1)
    difference = np.concatenate([-identity, identity], axis=1)
    if norm == "l2":
        tail = [helper.make_node("Mul", ["difference", "difference"], ["parts"], name="square")]
    elif norm == "l1":
        difference = np.concatenate([difference, -difference])
        tail = [helper.make_node("Relu", ["difference"], ["parts"], name="absolute")]
    else:
        raise SpecError(f"distances are l2 or l1, got {norm!r}")
    classes, size = output_size(model), len(difference) * height * width
    nodes = [
        helper.make_node("Conv", ["X", "point_W"], ["point"], name="point", kernel_shape=[1, 1]),
        helper.make_node("Conv", ["X", "difference_W"], ["difference"], name="difference", kernel_shape=[1, 1]),
        *tail,
        helper.make_node("Flatten", ["parts"], ["flat_parts"], name="flatten_parts", axis=1),
        helper.make_node("MatMul", ["flat_parts", "sum_W"], ["distance"], name="sum"),
        helper.make_node("MatMul", ["logits", "logits_W"], ["padded_logits"], name="pad_logits"),
        helper.make_node("Add", ["padded_logits", "distance"], ["Y"], name="join"),
    ]
    total = np.zeros((size, classes + 1), dtype=np.float32)
    total[:, -1] = 1
    tensors = [
        _tensor("point_W", point[:, :, None, None]),
        _tensor("difference_W", difference[:, :, None, None]),
        _tensor("sum_W", total),
        _tensor("logits_W", np.eye(classes, classes + 1, dtype=np.float32)),
    ]
    inner_nodes, inner_tensors = _inner(model, "point", "logits")
    ordered = [nodes[0], *inner_nodes, *nodes[1:]]
    return make_model(ordered, [*tensors, *inner_tensors], (1, 2 * channels, height, width), classes + 1)


def _image_shape(model: onnx.ModelProto) -> tuple[int, ...]:
    shape = input_shape(model)
    if len(shape) != 4:
        raise SpecError(f"this encoding stacks images (1, C, H, W); the net's input has shape {shape}")
    return shape


def _tensor(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name)


def _inner(model: onnx.ModelProto, source: str, target: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The net's nodes and weights under names of their own, reading ``source`` and writing ``target``."""
    weights = {tensor.name for tensor in model.graph.initializer}
    own_input = next(value.name for value in model.graph.input if value.name not in weights)
    renamed = {own_input: source, model.graph.output[0].name: target}

    def name(old: str) -> str:
        return renamed.get(old, f"net_{old}") if old else old

    nodes = []
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"net_{node.name}"
        copy.input[:] = [name(one) for one in node.input]
        copy.output[:] = [name(one) for one in node.output]
        nodes.append(copy)
    tensors = []
    for tensor in model.graph.initializer:
        stored = onnx.TensorProto()
        stored.CopyFrom(tensor)
        stored.name = name(tensor.name)
        tensors.append(stored)
    return nodes, tensors
