"""Margins bounded with norm-coupled ReLUs: CROWN's boxes, tightened by radii, then slopes optimised."""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Any, NamedTuple

import torch
from auto_LiRPA import BoundedModule, BoundedTensor
from torch import Tensor

from cure_plugin.bounds.coupled_relu import Coupling, coupled
from cure_plugin.bounds.margins import BOXES_ARGUMENT, LayerBounds, NodeBox, crown_bounds, margin_matrix
from cure_plugin.bounds.memory import coupled_bytes
from cure_plugin.bounds.module import default_dtype
from cure_plugin.bounds.radii import GraphRadii, Radius
from cure_plugin.sets import PerturbationSet

_DECAY = 0.97
"""Of the learning rate, per step."""


class _Effort(NamedTuple):
    """Optimisation steps of the margins, of the bounds of fully connected layers and of convolutions."""

    margins: int
    layers: int
    convolutions: int

    def rounds(self) -> list[tuple[_Effort, float]]:
        """(work, share of the clean margin below minus which an image is left at that), each on top of the last.

        On the nets that were measured, the next round left what was beyond a round's share far below 0.
        """
        first = _Effort(max(1, self.margins // 6), self.layers // 30, 0)
        second = _Effort(max(1, self.margins // 2), self.layers // 3, min(1, self.convolutions))
        return [(first, 4.0), (second, 0.5), (self, torch.inf)]


@dataclass
class _State:
    """One batch: what is asked, and what is known of each ReLU's input so far, by its name.

    Attributes:
        specification: rows C of the margins. aim: what margins are optimised up to, (B,).
        start: radius of the input. clean: values at the clean input.
        boxes: bounds. radius: l2 radii, of the nodes that are done.
    """

    x: Tensor
    perturbation: PerturbationSet
    specification: Tensor
    aim: Tensor
    start: Radius
    clean: dict[str, Tensor]
    boxes: dict[str, NodeBox]
    radius: dict[str, Tensor] = field(default_factory=dict)


class CoupledBounds:
    """Lower bounds of margins over sets that have an l2 radius, never below CROWN's.

    Rounds of growing effort follow each other, for the images that the ones before neither settled nor showed to be
    hopeless.

    Args:
        bounded: auto_LiRPA's wrapper of a net in eval mode.
        iterations: optimisation steps of the slopes for the margins.
        layer_iterations: the same for the bounds of fully connected layers.
        convolution_iterations: the same for convolutions after the first.
        learning_rate: Adam's, of the slopes.
        memory: bytes; boxes of layers whose rows need more, by an estimate, stay as CROWN and the radii leave them.
    """

    def __init__(
        self,
        bounded: BoundedModule,
        iterations: int = 120,
        layer_iterations: int = 30,
        convolution_iterations: int = 4,
        learning_rate: float = 0.2,
        memory: float = torch.inf,
    ) -> None:
        self.bounded = bounded
        self.iterations, self.layer_iterations = iterations, layer_iterations
        self.convolution_iterations, self.learning_rate = convolution_iterations, learning_rate
        self.memory = memory
        self.radii = GraphRadii()

    def bounds(
        self,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationSet,
        target: Tensor | None = None,
        known: LayerBounds | None = None,
        aim: Tensor | None = None,
        skipped: int = 0,
    ) -> LayerBounds:
        """Lower bounds of z_y - z_j for j != y over the set around ``x``, and the boxes found on the way.

        Args:
            target: stop early once every margin is above it, or plainly out of its reach, (B,); default: 0.
                Infinity asks for the best bounds there are.
            known: what :func:`crown_bounds` gave for the same; default: computed here.
            aim: what a round goes on to, with the steps that it has, beyond the target, (B,); default: the target.
            skipped: rounds that are known not to be enough.
        """
        known = known or crown_bounds(self.bounded, x, y, perturbation)
        target = x.new_zeros(len(x)) if target is None else target.to(x)
        aim = target if aim is None else aim.to(x)
        left = torch.arange(len(x), device=x.device)
        result = known.select(left)
        effort = _Effort(self.iterations, self.layer_iterations, self.convolution_iterations)
        with default_dtype(x.dtype):
            for number, (work, share) in enumerate(effort.rounds()[skipped:], skipped + 1):
                some, so_far = perturbation.select(x, left), result.select(left)
                better, at_clean = self._round(x[left], y[left], some, aim[left], so_far, work)
                result.replace(left, better)
                result.rounds[left] = number
                worst = better.margins.amin(1)
                hopeless = (worst < -share * at_clean.amin(1).clamp(min=0)) & target[left].isfinite()
                result.hopeless[left] = hopeless
                left = left[(worst <= target[left]) & ~hopeless]
                if left.numel() == 0:
                    break
        return result

    def _round(
        self,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationSet,
        aim: Tensor,
        known: LayerBounds,
        effort: _Effort,
    ) -> tuple[LayerBounds, Tensor]:
        """(bounds no worse than the ``known`` ones, margins at the clean input)."""
        specification = margin_matrix(y, int(self.bounded.final_shape[-1])).to(x)
        with torch.no_grad():
            logits = self.bounded(BoundedTensor(x, perturbation))  # also marks what depends on the input
            at_clean = (specification @ logits.unsqueeze(2)).squeeze(2)
            nodes = [relu.inputs[0] for relu in self.bounded.relus]
            clean = {node.name: node.forward_value.detach() for node in nodes}
        start = Radius(*perturbation.radii(x))
        state = _State(x, perturbation, specification, aim, start, clean, dict(known.boxes))
        for node in nodes:
            if node.name in state.boxes:
                self._tighten(node, state, effort)
        asked = _first(~(known.margins > aim.unsqueeze(1)))  # NaN is no answer
        found, _ = self._optimise(state, None, _at(specification, asked), effort.margins)
        margins = known.margins.scatter(1, asked, torch.fmax(known.margins.gather(1, asked), found))
        # no lower bound of the whole set lies above the clean margin, whatever rounding says
        return replaced(known, margins=torch.minimum(margins, at_clean), boxes=state.boxes), at_clean

    def _tighten(self, node: Any, state: _State, effort: _Effort) -> None:
        """Intersect the box of a ReLU's input with what radii and coupled bounds say, then set its radius."""
        value, boxes = state.clean[node.name], state.boxes
        with torch.no_grad():
            reach = self.radii.reach(node, state.start, boxes, state.clean)
            reach = reach + 4 * torch.finfo(value.dtype).eps * value.abs()
            boxes[node.name] = _intersection(boxes[node.name], (value - reach, value + reach))
        if state.radius:
            self._optimise_box(node, state, effort)
        with torch.no_grad():
            lower, upper = boxes[node.name]
            own = torch.maximum(value - lower, upper - value).clamp(min=0).flatten(1).norm(dim=1)
            radius = torch.minimum(self.radii.at(node, state.start, boxes, state.clean).l2, own)
            rounding = torch.finfo(value.dtype).eps * value.flatten(1).norm(dim=1)
            state.radius[node.name] = radius * (1 + 1e-6) + rounding

    def _optimise_box(self, node: Any, state: _State, effort: _Effort) -> None:
        """Intersect the box of a ReLU's input with optimised coupled bounds of its unstable neurons."""
        lower, upper = state.boxes[node.name]
        unstable = (lower < 0) & (upper > 0)
        iterations = effort.layers if lower.ndim == 2 else effort.convolutions
        if iterations == 0 or not bool(unstable.any()):
            return
        if coupled_bytes(self.bounded, lower.element_size()).get(node.name, 0) > self.memory:
            return
        if lower.ndim == 2:  # each sample's own neurons; auto_LiRPA's choice is what is unstable in any sample
            asked = _first(unstable)
            rows = _at(torch.eye(lower.shape[1]).to(lower).expand(len(lower), -1, -1), asked)
            found = self._optimise(state, node, rows, iterations)
            low, high = _intersection((lower.gather(1, asked), upper.gather(1, asked)), found)
            state.boxes[node.name] = lower.scatter(1, asked, low), upper.scatter(1, asked, high)
        else:
            state.boxes[node.name] = _intersection((lower, upper), self._optimise(state, node, None, iterations))

    @torch.enable_grad()
    def _optimise(self, state: _State, node: Any, rows: Tensor | None, iterations: int) -> NodeBox:
        """Best bounds over slopes and multipliers: (lower, upper) of ``rows`` (B, k, n) over ``node``'s values.

        For ``node`` None they are rows over the logits and the upper bounds are infinite; for ``rows`` None the
        bounds are those of all of a convolution's outputs.
        """
        start = node or self.bounded.final_node()
        coupling = Coupling(start, state.clean, state.radius)
        inputs = (BoundedTensor(state.x, state.perturbation),)
        given = {name: [*box] for name, box in state.boxes.items() if node is None or name != node.name}

        def ask() -> NodeBox:
            known = {BOXES_ARGUMENT: given}
            if rows is not None:
                lower, upper = self.bounded.compute_bounds(
                    x=inputs, C=rows, method="CROWN", final_node_name=start.name, bound_upper=node is not None, **known
                )
                return lower, torch.full_like(lower, torch.inf) if upper is None else upper
            # auto_LiRPA bounds a convolution's outputs, in patches mode, only on the way to something else
            self.bounded.compute_bounds(
                x=inputs,
                C=state.specification,
                method="CROWN",
                bound_upper=False,
                aux_reference_bounds={node.name: [*state.boxes[node.name]]},
                **known,
            )
            return node.lower, node.upper

        optimiser: torch.optim.Adam | None = None
        best: NodeBox | None = None
        for step in range(iterations):
            with coupled(coupling):
                bounds = ask()
            found = bounds[0].detach(), bounds[1].detach()
            best = found if best is None else _intersection(best, found)
            settled = node is None and bool((best[0] > state.aim.unsqueeze(1)).all())
            if step + 1 == iterations or settled or not coupling.slopes:
                break
            loss = -bounds[0].sum() if node is None else (bounds[1] - bounds[0]).sum()
            slopes = list(coupling.slopes.values())
            optimiser = optimiser or torch.optim.Adam(slopes, lr=self.learning_rate)
            for slope, gradient in zip(slopes, torch.autograd.grad(loss, slopes, allow_unused=True), strict=True):
                slope.grad = gradient
            optimiser.step()
            with torch.no_grad():
                for slope in slopes:
                    slope.clamp_(0, 1)
            optimiser.param_groups[0]["lr"] *= _DECAY
        assert best is not None
        return best


def _first(wanted: Tensor) -> Tensor:
    """Positions of each sample's ``wanted`` entries, (B, N) bool; (B, k), filled up with others to the longest."""
    count = max(1, int(wanted.sum(1).amax()))
    return wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def _at(rows: Tensor, positions: Tensor) -> Tensor:
    """Rows (B, R, n) at ``positions`` (B, k), (B, k, n)."""
    return rows.gather(1, positions.unsqueeze(2).expand(-1, -1, rows.shape[2]))


def _intersection(one: NodeBox, other: NodeBox) -> NodeBox:
    return torch.fmax(one[0], other[0]), torch.fmin(one[1], other[1])  # NaN says nothing
