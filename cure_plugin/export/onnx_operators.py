"""The table of operators that are read: each by a function that adds its layers to a net."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cure_plugin.export.onnx_builder import Node, Refused, Value, broadcast_values
from cure_plugin.export.onnx_layers import Difference, Join, Narrow, Product, Reduce, Sum, Take
from cure_plugin.export.onnx_windows import CONVERTERS as WINDOWS

Converter = Callable[[Node], Value | list[Value]]
"""The value that a node puts out; several where it has several outputs."""


def _elementwise(layer: Callable[[], nn.Module]) -> Converter:
    return lambda node: node.record(layer(), node.moving(0))


def _leaky_relu(node: Node) -> Value:
    return node.record(nn.LeakyReLU(node.attributes.get("alpha", 0.01)), node.moving(0))


def _same(node: Node) -> Value:
    return node.moving(0)


def _dropout(node: Node) -> Value:
    training = node.constant(2)
    if training is not None and bool(training.any()):
        raise Refused("drops entries at random: it is in training mode; export the net in eval mode")
    return node.moving(0)


def _cast(node: Node) -> Value:
    if int(node.attributes["to"]) != node.dtype:
        raise Refused("changes the type of numbers on their way; export the net in one type, float32")
    return node.moving(0)


# -- sums and products ----------------------------------------------------------------------------


def _two(node: Node, layer: nn.Module) -> Value:
    """An entry-by-entry operation on two values."""
    one, other = node.moving(0), node.moving(1)
    shape = broadcast_values(one, other)
    return node.record(layer, node.aligned(one, shape)[0], node.aligned(other, shape)[0], shape=shape)


def _with_constant(node: Node) -> tuple[Value, Tensor, bool] | None:
    """(value, constant, whether the value comes first); None where both inputs depend on the net's input."""
    for first in (0, 1):
        value, other = node.given(first), node.given(1 - first)
        if isinstance(value, Value) and other is not None and not isinstance(other, Value):
            return value, node.numbers(other), first == 0
    return None


_ONE, _ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def _add(node: Node) -> Value:
    found = _with_constant(node)
    return _two(node, Sum()) if found is None else node.affine(found[0], _ONE, found[1])


def _subtract(node: Node) -> Value:
    found = _with_constant(node)
    if found is None:
        return _two(node, Difference())
    value, constant, first = found
    return node.affine(value, _ONE, -constant) if first else node.affine(value, -_ONE, constant)


def _multiply(node: Node) -> Value:
    found = _with_constant(node)
    return _two(node, Product()) if found is None else node.affine(found[0], found[1], _ZERO)


def _divide(node: Node) -> Value:
    found = _with_constant(node)
    if found is None or not found[2]:
        raise Refused("divides by what depends on the input; only divisors that are constant are read")
    if bool((found[1] == 0).any()):
        raise Refused("divides by 0")
    return node.affine(found[0], 1 / found[1], _ZERO)


def _batch_norm(node: Node) -> Value:
    value = node.moving(0)
    if node.attributes.get("training_mode", 0) or not node.attributes.get("spatial", 1):
        raise Refused("is in training mode, or has statistics for every entry; export the net in eval mode")
    weight, bias, mean, variance = (node.weight(index) for index in (1, 2, 3, 4))
    scale = weight / (variance + node.attributes.get("epsilon", 1e-5)).sqrt()
    view = (-1, *[1] * (len(value.shape) - 2))
    return node.affine(value, scale.view(view), (bias - mean * scale).view(view))


def _clip(node: Node) -> Value:
    """max(x, low) is relu(x - low) + low, and min(x, high) is high - relu(high - x)."""
    value = node.moving(0)
    ends: list[Tensor | None] = []
    for index, name in ((1, "min"), (2, "max")):
        constant = node.constant(index)
        if name in node.attributes:
            ends.append(torch.tensor(node.attributes[name], dtype=torch.float64))
        else:
            ends.append(None if constant is None else node.numbers(constant).reshape(()))
    low, high = (None if end is None or abs(end) >= _NO_LIMIT else end for end in ends)
    if low is not None:
        value = node.affine(node.record(nn.ReLU(), node.affine(value, _ONE, -low)), _ONE, low)
    if high is not None:
        value = node.affine(node.record(nn.ReLU(), node.affine(value, -_ONE, high)), -_ONE, high)
    return value


_NO_LIMIT = 3e38
"""Ends of a Clip from here on are what exporters write for none."""


# -- linear layers --------------------------------------------------------------------------------


