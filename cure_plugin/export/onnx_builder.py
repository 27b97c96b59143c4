"""From a file's tensors to torch's: every value as (B, *sample), the layers that make it, and where it comes from.

A tensor of the file whose first size is 1, of two or more axes, is one sample with its batch axis; any other tensor is
a sample as a whole, to which a batch axis is added. So files without a batch axis, with one of size 1 and with one left
open become the same nets, and no layer here mixes samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor, nn

from cure_plugin.export.onnx_layers import Affine, Permute
from cure_plugin.nets import Reshape


class Refused(Exception):
    """Why a node cannot be read; the reader adds the file and the node."""


@dataclass(frozen=True)
class Value:
    """A tensor that depends on the net's input.

    Attributes:
        number: 0 is the input, i + 1 what step i puts out.
        shape: in the file, with a batch of 1.
    """

    number: int
    shape: tuple[int, ...]

    @property
    def batched(self) -> bool:
        """Whether the first axis is the batch's."""
        return len(self.shape) > 1 and self.shape[0] == 1

    @property
    def sample(self) -> tuple[int, ...]:
        """The shape here, without the batch axis."""
        return self.shape[1:] if self.batched else self.shape


@dataclass(frozen=True)
class Step:
    """One layer.

    Attributes:
        layer: in float64. sources: numbers of the values that it takes.
        sample: what it puts out, without the batch axis. label: the node that it stands for.
    """

    layer: nn.Module
    sources: tuple[int, ...]
    sample: tuple[int, ...]
    label: str


Given = Value | np.ndarray | None
"""What a node reads: what depends on the input, a constant, or nothing (left out)."""


