"""Small ONNX files as people have them, one per construct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

IMAGE = (1, 2, 6, 6)


@dataclass
class Maker:
    """Nodes and weights of a file in the making; ``x`` is its input."""

    opset: int
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    dtype: Any = np.float32

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def random(self, *shape: int) -> np.ndarray:
        """Numbers of a size that keeps activations near 1."""
        return (self._random.standard_normal(shape) / max(1.0, np.prod(shape[1:]) ** 0.5)).astype(self.dtype)

    def stored(self, value: Any, dtype: Any = None) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype=dtype or self.dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.stored(values, np.int64)

    def __call__(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"{kind}/{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def linear(self, x: str, features: int, classes: int = 3) -> str:
        """A Gemm of ``features`` inputs."""
        weights = self.stored(self.random(classes, features)), self.stored(self.random(classes))
        return str(self("Gemm", x, *weights, transB=1))

    def conv(self, x: str, into: int, out: int, side: int = 3, pad: int = 1) -> str:
        weights = self.stored(self.random(out, into, side, side)), self.stored(self.random(out))
        return str(self("Conv", x, *weights, kernel_shape=[side, side], pads=[pad] * 4))

    def model(
        self,
        output: str,
        shape: Sequence[int | str | None] = IMAGE,
        sizes: Sequence[int | str] = (1, 3),
        kind: int = TensorProto.FLOAT,
        listed: bool = False,
        ir: int = 8,
    ) -> onnx.ModelProto:
        """The file; ``listed``: its weights among its inputs, as old files have them."""
        inputs = [helper.make_tensor_value_info("x", kind, list(shape))]
        if listed:
            inputs += [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in self.weights]
        outputs = [helper.make_tensor_value_info(output, kind, list(sizes))]
        graph = helper.make_graph(self.nodes, "some/net:0", inputs, outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir)


def _head(make: Maker, x: str, features: int) -> str:
    return make.linear(make("Relu", make("Flatten", x)), features)


def dynamic_batch(m: Maker) -> onnx.ModelProto:
    return m.model(_head(m, m.conv("x", 2, 3), 108), ("N", 2, 6, 6), ("N", 3))


def dynamic_batch_by_shape(m: Maker) -> onnx.ModelProto:
    size = m("Unsqueeze", m("Gather", m("Shape", "x"), m.stored(0, np.int64)), m.ints(0))
    flat = m("Reshape", "x", m("Concat", size, m.ints(-1), axis=0))
    return m.model(m.linear(flat, 72), ("batch", 2, 6, 6), ("batch", 3))


def matmul_add(m: Maker) -> onnx.ModelProto:
    hidden = m("Relu", m("Add", m("MatMul", m("Flatten", "x"), m.stored(m.random(72, 5))), m.stored(m.random(5))))
    return m.model(m("Add", m.stored(m.random(3)), m("MatMul", hidden, m.stored(m.random(5, 3)))))


def batch_norm(m: Maker) -> onnx.ModelProto:
    def norm(x: str, channels: int) -> str:
        mean, variance = m.random(channels), np.abs(m.random(channels)) + 0.5
        given = [m.stored(v) for v in (m.random(channels), m.random(channels), mean, variance)]
        return str(m("BatchNormalization", x, *given, epsilon=1e-3))

    maps = norm(m("Relu", norm(m.conv(norm("x", 2), 2, 3), 3)), 3)
    return m.model(m.linear(norm(m("Flatten", maps), 108), 108))


def sub_div_mul(m: Maker) -> onnx.ModelProto:
    mean, std = m.stored(np.full((1, 2, 1, 1), 0.4)), m.stored(np.array([[[0.3]], [[0.2]]]))
    maps = m("Mul", m("Div", m("Sub", "x", mean), std), m.stored(1.5))
    return m.model(_head(m, m.conv(maps, 2, 3), 108))


def sub_from_constant(m: Maker) -> onnx.ModelProto:
    return m.model(_head(m, m("Neg", m("Sub", m.stored(1.0), "x")), 72))


def constants(m: Maker) -> onnx.ModelProto:
    weight = m("Constant", value=numpy_helper.from_array(m.random(3, 72)))
    return m.model(m("Gemm", m("Flatten", "x"), weight, transB=1))


def constant_scalars(m: Maker) -> onnx.ModelProto:
    half, two = m("Constant", value_float=0.5), m("Constant", value_floats=[2.0])
    return m.model(_head(m, m("Mul", m("Sub", "x", half), two), 72))


def transpose_nhwc(m: Maker) -> onnx.ModelProto:
    maps = m("Relu", m.conv(m("Transpose", "x", perm=[0, 3, 1, 2]), 2, 3))
    back = m("Transpose", maps, perm=[0, 2, 3, 1])
    return m.model(m.linear(m("Reshape", back, m.ints(1, -1)), 108), (1, 6, 6, 2))


def max_pool(m: Maker) -> onnx.ModelProto:
    return m.model(_head(m, m("MaxPool", m.conv("x", 2, 3), kernel_shape=[2, 2], strides=[2, 2]), 27))


def max_pool_padded(m: Maker) -> onnx.ModelProto:
    pool = m("MaxPool", m.conv("x", 2, 3), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    return m.model(_head(m, pool, 27))


def average_pool(m: Maker) -> onnx.ModelProto:
    pool = m("AveragePool", m.conv("x", 2, 3), kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    return m.model(_head(m, pool, 108))


def average_pool_with_pad(m: Maker) -> onnx.ModelProto:
    settings = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1}
    return m.model(_head(m, m("AveragePool", m.conv("x", 2, 3), **settings), 27))


def global_average_pool(m: Maker) -> onnx.ModelProto:
    return m.model(m.linear(m("Flatten", m("GlobalAveragePool", m("Relu", m.conv("x", 2, 4)))), 4))


def reduce_mean(m: Maker) -> onnx.ModelProto:
    maps = m("Relu", m.conv("x", 2, 4))
    if m.opset >= 18:
        return m.model(m.linear(m("ReduceMean", maps, m.ints(2, 3), keepdims=0), 4))
    return m.model(m.linear(m("ReduceMean", maps, axes=[2, 3], keepdims=0), 4))


def _gemm(m: Maker, bias: Sequence[int], **attributes: Any) -> onnx.ModelProto:
    shape = (3, 72) if attributes.get("transB") else (72, 3)
    return m.model(m("Gemm", m("Flatten", "x"), m.stored(m.random(*shape)), m.stored(m.random(*bias)), **attributes))


def gemm_row(m: Maker) -> onnx.ModelProto:
    return _gemm(m, (1, 3), transB=1)


def gemm_scalar(m: Maker) -> onnx.ModelProto:
    return _gemm(m, ())


def gemm_scaled(m: Maker) -> onnx.ModelProto:
    return _gemm(m, (1,), alpha=0.5, beta=3.0, transB=1)


def gemm_transposed(m: Maker) -> onnx.ModelProto:
    column = m("Transpose", m("Flatten", "x"), perm=[1, 0])
    return m.model(m("Gemm", column, m.stored(m.random(72, 3)), transA=1))


def identity_dropout(m: Maker) -> onnx.ModelProto:
    return m.model(m("Identity", m.linear(m("Dropout", m("Flatten", m("Identity", "x"))), 72)))


def reshape_squeeze(m: Maker) -> onnx.ModelProto:
    maps = m("Reshape", m.conv("x", 2, 3), m.ints(0, 3, 1, -1))
    if m.opset >= 13:
        again = m("Unsqueeze", m("Squeeze", maps, m.ints(2)), m.ints(1, 4))
    else:
        again = m("Unsqueeze", m("Squeeze", maps, axes=[2]), axes=[1, 4])
    return m.model(m.linear(m("Flatten", again, axis=-4), 108))


def residual(m: Maker) -> onnx.ModelProto:
    stem = m("Relu", m.conv("x", 2, 3))
    return m.model(_head(m, m("Add", m.conv(m("Relu", m.conv(stem, 3, 3)), 3, 3), stem), 108))


def concat(m: Maker) -> onnx.ModelProto:
    left, right = m("Relu", m.conv("x", 2, 2)), m.conv("x", 2, 1, 1, 0)
    return m.model(_head(m, m("Concat", left, right, axis=1), 108))


def s_shaped(m: Maker) -> onnx.ModelProto:
    hidden = m("Tanh", m.linear(m("Sigmoid", m("Flatten", "x")), 72, 5))
    return m.model(m.linear(m("LeakyRelu", hidden, alpha=0.2), 5))


def clip(m: Maker) -> onnx.ModelProto:
    hidden = m.linear(m("Flatten", "x"), 72, 8)
    if m.opset >= 11:
        return m.model(m.linear(m("Clip", m("Clip", hidden, m.stored(-0.5), m.stored(0.75)), m.stored(0.0)), 8))
    return m.model(m.linear(m("Clip", m("Clip", hidden, min=-0.5, max=0.75), min=0.0), 8))


def pad(m: Maker) -> onnx.ModelProto:
    amounts = [0, 0, 1, 0, 0, 0, 0, 2]
    given = (m.ints(*amounts), m.stored(0.5)) if m.opset >= 11 else ()
    wide = m("Pad", "x", *given, **({} if given else {"pads": amounts, "value": 0.5}))
    return m.model(_head(m, m.conv(wide, 2, 3, pad=0), 3 * 5 * 6))


def _auto_pad(m: Maker, kind: str) -> onnx.ModelProto:
    weight = m.stored(m.random(3, 2, 3, 2))
    maps = m("Relu", m("Conv", "x", weight, auto_pad=kind, strides=[2, 1]))
    pool = m("AveragePool", maps, kernel_shape=[2, 2], auto_pad=kind, count_include_pad=1)
    return m.model(m.linear(m("Flatten", pool), {"VALID": 3 * 1 * 4}.get(kind, 3 * 3 * 6)))


def same_upper(m: Maker) -> onnx.ModelProto:
    return _auto_pad(m, "SAME_UPPER")


def same_lower(m: Maker) -> onnx.ModelProto:
    return _auto_pad(m, "SAME_LOWER")


def valid(m: Maker) -> onnx.ModelProto:
    return _auto_pad(m, "VALID")


def max_pool_same(m: Maker) -> onnx.ModelProto:
    pool = m("MaxPool", m.conv("x", 2, 3), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    return m.model(_head(m, pool, 27))


def grouped_dilated(m: Maker) -> onnx.ModelProto:
    weight = m.stored(m.random(4, 1, 2, 3))
    maps = m("Conv", "x", weight, group=2, dilations=[2, 1], strides=[1, 2], pads=[0, 1, 1, 1])
    return m.model(_head(m, maps, 4 * 5 * 3))


def final_flatten(m: Maker) -> onnx.ModelProto:
    return m.model(m("Flatten", m("Conv", m("Relu", "x"), m.stored(m.random(3, 2, 6, 6)))))


def final_softmax(m: Maker) -> onnx.ModelProto:
    return m.model(m("Softmax", m.linear(m("Flatten", "x"), 72), axis=1))


def flat_input(m: Maker) -> onnx.ModelProto:
    return m.model(_head(m, m.conv(m("Reshape", "x", m.ints(-1, 2, 6, 6)), 2, 3), 108), (1, 72))


def no_batch_axis(m: Maker) -> onnx.ModelProto:
    hidden = m("Relu", m("Add", m("MatMul", "x", m.stored(m.random(5, 8))), m.stored(m.random(8))))
    return m.model(m("MatMul", hidden, m.stored(m.random(8, 3))), (5,), (3,))


def column_input(m: Maker) -> onnx.ModelProto:
    hidden = m("Relu", m("Add", m("MatMul", m.stored(m.random(8, 5)), "x"), m.stored(m.random(8, 1))))
    return m.model(m("MatMul", m.stored(m.random(3, 8)), hidden), (5, 1), (3, 1))


def acas_shape(m: Maker) -> onnx.ModelProto:
    x = m("Flatten", m("Sub", "x", m.stored(np.zeros((1, 1, 1, 5)))), axis=1)
    for sizes in ((5, 8), (8, 8)):
        x = m("Relu", m("Add", m("MatMul", x, m.stored(m.random(*sizes))), m.stored(m.random(sizes[1]))))
    return m.model(m("Add", m("MatMul", x, m.stored(m.random(8, 5))), m.stored(m.random(5))), (1, 1, 1, 5), (1, 5))


def matmul_without_flatten(m: Maker) -> onnx.ModelProto:
    hidden = m("Relu", m("Add", m("MatMul", "x", m.stored(m.random(5, 8))), m.stored(m.random(1, 1, 1, 8))))
    return m.model(m("MatMul", hidden, m.stored(m.random(8, 3))), (1, 1, 1, 5), (1, 1, 1, 3))


def old_inputs(m: Maker) -> onnx.ModelProto:
    return m.model(_head(m, m.conv("x", 2, 3), 108), listed=True, ir=3)


def unused_weights(m: Maker) -> onnx.ModelProto:
    m.stored(m.random(4, 4))
    m("Relu", "x")
    return m.model(_head(m, "x", 72))


def slices(m: Maker) -> onnx.ModelProto:
    left = (
        m("Slice", "x", m.ints(0), m.ints(1), m.ints(1))
        if m.opset >= 10
        else m("Slice", "x", starts=[0], ends=[1], axes=[1])
    )
    right = m("Gather", "x", m.ints(1), axis=1)
    return m.model(_head(m, m("Sub", left, right), 36))


def split(m: Maker) -> onnx.ModelProto:
    left, right = m("Split", m.linear(m("Flatten", "x"), 72, 8), outputs=2, axis=1)
    return m.model(m.linear(m("Mul", left, m("Relu", right)), 4))


def conv_transposed(m: Maker) -> onnx.ModelProto:
    maps = m("ConvTranspose", "x", m.stored(m.random(2, 3, 2, 2)), strides=[2, 2])
    return m.model(_head(m, maps, 3 * 144))


def double(m: Maker) -> onnx.ModelProto:
    m.dtype = np.float64
    return m.model(_head(m, "x", 72), kind=TensorProto.DOUBLE)


def odd_names(m: Maker) -> onnx.ModelProto:
    model = m.model(_head(m, "x", 72))
    names = {n: f'a.b/{n}:0 "{n}"' for node in model.graph.node for n in (*node.input, *node.output)}
    for node in model.graph.node:
        node.name = f"{node.name}.x y/"
        node.input[:] = [names[n] for n in node.input]
        node.output[:] = [names[n] for n in node.output]
    for named in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        named.name = names[named.name]
    return model


READ: dict[str, tuple[Any, tuple[int, ...]]] = {
    "dynamic batch": (dynamic_batch, (9, 13)),
    "dynamic batch by Shape": (dynamic_batch_by_shape, (13, 21)),
    "MatMul + Add": (matmul_add, (7, 21)),
    "BatchNormalization": (batch_norm, (7, 9, 15)),
    "Sub, Div, Mul": (sub_div_mul, (7, 14)),
    "constant minus x": (sub_from_constant, (13,)),
    "Constant": (constants, (11, 13)),
    "Constant of scalars": (constant_scalars, (12, 19)),
    "Transpose (NHWC)": (transpose_nhwc, (9, 21)),
    "MaxPool": (max_pool, (8, 12)),
    "MaxPool padded": (max_pool_padded, (11,)),
    "MaxPool SAME_UPPER": (max_pool_same, (12,)),
    "AveragePool": (average_pool, (7, 19)),
    "AveragePool with its pad": (average_pool_with_pad, (11,)),
    "GlobalAveragePool": (global_average_pool, (7, 13)),
    "ReduceMean": (reduce_mean, (13, 18)),
    "Gemm bias (1, N)": (gemm_row, (7, 13)),
    "Gemm bias ()": (gemm_scalar, (11,)),
    "Gemm alpha, beta": (gemm_scaled, (9, 13)),
    "Gemm transA": (gemm_transposed, (13,)),
    "Identity, Dropout": (identity_dropout, (7, 13)),
    "Reshape, Squeeze": (reshape_squeeze, (11, 13, 21)),
    "residual Add": (residual, (7, 14)),
    "Concat": (concat, (11, 13)),
    "Sigmoid, Tanh, LeakyRelu": (s_shaped, (7, 16)),
    "Clip": (clip, (7, 12)),
    "Pad": (pad, (9, 13)),
    "auto_pad SAME_UPPER": (same_upper, (11,)),
    "auto_pad SAME_LOWER": (same_lower, (11,)),
    "auto_pad VALID": (valid, (7,)),
    "groups, dilation, uneven pads": (grouped_dilated, (11,)),
    "final Flatten": (final_flatten, (13,)),
    "final Softmax": (final_softmax, (11, 13)),
    "flattened input": (flat_input, (13,)),
    "no batch axis": (no_batch_axis, (13,)),
    "column input": (column_input, (13,)),
    "ACAS Xu": (acas_shape, (8, 13)),
    "MatMul on (1, 1, 1, 5)": (matmul_without_flatten, (13,)),
    "weights among the inputs": (old_inputs, (8,)),
    "unused weights and nodes": (unused_weights, (13,)),
    "Slice, Gather": (slices, (9, 13)),
    "Split, product": (split, (11, 12)),
    "ConvTranspose": (conv_transposed, (11,)),
    "float64": (double, (13,)),
    "odd names": (odd_names, (13,)),
}
"""Construct -> (its file, opsets)."""