def _linear(node: Node, value: Value, weight: Tensor) -> Value:
    """``weight`` (out, in) on the last axis; on features alone where all other axes have size 1."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    front = value.shape[:-1]
    if math.prod(front) == 1:
        if value.shape[-1] != weight.shape[1]:
            raise Refused(f"does not fit its input of shape {value.shape}: it takes {weight.shape[1]} features")
        return node.record(layer, node.reshaped(value, (1, weight.shape[1])), shape=(*front, weight.shape[0]))
    return node.record(layer, value)


def _gemm(node: Node) -> Value:
    value = node.moving(0)
    if len(value.shape) != 2:
        raise Refused(f"takes matrices, not {value.shape}")
    if node.attributes.get("transA", 0):
        value = node.transposed(value, (1, 0))
    weight = node.weight(1) if node.attributes.get("transB", 0) else node.weight(1).t()
    product = _linear(node, value, weight * node.attributes.get("alpha", 1.0))
    if node.given(2) is None:
        return product
    bias = node.weight(2) * node.attributes.get("beta", 1.0)
    return _of_shape(node.affine(product, _ONE, bias), product.shape)


def _of_shape(value: Value, shape: tuple[int, ...]) -> Value:
    if value.shape != shape:
        raise Refused(f"has unusable weights: a bias that makes shape {value.shape} of {shape}")
    return value


def _matmul(node: Node) -> Value:
    found = _with_constant(node)
    if found is None:
        raise Refused("multiplies two matrices that both depend on the input")
    value, weight, first = found
    if weight.ndim > 2 or weight.ndim < 1:
        raise Refused(f"has a factor of shape {tuple(weight.shape)}; matrices are read")
    if weight.ndim == 1:
        if not first and len(value.shape) > 1:  # a row times a matrix
            value = node.transposed(value, (*range(len(value.shape) - 2), len(value.shape) - 1, len(value.shape) - 2))
        product = _linear(node, value, weight[None])
        return node.reshaped(product, product.shape[:-1])
    if first:
        return _linear(node, value, weight.t())
    if len(value.shape) == 1:
        return _linear(node, value, weight)
    *front, last, final = range(len(value.shape))
    swapped = (*front, final, last)
    return node.transposed(_linear(node, node.transposed(value, swapped), weight), swapped)


# -- shapes ---------------------------------------------------------------------------------------


def _flatten(node: Node) -> Value:
    value, axis = node.moving(0), int(node.attributes.get("axis", 1))
    rank = len(value.shape)
    if not -rank <= axis <= rank:
        raise Refused(f"speaks of axis {axis} of a tensor of shape {value.shape}")
    axis = axis + rank if axis < 0 else axis
    return node.reshaped(value, (math.prod(value.shape[:axis]), math.prod(value.shape[axis:])))


def _reshape(node: Node) -> Value:
    value, target = node.moving(0), node.integers("shape", 1) or []
    copies = not node.attributes.get("allowzero", 0)
    if target.count(-1) > 1 or any(size < -1 for size in target) or len(target) > _MOST_AXES:
        raise Refused(f"asks for shape {target}")
    if copies and any(size == 0 and place >= len(value.shape) for place, size in enumerate(target)):
        raise Refused(f"asks for shape {target} of a tensor of shape {value.shape}")
    shape = [value.shape[place] if copies and size == 0 else size for place, size in enumerate(target)]
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        shape[shape.index(-1)] = math.prod(value.shape) // max(known, 1)
    return node.reshaped(value, shape)


_MOST_AXES = 8


def _squeeze(node: Node) -> Value:
    value, axes = node.moving(0), node.integers("axes", 1)
    rank = len(value.shape)
    chosen = {axis % rank for axis in axes} if axes is not None else {a for a in range(rank) if value.shape[a] == 1}
    return node.reshaped(value, [size for axis, size in enumerate(value.shape) if axis not in chosen])


def _unsqueeze(node: Node) -> Value:
    value, axes = node.moving(0), node.integers("axes", 1) or []
    rank = len(value.shape) + len(axes)
    if rank > _MOST_AXES or len({axis % rank for axis in axes}) < len(axes):
        raise Refused(f"adds axes {axes} to a tensor of shape {value.shape}")
    sizes = iter(value.shape)
    return node.reshaped(value, [1 if axis in {a % rank for a in axes} else next(sizes) for axis in range(rank)])


def _transpose(node: Node) -> Value:
    value = node.moving(0)
    return node.transposed(value, node.integers("perm", 1) or range(len(value.shape))[::-1])


def _concat(node: Node) -> Value:
    values = [node.moving(index) for index in range(len(node.inputs))]
    dim = node.dim(values[0], int(node.attributes.get("axis", 1)))
    if len({(value.batched, len(value.shape)) for value in values}) > 1:
        raise Refused("joins tensors of different kinds of shapes")
    return node.record(Join(dim), *values)


def _part(node: Node, value: Value, axis: int, start: int, length: int) -> Value:
    """Entries along an axis of the file; all of them are no change, along the batch axis too."""
    if (start, length) == (0, value.shape[axis]):
        return value
    if length < 1:
        raise Refused("leaves nothing of its input")
    return node.record(Narrow(node.dim(value, axis), start, length), value)


def _slice(node: Node) -> Value:
    value = node.moving(0)
    starts, ends = node.integers("starts", 1) or [], node.integers("ends", 2) or []
    axes, steps = node.integers("axes", 3), node.integers("steps", 4)
    axes = list(range(len(starts))) if axes is None else axes
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        axis %= max(len(value.shape), 1)
        if step == 1:
            first, last, _ = slice(start, end).indices(value.shape[axis])
            value = _part(node, value, axis, first, last - first)
        else:
            index = torch.arange(value.shape[axis])[range(*slice(start, end, step).indices(value.shape[axis]))]
            value = node.record(Take(node.dim(value, axis), index), value)
    return value


def _split(node: Node) -> list[Value]:
    value, axis = node.moving(0), int(node.attributes.get("axis", 0)) % len(node.moving(0).shape)
    sizes = node.integers("split", 1)
    if sizes is None:
        each = -(-value.shape[axis] // node.outputs)
        sizes = [min(each, value.shape[axis] - each * place) for place in range(node.outputs)]
    return [_part(node, value, axis, sum(sizes[:place]), size) for place, size in enumerate(sizes)]


def _gather(node: Node) -> Value:
    value, index = node.moving(0), node.constant(1)
    axis = int(node.attributes.get("axis", 0)) % len(value.shape)
    if index is None or index.ndim > 1 or index.dtype.kind not in "iu":
        raise Refused("picks by an index that is no list of whole numbers")
    size = value.shape[axis]
    if index.size == 0 or index.min() < -size or index.max() >= size:
        raise Refused(f"picks entries {index.tolist()} of an axis of size {size}")
    if index.ndim == 0 and size == 1:
        return node.reshaped(value, [s for a, s in enumerate(value.shape) if a != axis])
    picked = node.record(Take(node.dim(value, axis), torch.from_numpy(index % size).long().reshape(-1)), value)
    return picked if index.ndim else node.reshaped(picked, [s for a, s in enumerate(picked.shape) if a != axis])


def _reduce(node: Node) -> Value:
    value, axes = node.moving(0), node.integers("axes", 1)
    rank = len(value.shape)
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        return value
    chosen = {axis % rank for axis in axes} if axes else set(range(rank))
    kept = [1 if axis in chosen else size for axis, size in enumerate(value.shape)]
    if not node.attributes.get("keepdims", 1):
        kept = [size for axis, size in enumerate(value.shape) if axis not in chosen]
    dims = [axis if value.batched else axis + 1 for axis in sorted(chosen) if not (value.batched and axis == 0)]
    if not dims:  # the batch axis has one entry here
        raise Refused("works along the batch axis; every sample has to be computed alone")
    return node.record(Reduce(dims, node.kind == "ReduceMean"), value, shape=kept)


def _softmax(node: Node) -> Value:
    value = node.moving(0)
    axis = int(node.attributes.get("axis", -1 if node.opset >= 13 else 1)) % max(len(value.shape), 1)
    entries = value.shape[axis] if node.opset >= 13 else math.prod(value.shape[axis:])
    if entries != math.prod(value.shape):
        raise Refused("is taken over a part of a sample's values; only over all outputs can it be left out")
    kinds: dict[str, Any] = {"Softmax": nn.Softmax, "LogSoftmax": nn.LogSoftmax}
    flat = node.reshaped(value, (1, entries))
    return node.record(kinds[node.kind](1), flat, shape=value.shape)


CONVERTERS: dict[str, Converter] = {
    **WINDOWS,
    "Relu": _elementwise(nn.ReLU),
    "Sigmoid": _elementwise(nn.Sigmoid),
    "Tanh": _elementwise(nn.Tanh),
    "LeakyRelu": _leaky_relu,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Identity": _same,
    "Dropout": _dropout,
    "Cast": _cast,
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Neg": lambda node: node.affine(node.moving(0), -_ONE, _ZERO),
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
}
