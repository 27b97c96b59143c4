"""Fewer layers that compute the same: reshapes joined, constant factors and summands taken into linear layers.

MatMul and Add, BatchNormalization, normalisations written out, and the sums that a Clip is made of all end up in the
weights of the layers beside them, computed in float64. What is left of them over channels becomes a 1 x 1 convolution.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn

from cure_plugin.export.onnx_builder import Step
from cure_plugin.export.onnx_layers import Affine, Narrow, Permute
from cure_plugin.nets import Reshape

Steps = dict[int, Step]
"""By the number of the value that they put out, in order."""


def folded(steps: list[Step], shape: tuple[int, ...], output: int) -> tuple[Steps, int]:
    """(the steps that value ``output`` needs, as few as can be; the number of that value now).

    Args:
        shape: of the input, without the batch axis.
    """
    net = _Net(dict(enumerate(steps, 1)), shape, output)
    net.drop_unused()
    while any([net.join_reshapes(), net.raise_affines(), net.into_linear()]):
        net.drop_unused()
    net.finish()
    return net.steps, net.output


class _Net:
    """Steps in the making."""

    def __init__(self, steps: Steps, shape: tuple[int, ...], output: int) -> None:
        self.steps, self.shape, self.output = steps, shape, output

    def sample(self, number: int) -> tuple[int, ...]:
        return self.steps[number].sample if number else self.shape

    def uses(self) -> Counter[int]:
        """How many steps read each value; the output is read too."""
        return Counter([self.output, *(source for step in self.steps.values() for source in step.sources)])

    def drop_unused(self) -> None:
        for number in sorted(self.steps, reverse=True):
            if not self.uses()[number]:
                del self.steps[number]

    def rename(self, old: int, new: int) -> None:
        """Let whoever reads value ``old`` read ``new``."""
        self.output = new if self.output == old else self.output
        for number, step in self.steps.items():
            if old in step.sources:
                sources = tuple(new if source == old else source for source in step.sources)
                self.steps[number] = replace(step, sources=sources)

    def remove(self, number: int) -> None:
        """Take out a step that changes nothing any more."""
        (source,) = self.steps.pop(number).sources
        self.rename(number, source)

    def join_reshapes(self) -> bool:
        """Reshapes of reshapes start where those do; those that change nothing go."""
        changed = False
        for number, step in list(self.steps.items()):
            if not _is_reshape(step):
                continue
            (source,) = self.steps[number].sources
            if source and _is_reshape(self.steps[source]):
                source = self.steps[source].sources[0]
                self.steps[number] = replace(step, sources=(source,))
                changed = True
            if self.sample(source) == step.sample:
                self.remove(number)
                changed = True
        return changed

    def raise_affines(self) -> bool:
        """Take factors and summands into the step before, where nothing else reads that."""
        uses, changed = self.uses(), False
        for number, step in list(self.steps.items()):
            source = self.steps[number].sources[0]
            if not isinstance(step.layer, Affine) or not source or uses[source] > 1:
                continue
            before = self.steps[source]
            scale, shift = (constant.expand(step.sample) for constant in (step.layer.scale, step.layer.shift))
            if step.sample != self.sample(source):  # it spreads its input
                continue
            if _is_reshape(before):
                inner = self.sample(before.sources[0])
                layer = Affine(scale.reshape(inner), shift.reshape(inner))
                self.steps[source] = Step(layer, before.sources, inner, step.label)
                self.steps[number] = Step(before.layer, (source,), before.sample, before.label)
            else:
                merged = _scaled_outputs(before.layer, scale, shift)
                if merged is None:
                    continue
                self.steps[source] = replace(before, layer=merged)
                self.remove(number)
            return True
        return changed

    def into_linear(self) -> bool:
        """Take factors, summands and orders of axes into the linear layer behind, also behind reshapes."""
        uses = self.uses()
        for number, step in list(self.steps.items()):
            if type(step.layer) is not nn.Linear or len(self.sample(step.sources[0])) != 1:
                continue
            (start,) = step.sources
            while start and uses[start] == 1 and _is_reshape(self.steps[start]):
                start = self.steps[start].sources[0]
            before = self.steps.get(start)
            if before is None or uses[start] > 1:
                continue
            inner = self.sample(before.sources[0])
            merged = _scaled_inputs(step.layer, before.layer, inner, before.sample)
            if merged is not None:
                self.steps[number] = replace(step, layer=merged)
                self.reorder(start, inner)
                return True
        return False

    def reorder(self, number: int, inner: tuple[int, ...]) -> None:
        """Take out a step behind which only the number of entries counts."""
        step = self.steps[number]
        self.steps[number] = replace(step, layer=nn.Flatten(), sample=(math.prod(inner),))

    def finish(self) -> None:
        """What is left of factors and summands: gone where it changes nothing, a convolution where it is of channels.

        Entries that do not lie in memory in their order are flattened by a layer that can.
        """
        unordered = any(isinstance(step.layer, Narrow) for step in self.steps.values())
        for number, step in list(self.steps.items()):
            if unordered and isinstance(step.layer, nn.Flatten):
                self.steps[number] = replace(step, layer=Reshape(step.sample))
        for number, step in list(self.steps.items()):
            if not isinstance(step.layer, Affine) or step.sample != self.sample(self.steps[number].sources[0]):
                continue
            scale, shift = (c.expand(step.sample) for c in (step.layer.scale, step.layer.shift))
            if bool((scale == 1).all() and (shift == 0).all()):
                self.remove(number)
            elif len(step.sample) == 3 and _is_channelwise(scale) and _is_channelwise(shift):
                weight = torch.diag(scale[:, 0, 0])[:, :, None, None]
                self.steps[number] = replace(self.steps[number], layer=_convolution(weight, shift[:, 0, 0]))


def _is_reshape(step: Step) -> bool:
    return isinstance(step.layer, nn.Flatten | Reshape)


def _is_channelwise(constant: Tensor) -> bool:
    """Whether a constant (C, ...) is the same all over each channel."""
    return bool((constant == constant.flatten(1)[:, 0].view(-1, *[1] * (constant.ndim - 1))).all())


def _scaled_outputs(layer: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module | None:
    """``layer`` with its outputs multiplied and moved; None where it cannot take that in."""
    if isinstance(layer, Affine):
        return Affine(layer.scale * scale, layer.shift * scale + shift)
    if type(layer) is nn.Linear:
        front = (0,) * (scale.ndim - 1)
        factor, summand = scale[front], shift[front]
        if not bool((scale == factor).all() and (shift == summand).all()):
            return None
        bias = summand if layer.bias is None else layer.bias.detach() * factor + summand
        return _linear(layer.weight.detach() * factor[:, None], bias)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and _is_channelwise(scale) and _is_channelwise(shift):
        factor, summand = scale.flatten(1)[:, 0], shift.flatten(1)[:, 0]
        bias = summand if layer.bias is None else layer.bias.detach() * factor + summand
        layer.weight = nn.Parameter(layer.weight.detach() * factor.view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias = nn.Parameter(bias.clone())
        return layer
    return None


def _scaled_inputs(
    layer: nn.Linear, before: nn.Module, inner: tuple[int, ...], outer: tuple[int, ...]
) -> nn.Linear | None:
    """``layer`` that does the work of ``before`` (from ``inner`` to ``outer``) too; None where it cannot."""
    weight = layer.weight.detach()
    bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.detach()
    if isinstance(before, Affine) and inner == outer:
        scale, shift = (constant.expand(outer).flatten() for constant in (before.scale, before.shift))
        return _linear(weight * scale, bias + weight @ shift)
    if isinstance(before, Permute):
        back = [1 + before.order.index(axis) for axis in range(len(outer))]
        return _linear(weight.view(-1, *outer).permute(0, *back).flatten(1), bias)
    return None


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return layer


def _convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    layer = nn.utils.skip_init(nn.Conv2d, weight.shape[1], weight.shape[0], 1, dtype=torch.float64)
    layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return layer