@dataclass
class Node:
    """A node of the file, for its converter.

    Attributes:
        kind: the operator. label: what to call the node. opset: of the file.
        attributes: by name. inputs: in order. outputs: how many it has.
        dtype: the type of numbers of the net's input, as ONNX counts types.
        steps: of the net so far; converters add theirs by the methods below.
    """

    kind: str
    label: str
    opset: int
    attributes: dict[str, Any]
    inputs: list[Given]
    outputs: int
    dtype: int
    steps: list[Step] = field(repr=False)

    # -- inputs ---------------------------------------------------------------------------------

    def given(self, index: int) -> Given:
        """Input number ``index``, None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def moving(self, index: int) -> Value:
        """The same, which has to depend on the net's input."""
        value = self.given(index)
        if not isinstance(value, Value):
            raise Refused(f"has a constant as input {index}, where what depends on the net's input is expected")
        return value

    def constant(self, index: int) -> np.ndarray | None:
        """The same, which has to be constant or left out."""
        value = self.given(index)
        if isinstance(value, Value):
            raise Refused(f"has an input {index} that depends on the net's input, where a constant is expected")
        return value

    def weight(self, index: int) -> Tensor:
        """The constant input ``index`` as float64.

        Raises:
            Refused: it is left out, or see :meth:`numbers`.
        """
        value = self.constant(index)
        if value is None:
            raise Refused(f"lacks its input {index}")
        return self.numbers(value)

    def numbers(self, value: np.ndarray) -> Tensor:
        """A constant as float64.

        Raises:
            Refused: its numbers are of another type than the net's input, or not finite.
        """
        own = helper.tensor_dtype_to_np_dtype(self.dtype)
        if value.dtype != own:
            raise Refused(f"has weights of {value.dtype}, not {own} as the net's input; export the net in one type")
        if not np.isfinite(value).all():
            raise Refused("has weights that are not finite")
        return torch.from_numpy(value.astype(np.float64))

    def integers(self, name: str, index: int) -> list[int] | None:
        """Numbers that are an attribute in old opsets and an input in new ones; None where they are left out."""
        if name in self.attributes:
            found = self.attributes[name]
            return [int(number) for number in (found if isinstance(found, Sequence) else [found])]
        value = self.constant(index)
        return None if value is None else [int(number) for number in value.ravel()]

    def dim(self, value: Value, axis: int) -> int:
        """The axis of torch's tensor that the file calls ``axis``.

        Raises:
            Refused: there is none, or it is the batch's.
        """
        rank = len(value.shape)
        if not -rank <= axis < rank:
            raise Refused(f"speaks of axis {axis} of a tensor of shape {value.shape}")
        axis %= rank
        if value.batched and axis == 0:
            raise Refused("works along the batch axis; every sample has to be computed alone")
        return axis if value.batched else axis + 1

    # -- steps ----------------------------------------------------------------------------------

    def record(self, layer: nn.Module, *values: Value, shape: Sequence[int] | None = None) -> Value:
        """Add a layer that takes ``values``.

        Args:
            shape: of the result in the file; default: what the layer puts out, with a batch axis where the first value
                has one.

        Raises:
            Refused: the layer does not take them.
        """
        layer = layer.double().eval()
        try:
            with torch.no_grad():
                sample = tuple(layer(*[torch.zeros(1, *v.sample, dtype=torch.float64) for v in values]).shape[1:])
        except (RuntimeError, ValueError, IndexError, TypeError, MemoryError) as error:
            reason = " ".join(str(error).split())[:150]
            raise Refused(f"does not fit its input of shape {values[0].shape}: {reason}") from error
        self.steps.append(Step(layer, tuple(v.number for v in values), sample, self.label))
        result = tuple(shape) if shape is not None else ((1, *sample) if values[0].batched else sample)
        return self._viewed(len(self.steps), sample, result)

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """``value`` in another shape of the file."""
        return self._viewed(value.number, value.sample, tuple(shape))

    def _viewed(self, number: int, sample: tuple[int, ...], shape: tuple[int, ...]) -> Value:
        if math.prod(sample) != math.prod(shape) or 0 in shape:
            raise Refused(f"cannot make shape {shape} of {math.prod(sample)} entries")
        target = Value(number, shape)
        if target.sample == sample:
            return target
        layer = nn.Flatten() if len(target.sample) == 1 else Reshape(target.sample)
        self.steps.append(Step(layer, (number,), target.sample, self.label))
        return Value(len(self.steps), shape)

    def transposed(self, value: Value, order: Sequence[int]) -> Value:
        """``value`` with the file's axes in another order."""
        if sorted(order) != list(range(len(value.shape))):
            raise Refused(f"orders the axes of a tensor of shape {value.shape} by {list(order)}")
        shape = [value.shape[axis] for axis in order]
        if value.batched:  # where an axis of size 1 stands changes no order of entries
            order = [axis - 1 for axis in order if axis > 0]
        if list(order) == sorted(order):
            return self.reshaped(value, shape)
        return self.record(Permute(order, value.sample), value, shape=shape)

    def affine(self, value: Value, scale: Tensor, shift: Tensor) -> Value:
        """``value * scale + shift`` as the file broadcasts them."""
        shape = _broadcast(value.shape, scale.shape, shift.shape)
        given, batched = self.aligned(value, shape)
        one, other = (
            constant.double().reshape(*[1] * (len(shape) - constant.ndim), *constant.shape)
            for constant in (scale, shift)
        )
        if batched:  # the batch axis is no axis of the constants
            one, other = one[0], other[0]
        return self.record(Affine(one, other), given, shape=shape)

    def aligned(self, value: Value, shape: tuple[int, ...]) -> tuple[Value, bool]:
        """(``value`` with as many axes as ``shape``, whether the first of these is the batch's).

        Axes of size 1 are put in front, as broadcasting does.
        """
        batched = Value(0, shape).batched
        full = (1,) * (len(shape) - len(value.shape)) + value.shape
        sample = full[1:] if batched else full
        if value.sample == sample:
            return Value(value.number, value.shape), batched
        layer = nn.Flatten() if len(sample) == 1 else Reshape(sample)
        self.steps.append(Step(layer, (value.number,), sample, self.label))
        return _Raw(len(self.steps), sample), batched


class _Raw(Value):
    """A value whose shape is that of the sample, also where its first size is 1."""

    @property
    def batched(self) -> bool:
        return False


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*(tuple(shape) for shape in shapes))
    except ValueError:
        given = " and ".join(str(tuple(shape)) for shape in shapes)
        raise Refused(f"has unusable weights or inputs, of shapes {given}") from None


def broadcast_values(*values: Value) -> tuple[int, ...]:
    """The file's shape of an entry-by-entry result of ``values``."""
    return _broadcast(*(value.shape for value in values))
