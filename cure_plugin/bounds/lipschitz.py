"""How far logits can move over an lp ball, by the norms of the layers between: differentiable, for training.

    z_j(x') - z_y(x') <= z_j(x) - z_y(x) + eps K ||w_j - w_y||

for ||x' - x|| <= eps, where w are the rows of the last layer and K is the product of the norms of what lies between the
input and it: of linear layers, one after the other, their norm, of sums the sum, of activations their steepest slope
(Tsuzuku et al. 2018; Leino et al. 2021). Spectral norms are had by power iteration, from below; certificates rest on
the upper bounds of :mod:`cure_plugin.bounds.radii`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.bounds.linear_nodes import is_linear
from cure_plugin.bounds.norms import meeting_taps
from cure_plugin.bounds.operators import is_elementwise, is_fixed, moves
from cure_plugin.bounds.radii import STEEPEST
from cure_plugin.errors import SpecError
from cure_plugin.sets.rows import pair

_FIRST_STEPS = 30
"""Of power iteration from a random vector; later calls go on from the vectors that earlier ones left."""

_VIEWS = ("BoundFlatten", "BoundReshape", "BoundSqueeze", "BoundTranspose", "BoundUnsqueeze")

_LEAST = 1e-12


@dataclass(frozen=True)
class _Chain:
    """Linear nodes, each over the one before it, the first over ``source``; biases are left out."""

    nodes: tuple[Any, ...]
    source: Any

    @property
    def name(self) -> str:
        """Of what it computes."""
        return str(self.nodes[-1].name)

    def zero(self) -> Tensor:
        """A value of the source, (1, *shape), of the weights' kind."""
        like = next((one for node in self.nodes for one in _weights(node)), torch.zeros(()))
        return like.detach().new_zeros(1, *self.source.output_shape[1:])

    def __call__(self, value: Tensor) -> Tensor:
        """What the nodes make of values (N, *shape) of the source."""
        return self._through(value) - self._through(torch.zeros_like(value[:1]))

    def _through(self, value: Tensor) -> Tensor:
        for node in self.nodes:
            value = _applied(node, value)
        return value


def _live(part: Any) -> Any:
    """What a node that no input reaches holds, of the weights of now, with their gradients; None: made of a shape."""
    return part.forward(*map(_live, part.inputs)) if is_fixed(part) else None


def _weights(node: Any) -> list[Tensor]:
    values = [_live(part) for part in node.inputs if not moves(part)]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _channel_scale(node: Any) -> Tensor:
    """What a batch normalisation multiplies each channel by, (C,): with the statistics that bounds normalise by."""
    weight, _, _, variance = (_live(part) for part in node.inputs[1:5])
    return weight / torch.sqrt((node.current_var if node.training else variance) + node.eps)


def _applied(node: Any, value: Tensor) -> Tensor:
    if type(node).__name__ == "BoundBatchNormalization":
        return value * _channel_scale(node).view(1, -1, *[1] * (value.ndim - 2))
    return node.forward(*(value if moves(part) else _live(part) for part in node.inputs))


def _chain(node: Any) -> _Chain:
    """The linear nodes that end in ``node``, as far down as each has one input that moves."""
    nodes: list[Any] = []
    while is_linear(node) and sum(map(moves, node.inputs)) == 1:
        nodes.append(node)
        node = next(part for part in node.inputs if moves(part))
    return _Chain(tuple(reversed(nodes)), node)


class LayerNorms:
    """Norms of one net's layers by power iteration, whose vectors are kept from call to call."""

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}

    def restart(self) -> None:
        """Forget the vectors, so that what follows depends on the weights alone."""
        self._vectors.clear()

    def distances(self, bounded: BoundedModule, p: float, steps: int = 2) -> Tensor:
        """How far z_j - z_y can move where the input moves by 1 in the norm ``p``, (C, C): estimates with gradients.

        Args:
            bounded: auto_LiRPA's wrapper of the net, in training mode, else there are no gradients.
            p: 1, 2 or inf. steps: of power iteration, a call.

        Raises:
            SpecError: a node that no norm is known of.
        """
        last = _chain(bounded.final_node())
        like = next(iter(bounded.parameters()), torch.zeros(()))
        reach = self._growth(last.source, p, steps, {}, like.detach())
        rows = _rows(last) if last.nodes else torch.eye(int(bounded.final_shape[-1])).to(reach)
        if p == math.inf:
            return reach * torch.cdist(rows, rows, p=1)
        if p == 1 and _is_input(last.source):
            return reach * torch.cdist(rows, rows, p=math.inf)
        gram = rows @ rows.T
        size = gram.diagonal()
        apart = (size[:, None] + size[None, :] - 2 * gram).clamp(min=_LEAST).sqrt()
        return reach * apart * (1 - torch.eye(len(rows)).to(apart))

    def _growth(self, node: Any, p: float, steps: int, known: dict[str, Tensor], like: Tensor) -> Tensor:
        """The norm of what lies between the input and ``node``; from l1 to l2 where ``p`` is 1."""
        if node.name not in known:
            known[node.name] = self._found(node, p, steps, known, like)
        return known[node.name]

    def _found(self, node: Any, p: float, steps: int, known: dict[str, Tensor], like: Tensor) -> Tensor:
        if _is_input(node):
            return like.new_ones(())
        kind, chain = type(node).__name__, _chain(node)
        if chain.nodes:
            first = self._growth(chain.source, p, steps, known, like)
            if p == math.inf:
                return first * math.prod(map(_row_sums, chain.nodes), start=like.new_ones(()))
            columns = _column_norm(chain) if p == 1 and _is_input(chain.source) else None
            return first * (self._spectral(chain, steps) if columns is None else columns)
        moving = [part for part in node.inputs if moves(part)]
        below = [self._growth(part, p, steps, known, like) for part in moving]
        if kind in STEEPEST:
            return below[0] * STEEPEST[kind](node)
        if kind in ("BoundAdd", "BoundSub") and all(part.output_shape == node.output_shape for part in moving):
            return torch.stack(below).sum()
        if kind == "BoundConcat":
            return torch.stack(below).amax() if p == math.inf else torch.stack(below).square().sum().sqrt()
        if kind == "BoundMaxPool" and (p == math.inf or pair(node.kernel_size) == pair(node.stride)):
            return below[0]
        raise _no_norm(node)

    def _spectral(self, chain: _Chain, steps: int) -> Tensor:
        """Of a chain: u . f(v) at the vectors of power iteration, which count as constants."""
        vector = self._vectors.get(chain.name)
        count = steps
        if vector is None:
            generator = torch.Generator().manual_seed(0)
            start = chain.zero()
            vector = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)
            count = _FIRST_STEPS
        for _ in range(count):
            with torch.enable_grad():
                at = vector.detach().requires_grad_()
                value = chain(at)
                (pulled,) = torch.autograd.grad(value, at, value.detach())
            vector = pulled / pulled.norm().clamp(min=_LEAST)
        self._vectors[chain.name] = vector = vector.detach()
        value = chain(vector)
        return (value * (value / value.norm().clamp(min=_LEAST)).detach()).sum()


