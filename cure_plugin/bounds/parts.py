"""CROWN layer by layer and some neurons at a time, where the rows of a whole layer would not fit memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.bounds.margins import LayerBounds, NodeBox, crown_bounds, lower_margins, relu_boxes
from cure_plugin.bounds.operators import moves
from cure_plugin.sets import PerturbationSet


def only_relus_bend(bounded: BoundedModule) -> bool:
    """Whether bounds of the ReLUs' inputs are all that CROWN needs of inner nodes: those it can get in parts."""
    asking = (node for node in bounded.children() if getattr(node, "requires_input_bounds", []) and moves(node))
    return all(type(node).__name__ == "BoundRelu" for node in asking)


def crown_bounds_in_parts(
    bounded: BoundedModule,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    rows: Mapping[str, int],
    hints: Mapping[str, NodeBox] | None = None,
) -> LayerBounds:
    """As :func:`~cure_plugin.bounds.margins.crown_bounds`, of a net where :func:`only_relus_bend`.

    Args:
        x: one image (1, *input); y: its label.
        rows: neurons bounded at a time, by the names of the ReLUs' inputs.
        hints: boxes of those that hold.
    """
    with torch.no_grad():
        lower_margins(bounded, x, y, perturbation, "IBP")
        boxes = relu_boxes(bounded)
        for name, (low, high) in boxes.items():
            if hints and name in hints:
                boxes[name] = torch.maximum(low, hints[name][0].to(low)), torch.minimum(high, hints[name][1].to(high))
        for node in (relu.inputs[0] for relu in bounded.relus):
            if node.name not in boxes or node.name not in rows:  # next to the input intervals are exact
                continue
            low, high = boxes[node.name]
            others = {name: box for name, box in boxes.items() if name != node.name}
            for part in ((low < 0) & (high > 0)).flatten().nonzero().flatten().split(rows[node.name]):
                asked = torch.zeros_like(low, dtype=torch.bool)
                asked.view(-1)[part] = True
                # what looks active to auto_LiRPA is not bounded
                hint = torch.where(asked, low, 1.0), torch.where(asked, high, 1.0)
                lower_margins(bounded, x, y, perturbation, "CROWN", boxes=others, hints={node.name: hint})
                low = torch.where(asked, torch.fmax(low, node.lower), low)
                high = torch.where(asked, torch.fmin(high, node.upper), high)
            boxes[node.name] = low, high
    return crown_bounds(bounded, x, y, perturbation, boxes=boxes)
