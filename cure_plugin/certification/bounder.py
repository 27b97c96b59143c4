"""Lower bounds of batches by any method, in pieces that fit memory, with what one method found kept for the next."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor, nn

from cure_plugin.attacks import worst_margin_loss
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.bounds.faithful import check_outputs
from cure_plugin.bounds.margins import Box, LayerBounds, crown_bounds, lower_margins, relu_boxes
from cure_plugin.bounds.memory import bytes_per_image
from cure_plugin.bounds.module import bounded_module, wrapped_again
from cure_plugin.bounds.operators import optimisable
from cure_plugin.bounds.rounding import required_margins
from cure_plugin.errors import MemoryWarning
from cure_plugin.inputs import like
from cure_plugin.modes import frozen
from cure_plugin.sets import PerturbationSet

_BEYOND_REACH = 3.0
"""Share of the clean margin: images whose bound lies further below 0 over CROWN's boxes are not tried with
alpha-CROWN's own. On the nets that were measured it proved none beyond 1.5, at ten times the first step's work."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of the smallest margins of a batch.

    Attributes:
        lower: as computed, (B,).
        proved: whether the margins are positive whatever rounding did, (B,) bool.
        layers: bounds of layers that later methods can use.
    """

    lower: Tensor
    proved: Tensor
    layers: LayerBounds | None


class Bounder:
    """Bounds of a net's margins.

    Args:
        net: classifier in eval mode, float32 or float64; input_shape: without the batch axis.
        alpha_iterations: optimisation steps of alpha-CROWN.
        batch_size: images bounded at a time, at most; fewer where an estimate of the memory needed exceeds
            ``memory`` GiB.
        bounded: a wrapper of the same net in another dtype that was checked; default: a new one.
    """

    def __init__(
        self,
        net: nn.Module,
        input_shape: tuple[int, ...],
        alpha_iterations: int,
        batch_size: int,
        memory: float,
        bounded: BoundedModule | None = None,
    ) -> None:
        self.net, self.input_shape = net, input_shape
        self.alpha_iterations, self.batch_size, self.memory = alpha_iterations, batch_size, memory
        self._bounded = (
            bounded_module(net, input_shape) if bounded is None else wrapped_again(bounded, net, input_shape)
        )
        self._coupled = CoupledBounds(self._bounded)
        self._needed_bytes: dict[str, int] = {}
        self._warned: set[str] = set()
        self._wide: Bounder | None = None

    @property
    def classes(self) -> int:
        """Number of logits."""
        return int(self._bounded.final_shape[-1])

    def check_outputs(self, x: Tensor, expected: Tensor) -> None:
        """See :func:`~cure_plugin.bounds.faithful.check_outputs`."""
        check_outputs(self._bounded, x, expected)

    def batch(self, method: str) -> int:
        """How many images ``method`` bounds at a time; a :class:`MemoryWarning`, once, where one may be too many."""
        if method not in self._needed_bytes:
            itemsize = like(self.net).element_size()
            self._needed_bytes[method] = needed = bytes_per_image(self._bounded, method, itemsize)
            if needed > self.memory * 2**30 and method not in self._warned:
                self._warned.add(method)
                warnings.warn(
                    f"{method} of this net may need {needed / 2**30:.3g} GiB for a single image, and memory="
                    f"{self.memory:g} GiB was asked for: take a smaller net or larger strides, leave {method} out of "
                    "methods, or raise memory",
                    MemoryWarning,
                    stacklevel=2,
                )
        return max(1, min(self.batch_size, int(self.memory * 2**30) // max(1, self._needed_bytes[method])))

    def bound(
        self,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationSet,
        method: str,
        known: LayerBounds | None = None,
        skipped: int = 0,
    ) -> Bounds:
        """Lower bounds of the smallest margin of each image, which of them are proofs, and what later methods can use.

        What float32 leaves between 0 and its rounding errors is bounded again in float64.

        Args:
            known: what an earlier call gave for the same images and set; coupled and alpha-CROWN start from it.
            skipped: rounds of coupled bounds that are known not to be enough.
        """
        lower: list[Tensor] = []
        proved: list[Tensor] = []
        layers: list[LayerBounds] = []
        for piece in torch.arange(x.shape[0]).split(self.batch(method)):
            some, given = perturbation.select(x, piece), known.select(piece) if known else None
            found, needed, left = self._piece(x[piece], y[piece], some, method, given, skipped)
            lower.append(found)
            proved.append(found > needed)
            layers += [left] if left else []
            close = ((found > 0) & ~proved[-1]).nonzero().flatten()
            if close.numel() and x.dtype == torch.float32:
                enough = int(left.rounds[close].amin()) if left else 0
                again = self._in_float64().bound(
                    x[piece][close].double(),
                    y[piece][close],
                    some.select(x[piece], close),
                    method,
                    skipped=max(0, enough - 1),
                )
                proved[-1][close] = again.proved
        return Bounds(torch.cat(lower), torch.cat(proved), LayerBounds.join(layers) if layers else None)

    def _piece(
        self,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationSet,
        method: str,
        known: LayerBounds | None,
        skipped: int = 0,
    ) -> tuple[Tensor, Tensor, LayerBounds | None]:
        """(bounds (B,), what they must exceed (B,), bounds of layers) of a batch that fits memory."""
        layers: LayerBounds | None = None
        boxes: dict[str, Box] = {}
        if method == "alpha-CROWN":
            lower = self._alpha(x, y, perturbation, known)
            boxes = known.boxes if known else {}  # what the wrapper itself holds is of whatever came before
        elif method in ("coupled", "CROWN"):
            if method == "coupled":
                # any margin above 0 will do: rounds that would carry it past rounding cost more than float64 does
                known = known or crown_bounds(self._bounded, x, y, perturbation)
                aim = required_margins(self._bounded, x, y, perturbation, known.boxes)
                with frozen(self.net):
                    layers = self._coupled.bounds(x, y, perturbation, known=known, aim=aim, skipped=skipped)
            else:
                layers = crown_bounds(self._bounded, x, y, perturbation)
            lower, boxes = layers.margins.amin(1).cpu(), layers.boxes
        else:
            with torch.no_grad():
                lower = lower_margins(self._bounded, x, y, perturbation, method).amin(1).cpu()
            boxes = relu_boxes(self._bounded)
        if not bool((lower > 0).any()):
            return lower, torch.zeros_like(lower), layers
        return lower, required_margins(self._bounded, x, y, perturbation, boxes).cpu(), layers

    def _in_float64(self) -> Bounder:
        """The same for a copy of the net in float64, whose weights are the net's own of now."""
        if self._wide is None:
            net = copy.deepcopy(self.net).double()
            self._wide = Bounder(
                net, self.input_shape, self.alpha_iterations, self.batch_size, self.memory, self._bounded
            )
            self._wide._warned = self._warned
        self._wide.net.load_state_dict(self.net.state_dict())
        return self._wide

    def _alpha(self, x: Tensor, y: Tensor, perturbation: PerturbationSet, known: LayerBounds | None) -> Tensor:
        """alpha-CROWN, (B,): first, where boxes are known, of the margins alone; then of what is left in full.

        Boxes that coupling made are better than alpha-CROWN's own, so they stay. What coupling found hopeless keeps
        its bound, and so does what the first step leaves beyond :data:`_BEYOND_REACH`.
        """
        if known is None:
            return self._optimised(x, y, perturbation, None)
        bounds = known.margins.amin(1).cpu()
        some = (~known.hopeless).nonzero().flatten()
        if some.numel() == 0:
            return bounds
        boxes = known.select(some).boxes
        bounds[some] = torch.fmax(bounds[some], self._optimised(x[some], y[some], perturbation.select(x, some), boxes))
        if bool(known.rounds.any()):  # coupling made the boxes
            return bounds
        with torch.no_grad():
            clean = -worst_margin_loss(self.net(x), y).cpu()
        left = (~(bounds > 0) & ~(bounds < -_BEYOND_REACH * clean.clamp(min=0))).nonzero().flatten()
        if left.numel():
            full = self._optimised(x[left], y[left], perturbation.select(x, left), None)
            bounds[left] = torch.fmax(bounds[left], full)
        return bounds

    def _optimised(self, x: Tensor, y: Tensor, perturbation: PerturbationSet, boxes: dict[str, Box] | None) -> Tensor:
        """alpha-CROWN over given ``boxes`` of the layers, or with those of its own; (B,)."""
        if not self._bounded.relus or not optimisable(self._bounded):  # no slopes to choose, or none that it can
            return crown_bounds(self._bounded, x, y, perturbation).margins.amin(1).cpu()

        def margins(sparse: bool) -> Tensor:
            options = {
                "optimize_bound_args": {"iteration": self.alpha_iterations, "enable_beta_crown": False},
                "sparse_spec_alpha": sparse,  # slopes for unstable neurons only: several times faster
            }
            # a fresh one: 0.3 carries alphas over
            bounded = wrapped_again(self._bounded, self.net, self.input_shape, options)
            bounded.eval()  # else the net's parameters would get gradients
            return lower_margins(bounded, x, y, perturbation, "alpha-CROWN", boxes=boxes)

        with frozen(self.net):
            try:
                found = margins(sparse=True)
            except AssertionError:  # 0.3, where rounding changes which neurons are unstable from pass to pass
                found = margins(sparse=False)
        return found.detach().amin(1).cpu()
