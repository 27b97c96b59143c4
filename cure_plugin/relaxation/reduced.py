"""A net around one image, without what is decided there: neurons that are inactive all over the set are left out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cure_plugin.relaxation.affine import AffineNet
from cure_plugin.relaxation.inputs import InputSet
from cure_plugin.relaxation.products import Product

_CORNERS = 1 << 24
"""Values of a first layer at corners of an l1 ball that are kept: an eighth of a GiB in float64."""


@dataclass(frozen=True)
class Layer:
    """The neurons of a ReLU layer that may be active, unstable ones first.

    Attributes:
        kept: their positions in the layer (n,). unstable: how many are.
        weights: matrices (n, n_j) over what is kept of the sources j. bias: (n,).
        lower, upper: bounds of the unstable ones' inputs (u,). clean: their values at the clean input.
        radius: of an l2 ball around ``clean`` that holds the unstable ones' inputs; infinite where none is known.
        sizes: (n,) sums of absolute values of the terms that make up the inputs: how far rounding may reach.
        outputs: ends of what the neurons put out, (n,) each.
        jump: radius of the l1 ball that the layer, the first, is bounded together with (:mod:`.corners`); 0: it is not.
    """

    kept: Tensor
    unstable: int
    weights: Mapping[int, Tensor]
    bias: Tensor
    lower: Tensor
    upper: Tensor
    clean: Tensor
    radius: float
    sizes: Tensor
    outputs: tuple[Tensor, Tensor]
    jump: float = 0.0

    @cached_property
    def corners(self) -> Product:
        """What unstable neurons put out at the corners of the ball less what they do at the clean input, (u, 2 n_0)."""
        steps = self.jump * self.weights[0][: self.unstable]
        at_corners = (self.clean[:, None] + torch.cat([steps, -steps], 1)).clamp(min=0)
        return Product(at_corners - self.clean[:, None].clamp(min=0))

    @cached_property
    def chord(self) -> Tensor:
        """Slopes of the lines through the ends of the unstable neurons' ReLUs, (u,)."""
        return self.upper / (self.upper - self.lower)

    @cached_property
    def products(self) -> Mapping[int, Product]:
        """Products with the ``weights``."""
        return {j: Product(weight) for j, weight in self.weights.items()}

    @cached_property
    def _copies(self) -> dict[torch.dtype, Layer]:
        """In other precisions; their sparse products take a second to make."""
        return {}

    def to(self, dtype: torch.dtype) -> Layer:
        """The same in another precision; bounds are rounded outwards."""
        if dtype not in self._copies:
            self._copies[dtype] = self._copy(dtype)
        return self._copies[dtype]

    def _copy(self, dtype: torch.dtype) -> Layer:
        return Layer(
            self.kept,
            self.unstable,
            {j: weight.to(dtype) for j, weight in self.weights.items()},
            self.bias.to(dtype),
            _outward(self.lower, dtype, -1),
            _outward(self.upper, dtype, 1),
            self.clean.to(dtype),
            self.radius,
            self.sizes.to(dtype),
            (_outward(self.outputs[0], dtype, -1), _outward(self.outputs[1], dtype, 1)),
            self.jump,
        )


def _outward(end: Tensor, dtype: torch.dtype, sign: int) -> Tensor:
    near = end.to(dtype)
    return near if dtype == end.dtype else torch.nextafter(near, torch.full_like(near, sign * torch.inf))


@dataclass(frozen=True)
class Rows:
    """Affine functions of what ReLU layers and the input put out: rows (R, n_j) over the sources j, and (R,)."""

    weights: Mapping[int, Tensor]
    bias: Tensor

    def __len__(self) -> int:
        return len(self.bias)

    def select(self, index: Tensor) -> Rows:
        return Rows({j: weight[index] for j, weight in self.weights.items()}, self.bias[index])

    def and_negated(self) -> Rows:
        """These, then the same negated: lower bounds of both are bounds of either end."""
        weights = {j: torch.cat([weight, -weight]) for j, weight in self.weights.items()}
        return Rows(weights, torch.cat([self.bias, -self.bias]))

    def to(self, dtype: torch.dtype) -> Rows:
        return Rows({j: weight.to(dtype) for j, weight in self.weights.items()}, self.bias.to(dtype))


@dataclass
class ReducedNet:
    """See above; layers are added one after the other, as their bounds are found.

    Attributes:
        net: all of it. start: the set around the image. layers: of ReLUs, so far.
    """

    net: AffineNet
    start: InputSet
    layers: list[Layer] = field(default_factory=list)

    def rows(self, k: int) -> Rows:
        """All inputs of layer ``k`` (from 1; K + 1: the logits) over what is kept of the layers below."""
        weights = {
            j: weight if j == 0 else weight[:, self.layers[j - 1].kept] for j, weight in self.net.weights[k - 1].items()
        }
        return Rows(weights, self.net.biases[k - 1])

    def parts(self) -> list[slice]:
        """Where each layer's unstable neurons lie among all of them."""
        ends = [0, *itertools.accumulate(layer.unstable for layer in self.layers)]
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    def outputs(self, j: int) -> tuple[Tensor, Tensor]:
        """Ends (n_j,) of what is kept of source ``j``: of the input, or of a layer's outputs."""
        if j == 0:
            return self.start.x + self.start.low, self.start.x + self.start.high
        return self.layers[j - 1].outputs

    def boxes(self, k: int) -> tuple[Tensor, Tensor]:
        """(lower, upper) of all inputs of ReLU layer ``k`` (n_k,); -inf and 0 where they are never positive."""
        layer = self.layers[k - 1]
        lower = torch.full((len(self.net.biases[k - 1]),), -torch.inf, dtype=torch.float64)
        upper = torch.zeros_like(lower)
        lower[layer.kept] = torch.cat([layer.lower, layer.outputs[0][layer.unstable :]])
        upper[layer.kept] = torch.cat([layer.upper, layer.outputs[1][layer.unstable :]])
        return lower, upper

    def add(self, lower: Tensor, upper: Tensor, clean: Tensor, radius: float, sizes: Tensor) -> None:
        """The next layer, of bounds, clean values and sizes of all its inputs (n_k,), float64."""
        rows = self.rows(len(self.layers) + 1)
        unstable = ((lower < 0) & (upper > 0)).nonzero().flatten()
        active = ((lower >= 0) & (upper > 0)).nonzero().flatten()
        kept = torch.cat([unstable, active])
        own = torch.maximum(clean - lower, upper - clean)[unstable].norm()
        self.layers.append(
            Layer(
                kept,
                len(unstable),
                {j: weight[kept] for j, weight in rows.weights.items()},
                rows.bias[kept],
                lower[unstable],
                upper[unstable],
                clean[unstable],
                min(radius, float(own) * (1 + 1e-12)),
                sizes[kept],
                (lower[kept].clamp(min=0), upper[kept].clamp(min=0)),
                self._jump(len(unstable)),
            )
        )

    def _jump(self, unstable: int) -> float:
        """Of the layer that is added."""
        corners = 2 * unstable * len(self.start.x)
        together = self.start.joint and not self.layers and self.start.eps > 0 and corners <= _CORNERS
        return self.start.eps if together else 0.0

    def to(self, dtype: torch.dtype) -> ReducedNet:
        """The same in another precision."""
        return ReducedNet(self.net, self.start.to(dtype), [layer.to(dtype) for layer in self.layers])
