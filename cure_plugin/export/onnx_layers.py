"""What a file's nodes become where torch has no layer of that name, and nets of them that are no chains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Graph(nn.Module):
    """Layers that read any values before them: number 0 is the input, number i + 1 what layer i puts out.

    Args:
        layers: in order. sources: of each layer, the numbers of its arguments.
    """

    def __init__(self, layers: Sequence[nn.Module], sources: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.sources = tuple(sources)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, sources in zip(self.layers, self.sources, strict=True):
            values.append(layer(*[values[number] for number in sources]))
        return values[-1]


class Affine(nn.Module):
    """``x * scale + shift`` for constants that broadcast with x; (B, *sample) to (B, *sample)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Permute(nn.Module):
    """Axes of each sample in another order, by an index: auto_LiRPA takes views of what it gets, and those need entries
    that lie in memory in their order.

    Args:
        order: of the axes of ``shape``, the sample's.
    """

    index: Tensor

    def __init__(self, order: Sequence[int], shape: Sequence[int]) -> None:
        super().__init__()
        self.order = tuple(order)
        places = torch.arange(math.prod(shape)).view(*shape).permute(*order)
        self.shape = tuple(places.shape)
        self.register_buffer("index", places.flatten())

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x.flatten(1), 1, self.index).reshape(x.shape[0], *self.shape)


class Take(nn.Module):
    """Entries ``index`` along axis ``dim``."""

    index: Tensor

    def __init__(self, dim: int, index: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, self.dim, self.index)


class Narrow(nn.Module):
    """Entries ``start`` to ``start + length`` along axis ``dim``."""

    def __init__(self, dim: int, start: int, length: int) -> None:
        super().__init__()
        self.dim, self.start, self.length = dim, start, length

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.dim, self.start, self.length)


class Reduce(nn.Module):
    """Mean or sum over axes, which stay with size 1."""

    def __init__(self, dims: Sequence[int], mean: bool) -> None:
        super().__init__()
        self.dims, self.mean = tuple(dims), mean

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=True) if self.mean else x.sum(self.dims, keepdim=True)


class Join(nn.Module):
    """Values one after the other along axis ``dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, self.dim)


class Sum(nn.Module):
    """Two values added."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other


class Difference(nn.Module):
    """The first value less the second."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one - other


class Product(nn.Module):
    """Two values multiplied."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one * other