_KEPT: WeakKeyDictionary[BoundedModule, LayerNorms] = WeakKeyDictionary()


def kept_norms(bounded: BoundedModule) -> LayerNorms:
    """Those that belong to a wrapper, whose vectors training steps leave to one another."""
    return _KEPT.setdefault(bounded, LayerNorms())


def _is_input(node: Any) -> bool:
    return type(node).__name__ == "BoundInput"


def _rows(chain: _Chain) -> Tensor:
    """The matrix (C, n) of a chain that ends in the logits, with gradients."""
    at = chain.zero().requires_grad_()
    value = chain(at).flatten()
    rows = [torch.autograd.grad(one, at, create_graph=True, retain_graph=True)[0].flatten() for one in value]
    return torch.stack(rows)


def _row_sums(node: Any) -> Tensor:
    """The norm from linf to linf of a linear node."""
    kind = type(node).__name__
    if kind in ("BoundConv", "BoundLinear"):
        weight = _matrix(node)
        return weight.abs().flatten(1).sum(1).amax()
    if kind == "BoundBatchNormalization":
        return _channel_scale(node).abs().amax()
    if kind in _VIEWS or kind in ("BoundAveragePool", "BoundGlobalAveragePool"):
        return torch.ones(())
    if is_elementwise(node):
        scale = _scale(node)
        return torch.ones(()) if scale is None else scale.abs().amax()
    raise _no_norm(node)


def _no_norm(node: Any) -> SpecError:
    kind = type(node).__name__.removeprefix("Bound")
    return SpecError(
        f"node {node.name} ({kind}) has no norm that is known; take another loss than lipschitz for this net"
    )


def _scale(node: Any) -> Tensor | None:
    """What a node multiplies or divides by, entry by entry; None where it adds."""
    kind = type(node).__name__
    constants = [part for part in node.inputs if not moves(part)]
    if kind not in ("BoundMul", "BoundDiv"):
        return None
    return _live(constants[0]) if kind == "BoundMul" else 1 / _live(constants[0])


def _matrix(node: Any) -> Tensor:
    """Weights with the outputs first."""
    weight = _live(node.inputs[1])
    if type(node).__name__ == "BoundConv" or node.transB:
        return weight
    return weight.T


def _column_norm(chain: _Chain) -> Tensor | None:
    """The largest l2 norm of what one input moves, of a chain with one layer between scalings; None for others."""
    found: Tensor | None = None
    before = torch.ones(())
    for node in chain.nodes:
        kind = type(node).__name__
        scaling = _scaling(node)
        if kind in _VIEWS:
            continue
        if scaling is not None and found is None:
            before = before * scaling.abs().amax()
        elif kind in ("BoundConv", "BoundLinear") and found is None:
            found = _columns(node)
        else:
            return None
    return None if found is None else before * found


def _scaling(node: Any) -> Tensor | None:
    """What a node multiplies its entries by, where that is all it does."""
    kind = type(node).__name__
    if kind == "BoundBatchNormalization":
        return _channel_scale(node)
    if is_elementwise(node):
        scale = _scale(node)
        return torch.ones(()) if scale is None else scale
    if kind == "BoundConv" and (weight := _live(node.inputs[1]))[0, 0].numel() == 1:
        mixed = weight.flatten(1)
        if node.groups == len(mixed) == mixed.numel():
            return mixed
        if mixed.shape[0] == mixed.shape[1] and bool((mixed == mixed.diagonal().diag()).all()):
            return mixed.diagonal()  # as Normalize is
    return None


def _columns(node: Any) -> Tensor:
    """The largest l2 norm of what one input moves, of a convolution or a matrix."""
    weight = _matrix(node)
    if weight.ndim == 2:
        return weight.square().sum(0).amax().sqrt()
    strides, dilations = (_per_axis(value, weight.ndim - 2) for value in (node.stride, node.dilation))
    squares = [taps.square().sum(0) for taps in meeting_taps(weight, strides, dilations)]
    return torch.stack([one.unflatten(0, (node.groups, -1)).sum(1).amax() for one in squares]).amax().sqrt()


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * axes
