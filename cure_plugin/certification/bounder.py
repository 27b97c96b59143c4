"""Lower bounds of batches by any method, in pieces that fit memory, with what one method found kept for the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cure_plugin.attacks import worst_margin_loss
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.bounds.margins import Box, LayerBounds, crown_bounds, lower_margins
from cure_plugin.bounds.memory import bytes_per_image
from cure_plugin.bounds.module import bounded_module
from cure_plugin.modes import frozen
from cure_plugin.sets import PerturbationSet

ROUNDING_MARGIN = 1e-5
"""A margin counts as proved only above this share of max(1, largest clean logit).

Bounds are computed in the net's own precision with rounding to nearest; in float32 the sums of these
nets err by a few 1e-6 of their terms' size. Casting the net and the images to float64 leaves the margin far above
the error.
"""

_BEYOND_REACH = 3.0
"""Share of the clean margin: images whose bound lies further below 0 over CROWN's boxes are not tried with
alpha-CROWN's own. On the nets that were measured it proved none beyond 1.5, at ten times the first step's work."""


class Bounder:
    """Bounds of a net's margins.

    Args:
        net: classifier in eval mode; input_shape: without the batch axis.
        alpha_iterations: optimisation steps of alpha-CROWN.
        batch_size: images bounded at a time, at most; fewer where an estimate of the memory needed exceeds
            ``memory`` GiB.
    """

    def __init__(
        self, net: nn.Module, input_shape: tuple[int, ...], alpha_iterations: int, batch_size: int, memory: float
    ) -> None:
        self.net, self.input_shape = net, input_shape
        self.alpha_iterations, self.batch_size, self.memory = alpha_iterations, batch_size, memory
        self._bounded = bounded_module(net, input_shape)
        self._coupled = CoupledBounds(self._bounded)
        self._needed_bytes: dict[str, int] = {}

    @property
    def classes(self) -> int:
        """Number of logits."""
        return int(self._bounded.final_shape[-1])

    def required_margin(self, x: Tensor) -> Tensor:
        """How large a lower bound must be to count as a proof for the clean images ``x``, (B,)."""
        with torch.no_grad():
            return ROUNDING_MARGIN * self.net(x).abs().amax(1).clamp(min=1).cpu()

    def batch(self, method: str) -> int:
        """How many images ``method`` bounds at a time."""
        if method not in self._needed_bytes:
            itemsize = next(self.net.parameters()).element_size()
            self._needed_bytes[method] = bytes_per_image(self._bounded, method, itemsize)
        return max(1, min(self.batch_size, int(self.memory * 2**30) // max(1, self._needed_bytes[method])))

    def bound(
        self, x: Tensor, y: Tensor, perturbation: PerturbationSet, method: str, known: LayerBounds | None = None
    ) -> tuple[Tensor, LayerBounds | None]:
        """Lower bound of the smallest margin of each image, (B,), and the layers' bounds that later methods can use.

        Args:
            known: what an earlier call gave for the same images and set; coupled and alpha-CROWN start from it.
        """
        bounds: list[Tensor] = []
        layers: list[LayerBounds] = []
        for piece in torch.arange(x.shape[0]).split(self.batch(method)):
            some, given = perturbation.select(x, piece), known.select(piece) if known else None
            if method == "alpha-CROWN":
                bounds.append(self._alpha(x[piece], y[piece], some, given))
                continue
            if method == "coupled":
                with frozen(self.net):
                    found = self._coupled.bounds(x[piece], y[piece], some, self.required_margin(x[piece]), given)
                layers.append(found)
                margins = found.margins
            elif method == "CROWN":
                layers.append(crown_bounds(self._bounded, x[piece], y[piece], some))
                margins = layers[-1].margins
            else:
                with torch.no_grad():
                    margins = lower_margins(self._bounded, x[piece], y[piece], some, method)
            bounds.append(margins.amin(1).cpu())
        return torch.cat(bounds), LayerBounds.join(layers) if layers else None

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
        if known.coupled:
            return bounds
        with torch.no_grad():
            clean = -worst_margin_loss(self.net(x), y).cpu()
        undecided = ~(bounds > self.required_margin(x))
        left = (undecided & ~(bounds < -_BEYOND_REACH * clean.clamp(min=0))).nonzero().flatten()
        if left.numel():
            full = self._optimised(x[left], y[left], perturbation.select(x, left), None)
            bounds[left] = torch.fmax(bounds[left], full)
        return bounds

    def _optimised(self, x: Tensor, y: Tensor, perturbation: PerturbationSet, boxes: dict[str, Box] | None) -> Tensor:
        """alpha-CROWN over given ``boxes`` of the layers, or with those of its own; (B,)."""
        if not self._bounded.relus:  # no slopes to choose: CROWN's bounds are the best
            return crown_bounds(self._bounded, x, y, perturbation).margins.amin(1).cpu()

        def margins(sparse: bool) -> Tensor:
            options = {
                "optimize_bound_args": {"iteration": self.alpha_iterations, "enable_beta_crown": False},
                "sparse_spec_alpha": sparse,  # slopes for unstable neurons only: several times faster
            }
            bounded = bounded_module(self.net, self.input_shape, options)  # a fresh one: 0.3 carries alphas over
            bounded.eval()  # else the net's parameters would get gradients
            return lower_margins(bounded, x, y, perturbation, "alpha-CROWN", boxes=boxes)

        with frozen(self.net):
            try:
                found = margins(sparse=True)
            except AssertionError:  # 0.3, where rounding changes which neurons are unstable from pass to pass
                found = margins(sparse=False)
        return found.detach().amin(1).cpu()
