"""Exact bounds of the first linear layer, as a hook into stock ``BoundedModule``.

auto_LiRPA bounds the layer next to the input by interval arithmetic over the input's box, in IBP and
even in CROWN. For an l1 or l2 ball that box is far too large: every neuron would spend the whole
budget on every pixel. The hook intersects that interval with the set's own range of each neuron. It
acts only where the perturbed input is a :class:`PerturbationSet`, and only on a convolution or linear
layer that only element-wise constants, batch normalisation and reshapes separate from the input; anything
else keeps the (sound) box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from auto_LiRPA import BoundedModule
from torch import Tensor

from cure_plugin.bounds.channel_scaling import channel_scaling
from cure_plugin.bounds.elementwise import affine, constant, moving_input
from cure_plugin.bounds.operators import is_elementwise
from cure_plugin.sets.base import PerturbationSet
from cure_plugin.sets.rows import Rows, pair, rows_of_convolution, rows_of_linear


@dataclass(frozen=True)
class _Scaled:
    """A node that equals the perturbed input times ``scale``, plus constants.

    Attributes:
        perturbation: the set that perturbs the input.
        clean: the input that the set is centred at, (B, *input).
        value: the node's output at ``clean``, (B, *output).
        scale: factor of each input entry, broadcastable to ``clean[:1]``.
    """

    perturbation: PerturbationSet
    clean: Tensor
    value: Tensor
    scale: Tensor


def _constant(node: Any) -> Tensor | None:
    """The value of a node that no perturbation reaches, else None."""
    return None if node.perturbed else constant(node)


def _scaled_input(node: Any) -> _Scaled | None:
    """``node`` as a scaled copy of the perturbed input, or None where it is none that we know."""
    kind = type(node).__name__
    if kind == "BoundInput":
        perturbation = getattr(node, "perturbation", None)
        if not isinstance(perturbation, PerturbationSet) or not perturbation.refines_first_layer():
            return None
        clean = node.value.as_subclass(Tensor)
        return _Scaled(perturbation, clean, clean, clean.new_ones((1,) * clean.ndim))
    if is_elementwise(node):
        return _through_constants(node)
    if kind == "BoundBatchNormalization":
        return _through_batch_norm(node)
    if kind == "BoundConv":
        return _through_channel_scaling(node)
    if kind in ("BoundFlatten", "BoundReshape"):
        source = _scaled_input(node.inputs[0])
        shape = getattr(node, "output_shape", None)
        if source is None or shape is None or source.value[0].numel() != torch.Size(shape[1:]).numel():
            return None
        return replace(source, value=source.value.reshape(source.value.shape[0], *shape[1:]))
    return None


def _through_constants(node: Any) -> _Scaled | None:
    """+, -, *, / with a constant on one side."""
    source = _scaled_input(moving_input(node))
    if source is None:
        return None
    step, value, scale = affine(node, source.value), source.value, source.scale
    if step.scale is not None:
        value = value * step.scale
        flattened = value.shape != source.clean.shape
        scale = scale * (step.scale.expand_as(value[:1]).view_as(source.clean[:1]) if flattened else step.scale)
    return replace(source, value=value if step.shift is None else value + step.shift, scale=scale)


def _through_batch_norm(node: Any) -> _Scaled | None:
    """Batch normalisation with the statistics that auto_LiRPA's own interval has just used."""
    source = _scaled_input(node.inputs[0])
    weight, bias = _constant(node.inputs[1]), _constant(node.inputs[2])
    if source is None or weight is None or bias is None or source.value.shape != source.clean.shape:
        return None
    if not node.use_affine:
        return None
    shape = (1, -1) + (1,) * (source.value.ndim - 2)
    factor = weight / torch.sqrt(node.current_var + node.eps)
    shift = bias - node.current_mean * factor
    return replace(
        source,
        value=source.value * factor.view(shape) + shift.view(shape),
        scale=source.scale * factor.view(shape),
    )


def _through_channel_scaling(node: Any) -> _Scaled | None:
    """A 1 x 1 convolution that mixes no channels, as :class:`cure_plugin.nets.Normalize` is one."""
    source = _scaled_input(node.inputs[0])
    scaling = channel_scaling(node)
    if source is None or scaling is None or source.value.ndim != 4 or source.value.shape != source.clean.shape:
        return None
    factor, shift = scaling
    return replace(source, value=source.value * factor + shift, scale=source.scale * factor)


def _first_layer(node: Any) -> tuple[_Scaled, Tensor, Rows] | None:
    """(scaled input, clean output, rows) if ``node`` is a convolution or linear layer over a scaled input."""
    kind = type(node).__name__
    if kind not in ("BoundConv", "BoundLinear"):
        return None
    source = _scaled_input(node.inputs[0])
    parameters = [_constant(parent) for parent in node.inputs[1:]]
    if source is None or any(parameter is None for parameter in parameters):
        return None
    weight, bias = parameters[0], parameters[1] if len(parameters) > 1 else None
    if kind == "BoundLinear":
        factor = getattr(node, "alpha_linear", getattr(node, "alpha", 1.0))
        if node.transA or factor != 1.0 or source.value.ndim != 2 or weight is None or weight.ndim != 2:
            return None
        _, weight, bias = node._preprocess(None, weight, bias)
        scale = source.scale.expand_as(source.clean[:1]).flatten(1)
        return (
            source,
            F.linear(source.value, weight, bias),
            rows_of_linear(weight * scale, tuple(source.clean.shape[1:])),
        )
    if weight is None or weight.ndim != 4 or node.groups != 1 or source.scale[0, 0].numel() != 1:
        return None
    if source.value.shape != source.clean.shape:  # reshaped before: a window is no window of the input
        return None
    stride, padding, dilation = pair(node.stride), pair(node.padding), pair(node.dilation)
    clean_output = F.conv2d(source.value, weight, bias, stride, padding, dilation)
    rows = rows_of_convolution(weight * source.scale, stride, padding, dilation, pair(clean_output.shape[2:]))
    return source, clean_output, rows


def refine(node: Any) -> None:
    """Intersect ``node.interval`` with its exact range over the set, if ``node`` is a first linear layer."""
    layer = _first_layer(node)
    if layer is None:
        return
    source, clean_output, rows = layer
    down = rows.restore(source.perturbation.deviation(source.clean, rows))
    up = -rows.restore(source.perturbation.deviation(source.clean, rows.negated()))
    exact = clean_output + down, clean_output + up
    if source.perturbation.within_hull():
        node.interval = exact
    else:
        lower, upper = node.interval
        node.interval = (torch.maximum(lower, exact[0]), torch.minimum(upper, exact[1]))
    node.lower, node.upper = node.interval


def with_exact_first_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """``BoundedModule.IBP_general`` that refines every first linear layer as it is bounded."""

    def ibp_general(
        self: BoundedModule, node: Any = None, C: Tensor | None = None, delete_bounds_after_use: bool = False
    ) -> Any:
        known = hasattr(node, "interval")
        result = original(self, node, C, delete_bounds_after_use)
        if known or C is not None:
            return result
        refine(node)
        return node.interval

    return ibp_general
