"""Lower bounds of batches by any method, in pieces that fit memory, with what one method found kept for the next."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor, nn

from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.bounds.faithful import check_outputs
from cure_plugin.bounds.margins import LayerBounds, NodeBox, crown_bounds
from cure_plugin.bounds.memory import crown_bytes, crown_rows, default_memory
from cure_plugin.bounds.module import bounded_module, wrapped_again
from cure_plugin.bounds.parts import crown_bounds_in_parts, only_relus_bend
from cure_plugin.bounds.rounding import required_margins, widened
from cure_plugin.certification.method import BoundMethod, Piece
from cure_plugin.errors import MemoryWarning, SpecError
from cure_plugin.inputs import like
from cure_plugin.relaxation.affine import AffineNet, affine_net
from cure_plugin.sets import Region

_PARTS = 8
"""Share of the memory asked for that a part of a single image's CROWN takes: smaller ones are faster."""


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
        batch_size: images bounded at a time, at most; fewer where an estimate of the memory needed exceeds
            ``memory`` GiB.
        bounded: a wrapper of the same net, in another dtype or elsewhere, that was checked; default: a new one.
    """

    def __init__(
        self,
        net: nn.Module,
        input_shape: tuple[int, ...],
        batch_size: int,
        memory: float,
        bounded: BoundedModule | None = None,
    ) -> None:
        self.net, self.input_shape = net, input_shape
        self.batch_size, self.memory = batch_size, memory
        self.bounded = bounded_module(net, input_shape) if bounded is None else wrapped_again(bounded, net, input_shape)
        self.coupled = CoupledBounds(self.bounded, memory=memory * 2**30)
        self._needed_bytes: dict[BoundMethod, int] = {}
        self._warned: set[BoundMethod] = set()
        self._wide: Bounder | None = None
        self._here: Bounder | None = None
        self._fails_in_float64 = False
        self._affine: tuple[list[Tensor], AffineNet | None] | None = None

    @property
    def classes(self) -> int:
        """Number of logits."""
        return int(self.bounded.final_shape[-1])

    def fresh(self, options: dict[str, Any]) -> BoundedModule:
        """Another wrapper of the same net, with ``options``: what auto_LiRPA 0.3 optimised once, it carries over."""
        bounded = wrapped_again(self.bounded, self.net, self.input_shape, options)
        bounded.eval()  # else the net's parameters would get gradients
        return bounded

    def on_cpu(self) -> Bounder:
        """Itself, or the same for a copy of the net on the CPU with the net's weights of now."""
        if like(self.net).device.type == "cpu":
            return self
        if self._here is None:
            memory = min(self.memory, default_memory(torch.device("cpu")))
            self._here = self._twin(copy.deepcopy(self.net).cpu(), memory)
        self._here.net.load_state_dict(self.net.state_dict())
        return self._here

    def _twin(self, net: nn.Module, memory: float) -> Bounder:
        """The same for ``net``, a copy of this one's in another dtype or on another device."""
        twin = Bounder(net, self.input_shape, self.batch_size, memory, self.bounded)
        twin._warned = self._warned
        return twin

    def affine(self) -> AffineNet | None:
        """The net as affine maps between ReLUs on the CPU, its weights those of now; None where it is none."""
        weights = [parameter.detach() for parameter in (*self.net.parameters(), *self.net.buffers())]
        known = self._affine
        if known is None or not all(torch.equal(*pair) for pair in zip(known[0], weights, strict=True)):
            known = self._affine = [weight.clone() for weight in weights], self._read_affine()
        return known[1]

    def _read_affine(self) -> AffineNet | None:
        """Of the net in float64, so that what it makes of constants alone is made there too."""
        here = self.on_cpu()
        wide = here if like(here.net).dtype == torch.float64 else here._in_float64()
        if wide is None:
            return None
        with torch.no_grad():  # constants of the weights of now
            wide.bounded(torch.zeros(1, *self.input_shape, dtype=torch.float64))
        try:
            return affine_net(wide.bounded)
        except SpecError:
            return None

    def check_outputs(self, x: Tensor, expected: Tensor) -> None:
        """See :func:`~cure_plugin.bounds.faithful.check_outputs`."""
        check_outputs(self.bounded, x, expected)

    def batch(self, method: BoundMethod) -> int:
        """How many images ``method`` bounds at a time; a :class:`MemoryWarning`, once, where one may be too many."""
        if method not in self._needed_bytes:
            self._needed_bytes[method] = needed = method.bytes_per_image(self.bounded, self._itemsize)
            if not self.fits(method) and not method.divides(self.bounded) and method not in self._warned:
                self._warned.add(method)
                warnings.warn(
                    f"{method.name} of this net may need {needed / 2**30:.3g} GiB for a single image, and memory="
                    f"{self.memory:g} GiB was asked for: take a smaller net or larger strides, leave {method.name} out "
                    "of methods, or raise memory",
                    MemoryWarning,
                    stacklevel=2,
                )
        return max(1, min(self.batch_size, int(self.memory * 2**30) // max(1, self._needed_bytes[method])))

    def fits(self, method: BoundMethod) -> bool:
        """Whether a single image is expected to keep to the memory asked for."""
        needed = self._needed_bytes.get(method) or method.bytes_per_image(self.bounded, self._itemsize)
        return needed <= self.memory * 2**30

    @property
    def _itemsize(self) -> int:
        return like(self.net).element_size()

    def crown(self, piece: Piece, hints: Mapping[str, NodeBox] | None = None) -> LayerBounds:
        """CROWN's bounds, of a single image in parts where they would not fit the memory asked for.

        Args:
            hints: see :func:`~cure_plugin.bounds.margins.lower_margins`.
        """
        asked = self.bounded, piece.x, piece.y, piece.perturbation
        if self._rows is not None:
            return crown_bounds_in_parts(*asked, self._rows, hints)
        return crown_bounds(*asked, hints=hints)

    @cached_property
    def _rows(self) -> dict[str, int] | None:
        """Neurons that CROWN bounds at a time, by the names of the ReLUs' inputs; None: all."""
        limit = int(self.memory * 2**30)
        if crown_bytes(self.bounded, self._itemsize) <= limit or not only_relus_bend(self.bounded):
            return None
        return crown_rows(self.bounded, self._itemsize, limit // _PARTS)

    def bound(self, whole: Piece, method: BoundMethod) -> Bounds:
        """Lower bounds of the smallest margin of each image, which of them are proofs, and what later methods can use.

        What float32 leaves between 0 and its rounding errors is bounded again in float64, where float32's boxes of
        layers, widened by their errors, spare it most of the work.

        Coupled and alpha-CROWN start from what is known of the layers.
        """
        lower: list[Tensor] = []
        proved: list[Tensor] = []
        layers: list[LayerBounds] = []
        for index in torch.arange(len(whole.y)).split(self.batch(method)):
            piece = whole if len(index) == len(whole.y) else whole.select(index)
            found = method.bounds(self, piece)
            lower.append(found.lower)
            layers += [found.layers] if found.layers else []
            needed = torch.zeros_like(found.lower)
            if bool((found.lower > 0).any()):
                needed = required_margins(self.bounded, piece.x, piece.y, piece.perturbation, found.boxes).cpu()
            proved.append(found.lower > needed)
            close = ((found.lower > 0) & ~proved[-1]).nonzero().flatten()
            wide = self._in_float64() if close.numel() and piece.x.dtype == torch.float32 else None
            if wide is not None:
                known = found.layers.select(close) if found.layers else None
                proved[-1][close] = self._proved_by(wide, replace(piece.select(close), known=known), method)
        return Bounds(torch.cat(lower), torch.cat(proved), LayerBounds.join(layers) if layers else None)

    def widened(self, region: Region, layers: LayerBounds) -> LayerBounds:
        """``layers`` of the ``region`` with boxes that hold whatever rounding did."""
        return replace(layers, boxes=widened(self.bounded, region.x, region.perturbation, layers.boxes))

    def _proved_by(self, wide: Bounder, piece: Piece, method: BoundMethod) -> Tensor:
        """Which images float64 proves, (B,) bool: by CROWN over the known boxes, or with them as hints; then anew."""
        enough = int(piece.known.rounds.amin()) if piece.known else 0
        region = piece.perturbation.around(piece.x.double())
        again = Piece(region=region, y=piece.y, skipped=max(0, enough - 1))
        left = torch.arange(len(piece.y))
        known = self.widened(piece.region, piece.known) if piece.known else None
        if known and known.boxes:
            over = replace(again, known=known)
            for given in (True, False):
                proofs = [wide._over_known(over.select(index), given) for index in left.split(wide.batch(method))]
                left = left[~torch.cat(proofs)]
                if left.numel() == 0:
                    break
        proved = torch.ones(len(piece.y), dtype=torch.bool)
        if left.numel():
            proved[left] = wide.bound(again.select(left), method).proved
        return proved

    def _over_known(self, piece: Piece, given: bool) -> Tensor:
        """Which images CROWN proves whatever rounding did, (B,) bool, by the known boxes: as given, or as hints."""
        x, y, perturbation = piece.x, piece.y, piece.perturbation
        boxes = piece.known.boxes if piece.known else {}
        layers = crown_bounds(self.bounded, x, y, perturbation, boxes) if given else self.crown(piece, boxes)
        return (layers.margins.amin(1) > required_margins(self.bounded, x, y, perturbation, layers.boxes)).cpu()

    def _in_float64(self) -> Bounder | None:
        """The same for a copy of the net in float64 with the net's weights of now; None where bounds fail there."""
        if self._wide is None and not self._fails_in_float64:
            try:
                self._wide = self._twin(copy.deepcopy(self.net).double(), self.memory)
            except SpecError:
                self._fails_in_float64 = True
                return None
        if self._wide is not None:
            self._wide.net.load_state_dict(self.net.state_dict())
        return self._wide
