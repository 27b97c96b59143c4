"""Nets and properties of the shapes of ACAS Xu: 5 inputs, 5 outputs, 6 hidden layers of 50, ten kinds of questions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

Box = Sequence[tuple[float, float]]


def acas_net(seed: int, gain: float = 1.0, hidden: Sequence[int] = (50,) * 6) -> onnx.ModelProto:
    """Sub, Flatten, then MatMul, Add and Relu, as the published files have them; random weights."""
    random = np.random.default_rng(seed)
    nodes = [
        helper.make_node("Sub", ["input", "mean"], ["centred"]),
        helper.make_node("Flatten", ["centred"], ["h0"]),
    ]
    weights = [numpy_helper.from_array(np.zeros((1, 1, 1, 5), np.float32), "mean")]
    sizes = [5, *hidden, 5]
    for layer, (into, out) in enumerate(pairwise(sizes)):
        weight = random.standard_normal((into, out)) * gain * (2 / into) ** 0.5
        bias = random.standard_normal(out) * 0.1
        weights += [
            numpy_helper.from_array(value.astype(np.float32), f"{name}{layer}")
            for name, value in (("W", weight), ("b", bias))
        ]
        last = layer == len(hidden)
        nodes += [
            helper.make_node("MatMul", [f"h{layer}", f"W{layer}"], [f"m{layer}"]),
            helper.make_node("Add", [f"m{layer}", f"b{layer}"], ["output" if last else f"a{layer}"]),
        ]
        if not last:
            nodes.append(helper.make_node("Relu", [f"a{layer}"], [f"h{layer + 1}"]))
    graph = helper.make_graph(
        nodes,
        "acas",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 1, 1, 5])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 5])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)


def inputs_text(boxes: Sequence[Box]) -> str:
    """Declarations and the input part of a property: one box, or a disjunction."""
    lines = [f"(declare-const {kind}_{i} Real)" for kind in "XY" for i in range(5)]
    if len(boxes) == 1:
        for i, (low, high) in enumerate(boxes[0]):
            lines += [f"(assert (>= X_{i} {low:.9f}))", f"(assert (<= X_{i} {high:.9f}))"]
    else:
        parts = [
            " ".join(f"(>= X_{i} {low:.9f}) (<= X_{i} {high:.9f})" for i, (low, high) in enumerate(box))
            for box in boxes
        ]
        lines.append("(assert (or " + " ".join(f"(and {part})" for part in parts) + "))")
    return "\n".join(lines) + "\n"


def outputs_text(number: int, threshold: float) -> str:
    """What property ``number`` (1 to 10) of ACAS Xu asserts of the outputs, to be shown impossible."""
    others = {k: [j for j in range(5) if j != k] for k in range(5)}

    def all_of(parts: Sequence[str]) -> str:
        return "\n".join(f"(assert {part})" for part in parts)

    def one_of(parts: Sequence[str]) -> str:
        return "(assert (or " + " ".join(f"(and {part})" for part in parts) + "))"

    return {
        1: f"(assert (>= Y_0 {threshold:.9f}))",
        2: all_of([f"(<= Y_{j} Y_0)" for j in others[0]]),
        3: all_of([f"(<= Y_0 Y_{j})" for j in others[0]]),
        4: all_of([f"(<= Y_0 Y_{j})" for j in others[0]]),
        5: one_of([f"(<= Y_{j} Y_4)" for j in others[4]]),
        6: one_of([f"(<= Y_{j} Y_0)" for j in others[0]]),
        7: one_of([" ".join(f"(<= Y_{k} Y_{j})" for j in (0, 1, 2)) for k in (3, 4)]),
        8: one_of([" ".join(f"(<= Y_{k} Y_{j})" for j in (0, 1)) for k in (2, 3, 4)]),
        9: one_of([f"(<= Y_{j} Y_3)" for j in others[3]]),
        10: one_of([f"(<= Y_{j} Y_0)" for j in others[0]]),
    }[number]


def acas_instance(number: int, folder: Path, seed: int, size: float, gain: float = 1.0) -> tuple[Path, Path]:
    """(network, property) of one kind, around a random point; sides of the box differ a hundredfold."""
    random = np.random.default_rng(100 * number + seed)
    onnx_path, vnnlib_path = folder / f"acas_{seed}.onnx", folder / f"prop_{number}_{seed}.vnnlib"
    onnx_path.write_bytes(acas_net(seed, gain).SerializeToString())
    boxes = []
    for _ in range(2 if number == 6 else 1):
        centre, reach = random.uniform(-0.4, 0.4, 5), size * np.array([1, 0.3, 0.1, 0.03, 0.01])
        boxes.append([(float(c - r), float(c + r)) for c, r in zip(centre, random.permutation(reach), strict=True)])
    session_input = torch.tensor([[low for low, _ in boxes[0]]])
    threshold = float(np.linalg.norm(session_input)) if number == 1 else 0.0
    vnnlib_path.write_text(inputs_text(boxes) + outputs_text(number, threshold) + "\n")
    return onnx_path, vnnlib_path
