"""From numbers to questions: (network, property) for balls, boxes, transformations and patches around one image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from cure_plugin.vnncomp.fixed_point import float32_above, float32_below
from cure_plugin.vnncomp.graphs import (
    input_shape,
    output_size,
    with_channel_front,
    with_distance,
    with_linear_front,
)
from cure_plugin.vnncomp.property import Ball, Budget, InputBox, Limit, Property


@dataclass(frozen=True)
class Question:
    """Does the property's label win on all that it allows? Asked of ``model``."""

    model: onnx.ModelProto
    wanted: Property


def in_boxes(model: onnx.ModelProto, boxes: Sequence[InputBox], label: int) -> Question:
    """Pixels in one of several boxes."""
    outward = tuple((float32_below(lower), float32_above(upper)) for lower, upper in boxes)
    return Question(model, Property(input_shape(model), outward, label, output_size(model)))


def in_l2_ball(model: onnx.ModelProto, image: np.ndarray, box: InputBox, eps: float, label: int) -> Question:
    """Pixels in ``box`` within the l2 distance ``eps`` of ``image`` (d,); VNNLIB 2.0."""
    boxes = ((float32_below(box[0]), float32_above(box[1])),)
    return Question(model, Property(input_shape(model), boxes, label, output_size(model), ball=Ball(image, eps)))


def in_l1_ball(model: onnx.ModelProto, image: np.ndarray, box: InputBox, eps: float, label: int) -> Question:
    """The same for l1: inputs are the image (pinned), what is added to it and what is taken away; VNNLIB 2.0."""
    _, channels, *sides = input_shape(model)
    size = len(image)
    identity = np.eye(channels, dtype=np.float32)
    lower = np.concatenate([image, np.zeros(2 * size)])
    room = np.concatenate([np.maximum(box[1] - image, 0), np.maximum(image - box[0], 0)])
    upper = np.concatenate([image, float32_above(room)])
    return Question(
        with_channel_front(model, np.concatenate([identity, identity, -identity], axis=1)),
        Property(
            (1, 3 * channels, *sides),
            ((lower, upper),),
            label,
            output_size(model),
            budget=Budget(np.arange(size, 3 * size), eps),
        ),
    )


def within_distance(
    model: onnx.ModelProto, image: np.ndarray, box: InputBox, norm: str, eps: float, label: int
) -> Question:
    """An l2 or l1 ball by an output that measures the distance; inputs are the image (pinned) and the point."""
    _, channels, *sides = input_shape(model)
    classes = output_size(model)
    lower = np.concatenate([image, float32_below(box[0])])
    upper = np.concatenate([image, float32_above(box[1])])
    limit = Limit(classes, eps * eps if norm == "l2" else eps)
    wanted = Property((1, 2 * channels, *sides), ((lower, upper),), label, classes, classes + 1, limit=limit)
    return Question(with_distance(model, norm), wanted)


def of_parameters(model: onnx.ModelProto, weight: np.ndarray, bias: np.ndarray, box: InputBox, label: int) -> Question:
    """Images ``weight @ p + bias`` (float32) for the inputs p in ``box``."""
    outward = float32_below(box[0]), float32_above(box[1])
    wanted = Property((1, weight.shape[1]), (outward,), label, output_size(model))
    return Question(with_linear_front(model, weight, bias), wanted)


def contrast_and_brightness(image: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) of pixel * (1 + c) + b for the parameters ``names`` out of C and B, in this order.

    Contrast is a share here, a hundredth of a percent's number (:func:`parameter_units`): the weights are then the
    pixels themselves, float32 numbers.
    """
    columns = {"C": image, "B": np.ones_like(image)}
    return np.stack([columns[name] for name in names], axis=1).astype(np.float32), image.astype(np.float32)


def parameter_units(names: Sequence[str]) -> np.ndarray:
    """What to divide each parameter by before it is an input: 100 for contrast, in percent, else 1."""
    return np.array([100.0 if name == "C" else 1.0 for name in names])


def slope_and_slack(slope: np.ndarray, box: InputBox) -> tuple[np.ndarray, np.ndarray, InputBox]:
    """(weight, bias, box of the inputs) of ``slope`` (d, k) times k parameters plus a slack per pixel.

    Args:
        box: of the parameters and the slacks, k + d; see :func:`free_inputs`.
    """
    size, count = slope.shape
    free = free_inputs(box, count)
    weight = np.concatenate([slope, np.eye(size)], axis=1)[:, free].astype(np.float32)
    bias = np.where(free[count:], 0, box[0][count:]).astype(np.float32)
    return weight, bias, (box[0][free], box[1][free])


def free_inputs(box: InputBox, count: int) -> np.ndarray:
    """Which of ``count`` parameters and the slacks after them are inputs, bool.

    A slack whose ends are equal (float32 numbers) is part of the bias.
    """
    free = box[0] < box[1]
    free[:count] = True
    return free


def free_pixels(image: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) of ``image`` (d,) with the pixels where ``free`` (bool) as inputs."""
    weight = np.eye(len(image), dtype=np.float32)[:, free]
    return weight, np.where(free, 0, image).astype(np.float32)


def window(shape: Sequence[int], top: int, left: int, height: int, width: int) -> np.ndarray:
    """Which entries of a flattened image of ``shape`` (..., H, W) lie in a window, all channels; bool."""
    mask = np.zeros(tuple(shape), dtype=bool)
    mask[..., top : top + height, left : left + width] = True
    return mask.reshape(math.prod(shape))


def around(image: np.ndarray, eps: float, domain: tuple[float, float] = (0.0, 1.0)) -> InputBox:
    """The hull of a ball of radius ``eps`` around ``image``, cut with the domain."""
    return np.clip(image - eps, *domain), np.clip(image + eps, *domain)


def patch_boxes(
    image: np.ndarray,
    shape: Sequence[int],
    sides: tuple[int, int],
    block: tuple[int, int, int, int],
    domain: tuple[float, float] = (0.0, 1.0),
) -> list[InputBox]:
    """A box per position of a patch of ``sides`` whose top left corner lies in rows r0 .. r1, columns c0 .. c1."""
    boxes = []
    for row in range(block[0], block[1] + 1):
        for column in range(block[2], block[3] + 1):
            free = window(shape, row, column, *sides)
            boxes.append((np.where(free, domain[0], image), np.where(free, domain[1], image)))
    return boxes
