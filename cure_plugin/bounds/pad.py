"""Constant padding as a node of its own: no auto_LiRPA version reads what torch traces."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from auto_LiRPA.bound_op_map import register_custom_op
from auto_LiRPA.bound_ops import Bound
from torch import Tensor


class BoundPad(Bound):
    """``F.pad(x, pads, value=value)``; bounded like every linear node, see :mod:`cure_plugin.bounds.linear_nodes`."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        mode = attr.get("mode", "constant")
        if "pads" not in attr or mode not in ("constant", b"constant") or len(inputs) != 1:
            raise NotImplementedError("padding of a mode other than constant, or by amounts that are computed")
        pads = [int(amount) for amount in attr["pads"]]
        axes = len(pads) // 2
        self.pads = [amount for axis in reversed(range(axes)) for amount in (pads[axis], pads[axis + axes])]
        self.constant = float(attr.get("value", 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, value=self.constant)


def install() -> None:
    """Make the node known to auto_LiRPA."""
    register_custom_op("onnx::Pad", BoundPad)
