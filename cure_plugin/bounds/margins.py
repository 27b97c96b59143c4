"""Bounds of the margins z_y - z_j through auto_LiRPA, and the cross entropy of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from auto_LiRPA import BoundedModule, BoundedTensor
from torch import Tensor

from cure_plugin.bounds.module import default_dtype
from cure_plugin.inputs import check_labels, check_pair
from cure_plugin.sets import PerturbationSet
from cure_plugin.sets.base import check_set

NodeBox = tuple[Tensor, Tensor]
"""(lower, upper) of a node's values, each (B, *shape)."""

BOXES_ARGUMENT = next(
    name
    for name in ("intermediate_layer_bounds", "interm_bounds")
    if name in inspect.signature(BoundedModule.compute_bounds).parameters
)
"""What this auto_LiRPA version calls bounds of inner nodes that it shall not compute itself."""


@dataclass(frozen=True)
class LayerBounds:
    """What one pass found, for later ones to start from.

    Attributes:
        margins: lower bounds of z_y - z_j, (B, C - 1).
        boxes: bounds of every ReLU's input, by its name; each end (B, *shape).
        hopeless: where more work of the same kind is not worth its time, (B,) bool.
        rounds: how many rounds of norm-coupled bounds the boxes have seen, (B,).
    """

    margins: Tensor
    boxes: dict[str, NodeBox]
    hopeless: Tensor
    rounds: Tensor

    def select(self, index: Tensor) -> LayerBounds:
        """Those of the samples ``index``."""
        boxes = {name: (low[index], high[index]) for name, (low, high) in self.boxes.items()}
        return LayerBounds(self.margins[index], boxes, self.hopeless[index], self.rounds[index])

    def on(self, device: torch.device | str) -> LayerBounds:
        """The same on another device."""
        boxes = {name: (low.to(device), high.to(device)) for name, (low, high) in self.boxes.items()}
        return LayerBounds(self.margins.to(device), boxes, self.hopeless.to(device), self.rounds.to(device))

    def replace(self, index: Tensor, better: LayerBounds) -> None:
        """Put ``better`` in the place of the samples ``index``."""
        self.margins[index], self.hopeless[index] = better.margins, better.hopeless
        self.rounds[index] = better.rounds
        for name, (low, high) in better.boxes.items():
            self.boxes[name][0][index], self.boxes[name][1][index] = low, high

    @staticmethod
    def join(parts: Sequence[LayerBounds]) -> LayerBounds:
        """The samples of ``parts``, one after the other."""
        boxes = {
            name: (torch.cat([p.boxes[name][0] for p in parts]), torch.cat([p.boxes[name][1] for p in parts]))
            for name in parts[0].boxes
        }
        margins, hopeless, rounds = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("margins", "hopeless", "rounds")
        )
        return LayerBounds(margins, boxes, hopeless, rounds)


def margin_matrix(y: Tensor, classes: int) -> Tensor:
    """Specification C with rows z_y - z_j for j != y in class order, (B, classes - 1, classes)."""
    check_labels(y, classes)
    identity = torch.eye(classes, device=y.device)
    others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    others = others + (others >= y[:, None])
    return identity[y].unsqueeze(1) - identity[others]


def lower_margins(
    bounded: BoundedModule,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    method: str = "IBP",
    boxes: Mapping[str, NodeBox] | None = None,
    hints: Mapping[str, NodeBox] | None = None,
) -> Tensor:
    """Lower bounds of z_y - z_j for j != y over the set around ``x``, (B, C - 1).

    Args:
        bounded: auto_LiRPA's wrapper of the net.
        method: any of auto_LiRPA's, e.g. IBP, CROWN-IBP, CROWN, alpha-CROWN.
        boxes: known bounds of the ReLUs' inputs by node name, taken instead of computing them.
        hints: the same, taken where they show that a ReLU does not bend; where one may, CROWN computes its own.
    """
    check_set(perturbation)
    check_pair(x, y, bounded)
    specification = margin_matrix(y, int(bounded.final_shape[-1])).to(x)
    given = {
        argument: _as_given(known, x)
        for argument, known in ((BOXES_ARGUMENT, boxes), ("aux_reference_bounds", hints))
        if known
    }
    with default_dtype(x.dtype):
        lower, _ = bounded.compute_bounds(
            x=(BoundedTensor(x, perturbation),), C=specification, method=method, bound_upper=False, **given
        )
    return lower


def _as_given(boxes: Mapping[str, NodeBox], x: Tensor) -> dict[str, list[Tensor]]:
    """Boxes as auto_LiRPA takes them, numbers like ``x``."""
    return {name: [end.to(x) for end in box] for name, box in boxes.items()}


def start_slopes(
    bounded: BoundedModule, x: Tensor, y: Tensor, perturbation: PerturbationSet, boxes: Mapping[str, NodeBox]
) -> None:
    """Make the slopes that alpha-CROWN optimises where ``boxes`` of all layers are known: those of the margins alone.

    Left to itself (``init_alpha``), auto_LiRPA bounds every layer for it, with slopes for each.
    """
    start = getattr(bounded, "init_alpha", None) or bounded.init_slope  # 0.7.1, 0.3
    specification = margin_matrix(y, int(bounded.final_shape[-1])).to(x)
    given = {BOXES_ARGUMENT: _as_given(boxes, x)}
    with default_dtype(x.dtype):
        start((BoundedTensor(x, perturbation),), c=specification, bound_upper=False, **given)


def relu_boxes(bounded: BoundedModule) -> dict[str, NodeBox]:
    """Bounds of the ReLUs' inputs by name, as the last bound computation of ``bounded`` left them."""
    inner = [relu.inputs[0] for relu in bounded.relus]
    return {node.name: (node.lower.detach(), node.upper.detach()) for node in inner if node.perturbed}


def crown_bounds(
    bounded: BoundedModule,
    x: Tensor,
    y: Tensor,
    perturbation: PerturbationSet,
    boxes: Mapping[str, NodeBox] | None = None,
    hints: Mapping[str, NodeBox] | None = None,
) -> LayerBounds:
    """CROWN's margins, and the boxes of the ReLUs' inputs that it computed on the way (those it needed).

    Arguments as of :func:`lower_margins`.
    """
    with torch.no_grad():
        margins = lower_margins(bounded, x, y, perturbation, "CROWN", boxes=boxes, hints=hints)
    none = torch.zeros(len(margins), dtype=torch.long, device=margins.device)
    return LayerBounds(margins, relu_boxes(bounded), none.bool(), none)


def elided(margins: Tensor) -> Tensor:
    """The elided vector d = (0, -lb_1, ..., -lb_{C-1}): upper bounds on z_j - z_y, true class first; (B, C)."""
    return torch.cat([torch.zeros_like(margins[:, :1]), -margins], dim=1)


def elided_cross_entropy(vector: Tensor) -> Tensor:
    """CE(d, 0) per sample of an elided vector d (B, C); (B,).

    Of bounds, it is an upper bound of the worst cross entropy over the set (Wong and Kolter 2018).
    """
    target = torch.zeros(vector.shape[0], dtype=torch.long, device=vector.device)
    return F.cross_entropy(vector, target, reduction="none")
